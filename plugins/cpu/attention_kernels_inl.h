// The kernels of CachedAttention, for the instruction set of the translation unit that includes this.
//
// Keys and values of one head are read once, in tiles, for all queries that share it; what is kept of the scores are those
// of a few queries and one tile (online softmax: Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867).
//
// Values that a query does not see are never multiplied, not even by a probability of 0: theirs may be NaN.

#pragma once

#include "cpu/attention_products.h"

namespace qwenforge::cpu
{
namespace
{

// Of blocks of nearly the same height.
size_t heightOf(size_t rows) noexcept
{
    size_t const blocks = (rows + kMostRowsAtOnce - 1) / kMostRowsAtOnce;
    return (rows + blocks - 1) / blocks;
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
    for (size_t i = 1; i < count; ++i)
    {
        largest = larger(load(scores + i * kLanes), largest);
    }
    raiseMaximum(largest, row, result, vectors);
    // Scores of -inf alone are no numbers after the subtraction of themselves.
    float const maximum = result.maxima[row];
    Floats const origin = broadcast(maximum == -kInfinity ? 0.0F : maximum);
    Floats total = load(result.weights + row * kWidestVector);
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
