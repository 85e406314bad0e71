// The kernels of CachedAttention on buffers of exactly the size that they are promised, for a sanitizer to watch. The
// instruction set is that of QWENFORGE_ATTENTION, the name of a table. Prints how many queries were attended for.

#include "cpu/attention_kernels.h"

#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <memory>

using namespace qwenforge::cpu;

namespace
{

void assign(float& number, size_t i)
{
    number = std::sin(static_cast<float>(i));
}

void assign(Half& number, size_t i)
{
    number.bits = static_cast<uint16_t>((i % 2 << 15) + i % 0x3C00); // of magnitudes below 1, subnormal ones too
}

template <typename Element>
std::unique_ptr<Element[]> numbers(size_t count)
{
    std::unique_ptr<Element[]> values(new Element[count]);
    for (size_t i = 0; i < count; ++i)
    {
        assign(values[i], i);
    }
    return values;
}

// Of `tokens` queries that end at the cache's last key; false where an output is no number.
template <typename Element>
bool attendAtTheEnd(CacheKernels<Element> const& kernels, size_t headSize, size_t group, size_t tokens, size_t past, size_t window)
{
    size_t const rows = tokens * group;
    size_t const capacity = past + tokens;
    size_t const padded = (headSize + kWidestVector - 1) / kWidestVector * kWidestVector;
    auto const queries = numbers<float>(rows * headSize);
    auto const keys = numbers<Element>(capacity * headSize);
    auto const values = numbers<Element>(capacity * headSize);
    auto const sums = numbers<float>(rows * padded);
    auto const maxima = numbers<float>(rows);
    auto const weights = numbers<float>(rows * kWidestVector);
    auto const scratch = numbers<float>(attentionScratch(headSize));
    auto const output = numbers<float>(headSize);
    AttentionItem<Element> const item{
        queries.get(), keys.get(), values.get(), headSize, rows, group, past, window, 0, capacity};
    PartialAttention const result{sums.get(), maxima.get(), weights.get()};
    kernels.attend(item, result, scratch.get());
    for (size_t row = 0; row < rows; ++row)
    {
        QWENFORGE_ATTENTION.merge(&result, 1, row, headSize, output.get());
        for (size_t d = 0; d < headSize; ++d)
        {
            if (!std::isfinite(output[d]))
            {
                return false;
            }
        }
    }
    auto const tables = numbers<float>(headSize / 2);
    auto const kept = numbers<Element>(headSize);
    for (size_t const half : {headSize / 2, headSize / 4, size_t{0}})
    {
        kernels.rotate(queries.get(), {tables.get(), tables.get(), half}, headSize, 1, kept.get());
    }
    return true;
}

} // namespace

int main()
{
    size_t attended = 0;
    for (size_t const headSize : {2, 8, 20, 64, 80, 128, 130})
    {
        for (size_t const group : {1, 7})
        {
            for (size_t const tokens : {1, 2, 13})
            {
                for (size_t const past : {0, 15, 63, 64, 130, 600})
                {
                    for (size_t const window : {9, 100000})
                    {
                        if (!attendAtTheEnd(QWENFORGE_ATTENTION.float32, headSize, group, tokens, past, window)
                            || !attendAtTheEnd(QWENFORGE_ATTENTION.float16, headSize, group, tokens, past, window))
                        {
                            std::printf("no number: head size %zu, group %zu, %zu tokens behind %zu, window %zu\n", headSize,
                                group, tokens, past, window);
                            return 1;
                        }
                        attended += 2 * group * tokens;
                    }
                }
            }
        }
    }
    std::printf("%zu\n", attended);
    return 0;
}
