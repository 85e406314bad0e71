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

std::unique_ptr<float[]> numbers(size_t count)
{
    std::unique_ptr<float[]> values(new float[count]);
    for (size_t i = 0; i < count; ++i)
    {
        values[i] = std::sin(static_cast<float>(i));
    }
    return values;
}

// Of `tokens` queries that end at the cache's last key; false where an output is no number.
bool attendAtTheEnd(size_t headSize, size_t group, size_t tokens, size_t past, size_t window)
{
    size_t const rows = tokens * group;
    size_t const capacity = past + tokens;
    size_t const padded = (headSize + kWidestVector - 1) / kWidestVector * kWidestVector;
    auto const queries = numbers(rows * headSize);
    auto const keys = numbers(capacity * headSize);
    auto const values = numbers(capacity * headSize);
    auto const sums = numbers(rows * padded);
    auto const maxima = numbers(rows);
    auto const weights = numbers(rows * kWidestVector);
    auto const scratch = numbers(attentionScratch(headSize));
    auto const output = numbers(headSize);
    AttentionItem const item{
        queries.get(), keys.get(), values.get(), headSize, rows, group, past, window, 0, capacity};
    PartialAttention const result{sums.get(), maxima.get(), weights.get()};
    QWENFORGE_ATTENTION.attend(item, result, scratch.get());
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
    auto const tables = numbers(headSize / 2);
    QWENFORGE_ATTENTION.rotate(keys.get(), {tables.get(), tables.get(), headSize / 2}, headSize, 1, output.get());
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
                        if (!attendAtTheEnd(headSize, group, tokens, past, window))
                        {
                            std::printf("no number: head size %zu, group %zu, %zu tokens behind %zu, window %zu\n", headSize,
                                group, tokens, past, window);
                            return 1;
                        }
                        attended += group * tokens;
                    }
                }
            }
        }
    }
    std::printf("%zu\n", attended);
    return 0;
}
