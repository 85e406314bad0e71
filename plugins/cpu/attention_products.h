// Products of small matrices for CachedAttention, for the instruction set of the translation unit that includes this.

#pragma once

#include "cpu/attention_kernels.h"
#include "cpu/half_vectors.h"

namespace qwenforge::cpu
{
namespace
{

#if defined(__AVX512F__)
constexpr size_t kColumnsAtOnce = 4; // vectors; of 32 registers 6 * 4 are sums
#else
constexpr size_t kColumnsAtOnce = 2; // of 16 registers 6 * 2 are
#endif

size_t minimumOf(size_t a, size_t b) noexcept
{
    return a < b ? a : b;
}

size_t maximumOf(size_t a, size_t b) noexcept
{
    return a > b ? a : b;
}

// As many as hold `floats`.
size_t vectorsOf(size_t floats) noexcept
{
    return (floats + kLanes - 1) / kLanes;
}

// Asks for what stands a page behind to be brought into the level-2 cache: the processor itself stops at a page's end.
// From much farther on, what comes first has to wait. Nothing happens where there is no memory.
inline void fetchAhead(void const* address) noexcept
{
    __builtin_prefetch(reinterpret_cast<void const*>(reinterpret_cast<uintptr_t>(address) + (4 << 10)), 0, 2);
}

constexpr size_t kCacheLine = 64; // bytes

// sums [kRows, kColumns vectors] = (kAdds: +=) left [kRows, depth] @ right [depth, kColumns vectors].
template <size_t kRows, size_t kColumns, bool kAdds, typename Element>
void multiplyBlock(float const* left, size_t leftStride, Element const* right, size_t rightStride, size_t depth,
    float* sums, size_t sumStride) noexcept
{
    Floats block[kRows][kColumns];
    QWENFORGE_UNROLL
    for (size_t r = 0; r < kRows; ++r)
    {
        QWENFORGE_UNROLL
        for (size_t c = 0; c < kColumns; ++c)
        {
            block[r][c] = kAdds ? load(sums + r * sumStride + c * kLanes) : Floats{};
        }
    }
    for (size_t k = 0; k < depth; ++k)
    {
        Floats columns[kColumns];
        QWENFORGE_UNROLL
        for (size_t c = 0; c < kColumns; ++c)
        {
            columns[c] = load(right + k * rightStride + c * kLanes);
            if (kAdds && c * kLanes * sizeof(Element) % kCacheLine == 0) // the values
            {
                fetchAhead(right + k * rightStride + c * kLanes);
            }
        }
        QWENFORGE_UNROLL
        for (size_t r = 0; r < kRows; ++r)
        {
            Floats const factor = broadcast(left[r * leftStride + k]);
            QWENFORGE_UNROLL
            for (size_t c = 0; c < kColumns; ++c)
            {
                block[r][c] += factor * columns[c];
            }
        }
    }
    QWENFORGE_UNROLL
    for (size_t r = 0; r < kRows; ++r)
    {
        QWENFORGE_UNROLL
        for (size_t c = 0; c < kColumns; ++c)
        {
            store(sums + r * sumStride + c * kLanes, block[r][c]);
        }
    }
}

template <size_t kNumber>
struct Constant
{
    static constexpr size_t kValue = kNumber;
};

template <size_t kRows, bool kAdds, typename Element>
void multiplyRows(float const* left, size_t leftStride, Element const* right, size_t rightStride, size_t depth,
    size_t vectors, float* sums, size_t sumStride) noexcept
{
    auto const block = [&](auto columns, size_t column)
    {
        multiplyBlock<kRows, decltype(columns)::kValue, kAdds>(
            left, leftStride, right + column * kLanes, rightStride, depth, sums + column * kLanes, sumStride);
    };
    size_t column = 0;
    for (; column + kColumnsAtOnce <= vectors; column += kColumnsAtOnce)
    {
        block(Constant<kColumnsAtOnce>{}, column);
    }
    switch (vectors - column)
    {
    case 3: block(Constant<3>{}, column); break;
    case 2: block(Constant<2>{}, column); break;
    case 1: block(Constant<1>{}, column); break;
    default: break;
    }
}

// At most kMostRowsAtOnce rows.
template <bool kAdds, typename Element>
void multiply(size_t rows, float const* left, size_t leftStride, Element const* right, size_t rightStride, size_t depth,
    size_t vectors, float* sums, size_t sumStride) noexcept
{
    using Multiply = void (*)(float const*, size_t, Element const*, size_t, size_t, size_t, float*, size_t);
    static constexpr Multiply byRows[kMostRowsAtOnce]
        = {multiplyRows<1, kAdds, Element>, multiplyRows<2, kAdds, Element>, multiplyRows<3, kAdds, Element>,
            multiplyRows<4, kAdds, Element>, multiplyRows<5, kAdds, Element>, multiplyRows<6, kAdds, Element>};
    byRows[rows - 1](left, leftStride, right, rightStride, depth, vectors, sums, sumStride);
}

// panel [headSize, kKeysPerTile] = keys [count, headSize] transposed; what stands beside the last key is any of them.
template <typename Element>
void transposeKeys(Element const* keys, size_t count, size_t headSize, float* panel) noexcept
{
    size_t const whole = headSize - headSize % kLanes;
    for (size_t key = 0; key < count; key += kLanes)
    {
        Element const* rows[kLanes];
        for (size_t i = 0; i < kLanes; ++i)
        {
            rows[i] = keys + (key + i < count ? key + i : count - 1) * headSize;
        }
        for (size_t d = 0; d < whole; d += kLanes)
        {
            Floats block[kLanes];
            QWENFORGE_UNROLL
            for (size_t i = 0; i < kLanes; ++i)
            {
                block[i] = load(rows[i] + d);
            }
            transpose(block);
            QWENFORGE_UNROLL
            for (size_t i = 0; i < kLanes; ++i)
            {
                store(panel + (d + i) * kKeysPerTile + key, block[i]);
            }
        }
        for (size_t d = whole; d < headSize; ++d)
        {
            for (size_t i = 0; i < kLanes; ++i)
            {
                panel[d * kKeysPerTile + key + i] = loadOne(rows[i] + d);
            }
        }
    }
}

// padded [count, stride] = rows [count, width], zero behind. The stride is a multiple of kLanes.
template <typename Element>
void padRows(Element const* rows, size_t count, size_t width, size_t stride, float* padded) noexcept
{
    size_t const whole = width - width % kLanes;
    for (size_t i = 0; i < count; ++i)
    {
        for (size_t d = 0; d < whole; d += kLanes)
        {
            store(padded + i * stride + d, load(rows + i * width + d));
        }
        for (size_t d = whole; d < stride; ++d)
        {
            padded[i * stride + d] = d < width ? loadOne(rows + i * width + d) : 0;
        }
        for (size_t d = 0; d < width; d += kCacheLine / sizeof(Element))
        {
            fetchAhead(rows + i * width + d);
        }
    }
}

// scores [rows, kKeysPerPass] of as many keys as fill whole vectors. headSize is kHeadSize where that is not 0, and a
// multiple of kLanes. Reads the keys in their order, as the processor foresees it.
template <size_t kHeadSize, bool kFetches, typename Element>
void dots(
    size_t rows, float const* queries, Element const* keys, size_t count, size_t anyHeadSize, float* scores) noexcept
{
    size_t const headSize = kHeadSize != 0 ? kHeadSize : anyHeadSize;
    for (size_t key = 0; key < count; key += kLanes)
    {
        for (size_t r = 0; r < rows; ++r)
        {
            Floats products[kLanes];
            QWENFORGE_UNROLL
            for (size_t i = 0; i < kLanes; ++i)
            {
                Element const* const vector = keys + (key + i < count ? key + i : count - 1) * headSize;
                products[i] = load(queries + r * headSize) * load(vector);
                if (kFetches && r == 0)
                {
                    for (size_t d = 0; d < headSize; d += kCacheLine / sizeof(Element))
                    {
                        fetchAhead(vector + d);
                    }
                }
                for (size_t d = kLanes; d < headSize; d += kLanes)
                {
                    products[i] += load(queries + r * headSize + d) * load(vector + d);
                }
            }
            store(scores + r * kKeysPerPass + key, sumsOf(products));
        }
    }
}

template <size_t kHeadSize>
void scoreByDots(size_t rows, float const* queries, float const* keys, size_t count, size_t headSize, float*,
    float* scores) noexcept
{
    dots<kHeadSize, true>(rows, queries, keys, count, headSize, scores);
}

// Of several rows, each key becomes float32 once for all of them: in `widened` [kLanes, headSize].
template <size_t kHeadSize>
void scoreByDots(size_t rows, float const* queries, Half const* keys, size_t count, size_t headSize, float* widened,
    float* scores) noexcept
{
    if (rows == 1)
    {
        dots<kHeadSize, true>(rows, queries, keys, count, headSize, scores);
        return;
    }
    for (size_t key = 0; key < count; key += kLanes)
    {
        size_t const block = minimumOf(kLanes, count - key);
        padRows(keys + key * headSize, block, headSize, headSize, widened);
        dots<kHeadSize, false>(rows, queries, widened, block, headSize, scores + key);
    }
}

} // namespace
} // namespace qwenforge::cpu
