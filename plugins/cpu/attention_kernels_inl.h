// The kernels of CachedAttention, for the instruction set of the translation unit that includes this.
//
// Keys and values of one head are read once, in tiles, for all queries that share it; what is kept of the scores are those
// of a few queries and one tile (online softmax: Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867).
//
// Values that a query does not see are never multiplied, not even by a probability of 0: theirs may be NaN.

#pragma once

#include "cpu/attention_kernels.h"
#include "cpu/vectors.h"

namespace qwenforge::cpu
{
namespace
{

#if defined(__AVX512F__)
constexpr size_t kColumnsAtOnce = 4; // vectors; of 32 registers 6 * 4 are sums
#else
constexpr size_t kColumnsAtOnce = 2; // of 16 registers 6 * 2 are
#endif

// Up to here, the keys are not worth transposing.
constexpr size_t kFewRows = 7;

// Of blocks of nearly the same height.
size_t heightOf(size_t rows) noexcept
{
    size_t const blocks = (rows + kMostRowsAtOnce - 1) / kMostRowsAtOnce;
    return (rows + blocks - 1) / blocks;
}

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

// Asks for what stands 32 KiB behind to be brought into the level-2 cache: the processor itself looks less far. Nothing
// happens where there is no memory.
inline void fetchAhead(float const* address) noexcept
{
    __builtin_prefetch(reinterpret_cast<void const*>(reinterpret_cast<uintptr_t>(address) + (32 << 10)), 0, 2);
}

// sums [kRows, kColumns vectors] = (kAdds: +=) left [kRows, depth] @ right [depth, kColumns vectors].
template <size_t kRows, size_t kColumns, bool kAdds>
void multiplyBlock(float const* left, size_t leftStride, float const* right, size_t rightStride, size_t depth, float* sums,
    size_t sumStride) noexcept
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
            if (kAdds) // the values
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

template <size_t kRows, bool kAdds>
void multiplyRows(float const* left, size_t leftStride, float const* right, size_t rightStride, size_t depth,
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
template <bool kAdds>
void multiply(size_t rows, float const* left, size_t leftStride, float const* right, size_t rightStride, size_t depth,
    size_t vectors, float* sums, size_t sumStride) noexcept
{
    using Multiply = void (*)(float const*, size_t, float const*, size_t, size_t, size_t, float*, size_t);
    static constexpr Multiply byRows[kMostRowsAtOnce] = {multiplyRows<1, kAdds>, multiplyRows<2, kAdds>,
        multiplyRows<3, kAdds>, multiplyRows<4, kAdds>, multiplyRows<5, kAdds>, multiplyRows<6, kAdds>};
    byRows[rows - 1](left, leftStride, right, rightStride, depth, vectors, sums, sumStride);
}

// panel [headSize, kKeysPerTile] = keys [count, headSize] transposed; what stands beside the last key is any of them.
void transposeKeys(float const* keys, size_t count, size_t headSize, float* panel) noexcept
{
    size_t const whole = headSize - headSize % kLanes;
    for (size_t key = 0; key < count; key += kLanes)
    {
        float const* rows[kLanes];
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
                panel[d * kKeysPerTile + key + i] = rows[i][d];
            }
        }
    }
}

// padded [count, stride] = rows [count, width], zero behind.
void padRows(float const* rows, size_t count, size_t width, size_t stride, float* padded) noexcept
{
    for (size_t i = 0; i < count; ++i)
    {
        for (size_t d = 0; d < stride; ++d)
        {
            padded[i * stride + d] = d < width ? rows[i * width + d] : 0;
        }
    }
}

// scores [rows, kKeysPerPass] of as many keys as fill whole vectors. headSize is kHeadSize where that is not 0, and a
// multiple of kLanes. Reads the keys in their order, as the processor foresees it.
template <size_t kHeadSize>
void scoreByDots(
    size_t rows, float const* queries, float const* keys, size_t count, size_t anyHeadSize, float* scores) noexcept
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
                float const* const vector = keys + (key + i < count ? key + i : count - 1) * headSize;
                products[i] = load(queries + r * headSize) * load(vector);
                if (r == 0)
                {
                    QWENFORGE_UNROLL
                    for (size_t d = 0; d < headSize; d += kWidestVector)
                    {
                        fetchAhead(vector + d);
                    }
                }
                QWENFORGE_UNROLL
                for (size_t d = kLanes; d < headSize; d += kLanes)
                {
                    products[i] += load(queries + r * headSize + d) * load(vector + d);
                }
            }
            store(scores + r * kKeysPerPass + key, sumsOf(products));
        }
    }
}

// The keys of a tile that a row sees, counted from the tile's first.
struct Range
{
    size_t begin;
    size_t end;
};

// A row's maximum rises to that of its scores: what was summed before shrinks.
void raiseMaximum(Floats largest, size_t row, PartialAttention const& result, size_t vectors) noexcept
{
    float& maximum = result.maxima[row];
    if (!anyLarger(largest, broadcast(maximum)))
    {
        return;
    }
    float const raised = largestOf(larger(largest, broadcast(maximum)));
    if (maximum != -kInfinity)
    {
        float const shrink = exponential2(maximum - raised);
        float* const weights = result.weights + row * kWidestVector;
        store(weights, load(weights) * shrink);
        float* const sums = result.sums + row * vectors * kLanes;
        for (size_t i = 0; i < vectors; ++i)
        {
            store(sums + i * kLanes, load(sums + i * kLanes) * shrink);
        }
    }
    maximum = raised;
}

// Scores become probabilities, `count` vectors; kCount of them where that is not 0, which stay in registers.
template <size_t kCount>
void addVectors(
    float* scores, size_t anyCount, size_t row, PartialAttention const& result, size_t vectors) noexcept
{
    size_t const count = kCount != 0 ? kCount : anyCount;
    Floats largest = load(scores);
    QWENFORGE_UNROLL
    for (size_t i = 1; i < count; ++i)
    {
        largest = larger(load(scores + i * kLanes), largest);
    }
    raiseMaximum(largest, row, result, vectors);
    // Scores of -inf alone are no numbers after the subtraction of themselves.
    float const maximum = result.maxima[row];
    Floats const origin = broadcast(maximum == -kInfinity ? 0.0F : maximum);
    Floats total = load(result.weights + row * kWidestVector);
    QWENFORGE_UNROLL
    for (size_t i = 0; i < count; ++i)
    {
        Floats const probabilities = exponential2(load(scores + i * kLanes) - origin);
        store(scores + i * kLanes, probabilities);
        total += probabilities;
    }
    store(result.weights + row * kWidestVector, total);
}

// The scores that row number `row` sees become probabilities.
void addScores(float* scores, Range range, size_t row, PartialAttention const& result, size_t vectors) noexcept
{
    if (range.begin >= range.end)
    {
        return;
    }
    size_t const first = range.begin / kLanes * kLanes;
    size_t const last = vectorsOf(range.end) * kLanes;
    for (size_t i = first; i < range.begin; ++i)
    {
        scores[i] = -kInfinity;
    }
    for (size_t i = range.end; i < last; ++i)
    {
        scores[i] = -kInfinity;
    }
    size_t const count = (last - first) / kLanes;
    constexpr size_t kWhole = kKeysPerTile / kLanes;
    (count == kWhole ? addVectors<kWhole> : addVectors<0>)(scores + first, count, row, result, vectors);
}

// sums [rows, vectors] += probabilities [rows, scoreStride] @ values, each row of those that it sees. At most
// kMostRowsAtOnce rows.
void addValues(size_t rows, float const* probabilities, size_t scoreStride, Range const* ranges, float const* values,
    size_t valueStride, float* sums, size_t vectors) noexcept
{
    Range shared = ranges[0];
    for (size_t r = 1; r < rows; ++r)
    {
        shared.begin = maximumOf(shared.begin, ranges[r].begin);
        shared.end = minimumOf(shared.end, ranges[r].end);
    }
    shared.end = maximumOf(shared.begin, shared.end);
    size_t const stride = vectors * kLanes;
    auto const add = [&](size_t row, size_t count, size_t begin, size_t end)
    {
        if (begin < end)
        {
            multiply<true>(count, probabilities + row * scoreStride + begin, scoreStride, values + begin * valueStride,
                valueStride, end - begin, vectors, sums + row * stride, stride);
        }
    };
    add(0, rows, shared.begin, shared.end);
    for (size_t r = 0; r < rows; ++r)
    {
        add(r, 1, ranges[r].begin, minimumOf(ranges[r].end, shared.begin));
        add(r, 1, maximumOf(ranges[r].begin, shared.end), ranges[r].end);
    }
}

// The keys that row number `row` sees of those from `begin` to `end`, counted from `begin`.
Range seen(AttentionItem const& item, size_t row, size_t begin, size_t end) noexcept
{
    size_t const behind = item.firstPosition + row / item.group + 1;
    size_t const first = behind > item.window ? behind - item.window : 0;
    size_t const from = minimumOf(maximumOf(first, begin), end);
    return {from - begin, maximumOf(minimumOf(behind, end), from) - begin};
}

// Few queries: the keys as they are, in long passes, since fetching them takes longer than the arithmetic.
void attendFew(AttentionItem const& item, Range keys, PartialAttention const& result, float* scores) noexcept
{
    size_t const headSize = item.headSize;
    size_t const vectors = vectorsOf(headSize);
    size_t const height = heightOf(item.rows);
    auto const score = headSize == 64 ? scoreByDots<64> : headSize == 128 ? scoreByDots<128> : scoreByDots<0>;
    for (size_t key = keys.begin; key < keys.end; key += kKeysPerPass)
    {
        size_t const behind = minimumOf(key + kKeysPerPass, keys.end);
        score(item.rows, item.queries, item.keys + key * headSize, behind - key, headSize, scores);
        for (size_t row = 0; row < item.rows; ++row)
        {
            addScores(scores + row * kKeysPerPass, seen(item, row, key, behind), row, result, vectors);
        }
        // Rows that do not fit together find the values of a tile in the level-1 cache.
        for (size_t tile = key; tile < behind; tile += kKeysPerTile)
        {
            size_t const tileEnd = minimumOf(tile + kKeysPerTile, behind);
            for (size_t row = 0; row < item.rows; row += height)
            {
                size_t const rows = minimumOf(height, item.rows - row);
                Range ranges[kMostRowsAtOnce] = {};
                for (size_t r = 0; r < rows; ++r)
                {
                    ranges[r] = seen(item, row + r, tile, tileEnd);
                }
                addValues(rows, scores + row * kKeysPerPass + (tile - key), kKeysPerPass, ranges,
                    item.values + tile * headSize, headSize, result.sums + row * vectors * kLanes, vectors);
            }
        }
    }
}

// Many queries: tiles of keys, transposed.
void attendMany(AttentionItem const& item, Range keys, PartialAttention const& result, float* scratch) noexcept
{
    size_t const headSize = item.headSize;
    size_t const vectors = vectorsOf(headSize);
    size_t const stride = vectors * kLanes;
    size_t const height = heightOf(item.rows);
    float* const panel = scratch;
    float* const scores = panel + headSize * kKeysPerTile;
    float* const padded = scores + kMostRowsAtOnce * kKeysPerTile;
    for (size_t key = keys.begin; key < keys.end; key += kKeysPerTile)
    {
        size_t const behind = minimumOf(key + kKeysPerTile, keys.end);
        transposeKeys(item.keys + key * headSize, behind - key, headSize, panel);
        float const* values = item.values + key * headSize;
        if (stride != headSize)
        {
            padRows(values, behind - key, headSize, stride, padded);
            values = padded;
        }
        for (size_t row = 0; row < item.rows; row += height)
        {
            size_t const rows = minimumOf(height, item.rows - row);
            Range ranges[kMostRowsAtOnce] = {};
            size_t count = 0;
            for (size_t r = 0; r < rows; ++r)
            {
                ranges[r] = seen(item, row + r, key, behind);
                count = ranges[r].begin < ranges[r].end ? maximumOf(count, ranges[r].end) : count;
            }
            if (count == 0)
            {
                continue;
            }
            multiply<false>(rows, item.queries + row * headSize, headSize, panel, kKeysPerTile, headSize,
                vectorsOf(count), scores, kKeysPerTile);
            for (size_t r = 0; r < rows; ++r)
            {
                addScores(scores + r * kKeysPerTile, ranges[r], row + r, result, vectors);
            }
            addValues(rows, scores, kKeysPerTile, ranges, values, stride, result.sums + row * stride, vectors);
        }
    }
}

void attend(AttentionItem const& item, PartialAttention const& result, float* scratch)
{
    size_t const stride = vectorsOf(item.headSize) * kLanes;
    for (size_t i = 0; i < item.rows * stride; i += kLanes)
    {
        store(result.sums + i, Floats{});
    }
    for (size_t r = 0; r < item.rows; ++r)
    {
        result.maxima[r] = -kInfinity;
        store(result.weights + r * kWidestVector, Floats{});
    }
    Range const keys{item.keyBegin + seen(item, 0, item.keyBegin, item.keyEnd).begin,
        item.keyBegin + seen(item, item.rows - 1, item.keyBegin, item.keyEnd).end};
    if (item.rows <= kFewRows && stride == item.headSize)
    {
        attendFew(item, keys, result, scratch);
    }
    else
    {
        attendMany(item, keys, result, scratch);
    }
}

void merge(PartialAttention const* parts, size_t count, size_t row, size_t headSize, float* __restrict output)
{
    float maximum = -kInfinity;
    for (size_t i = 0; i < count; ++i)
    {
        maximum = parts[i].maxima[row] > maximum ? parts[i].maxima[row] : maximum;
    }
    auto const shareOf = [&](size_t i)
    { return parts[i].maxima[row] == maximum ? 1.0F : exponential2(parts[i].maxima[row] - maximum); };
    Floats weights{};
    for (size_t i = 0; i < count; ++i)
    {
        weights += shareOf(i) * load(parts[i].weights + row * kWidestVector);
    }
    float const weight = sumOf(weights);
    for (size_t i = 0; i < count; ++i)
    {
        float const share = shareOf(i) / weight;
        float const* const sums = parts[i].sums + row * vectorsOf(headSize) * kLanes;
        for (size_t d = 0; d < headSize; ++d)
        {
            output[d] = i == 0 ? share * sums[d] : output[d] + share * sums[d];
        }
    }
}

void rotate(float const* head, Rotation const& rotation, size_t headSize, float factor, float* __restrict turned)
{
    size_t const half = rotation.half;
    for (size_t i = 0; i < half; ++i)
    {
        float const first = head[i];
        float const second = head[half + i];
        turned[i] = factor * (first * rotation.cosines[i] - second * rotation.sines[i]);
        turned[half + i] = factor * (second * rotation.cosines[i] + first * rotation.sines[i]);
    }
    for (size_t i = 2 * half; i < headSize; ++i)
    {
        turned[i] = factor * head[i];
    }
}

constexpr AttentionKernels kKernels{rotate, attend, merge};

} // namespace
} // namespace qwenforge::cpu
