// Attention of a few queries over many keys: the keys of a row are divided among blocks, and what each has summed up is put
// together afterwards. A step of decoding has one query a row: what counts is that all of the memory's channels are busy.
//
//   attendSplit     sums over a part of the keys, of 16 group rows                 a block of 4 warps
//   combineSplits   output = the parts put together, in their order                a block a group row
//
// Nothing is added atomically, so that the same input gives the same bits.

#pragma once

#include "attention/launch.h"
#include "attention/tiles.cuh"

namespace qwenforge
{
namespace attention
{

constexpr int32_t kSplitWarps = 4;
constexpr int32_t kSplitThreads = kSplitWarps * kWarpSize;
constexpr int32_t kSplitStages = 4;
constexpr int32_t kSplitStageBytes = 4096;
constexpr int32_t kSplitBlocks = 3; // of a multiprocessor, where its shared memory is as large as SM 90's
constexpr int32_t kLeastSplitKeys = 128;
constexpr int32_t kMostSplits = 128;
constexpr int32_t kMergeThreads = 256;

template <CacheType kType, typename T, int32_t kHead>
using SplitTiling = Tiling<kType, T, kHead,
    kSplitStageBytes / (kHead * static_cast<int32_t>(sizeof(typename CacheFormat<kType, T>::Element))), 1>;

// Of a block: the queries, and a ring of each warp; once the keys are done, instead of the rings what each warp has.
template <typename L>
struct SplitMemory
{
    struct Parts
    {
        float maximum[kSplitWarps][kSplitRows];
        float weight[kSplitWarps][kSplitRows];
        float values[kSplitWarps][kSplitRows][L::kSize];
    };

    alignas(16) unsigned char queries[kSplitRows * L::kQueryChunks * kChunkBytes];
    union
    {
        alignas(16) unsigned char rings[kSplitWarps][kSplitStages][L::kStageBytes];
        Parts parts;
    };
};

// What the blocks leave for combineSplits: [B, Hk, tiles, splits] of each kind. Null when there is one split, which writes
// the output itself.
struct Partials
{
    float* values;  // [.., 16, D]
    float* maximum; // [.., 16]
    float* weight;  // [.., 16]
};

// Block ((b * Hk + h) * tiles + tile) * splits + split takes the group rows 16 tile .. 16 tile + 15 of head h of row b, and
// of the keys that any of them sees the split-th part, a multiple of what the four warps take at a time. Warp w takes
// every fourth stage of them, through a ring of its own, so that no warp waits for another one before the end.
//
// What the warps have summed up is then put together in the order of the warps, two channels a thread at a time. Where the
// rows are short for their capacity most parts are empty: such a block says so and does nothing else.
template <CacheType kType, typename T, int32_t kHead>
__global__ void __launch_bounds__(kSplitThreads, kSplitBlocks)
    attendSplit(Call<kType, T> call, int32_t tiles, int32_t splits, Partials partials)
{
    using L = SplitTiling<kType, T, kHead>;
    auto& memory = *reinterpret_cast<SplitMemory<L>*>(QWENFORGE_DYNAMIC);
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    int32_t const lane = thread % kWarpSize;
    int32_t const warp = thread / kWarpSize;
    int64_t const part = blockIdx.x;
    auto const split = static_cast<int32_t>(part % splits);
    int64_t const firstRow = part / splits % tiles * kSplitRows;
    auto const head = static_cast<int32_t>(part / splits / tiles % call.keyValueHeads);
    int64_t const batchRow = part / splits / tiles / call.keyValueHeads;
    int64_t const rows = call.sequence * call.group;
    Sight<L> const sight(call, batchRow, firstRow, rows);
    constexpr int32_t kRound = kSplitWarps * L::kKeys;
    int32_t const seen = sight.someLast + 1 - sight.someFirst; // 0 where nothing is seen
    int32_t const each = (seen + splits - 1) / splits;
    int32_t const least = each < kLeastSplitKeys ? kLeastSplitKeys : each;
    int32_t const keys = (least + kRound - 1) / kRound * kRound;
    int64_t const from = sight.someFirst + static_cast<int64_t>(split) * keys;
    int64_t const to = from + keys <= sight.someLast ? from + keys : sight.someLast + 1;
    auto const end = static_cast<int32_t>(from < to ? to : 0);
    auto const first = static_cast<int32_t>(from < to ? from : 0) + warp * L::kKeys;
    if (end == 0 && partials.values != nullptr) // the same for the whole block
    {
        if (thread < kSplitRows)
        {
            partials.maximum[part * kSplitRows + thread] = -INFINITY;
            partials.weight[part * kSplitRows + thread] = 0.0f;
        }
        return;
    }
    loadQueries<L, kSplitRows, kSplitThreads>(call, batchRow, head, firstRow, rows, memory.queries);
    Sums<L> sums;
    attendKeys<L, kSplitStages, kWarpSize>(call, Keys{batchRow, head, first, kRound, end}, sight, memory.queries,
        &memory.rings[warp][0][0], sums);

    __syncthreads(); // nobody needs the rings any more, whose memory the parts take
#pragma unroll
    for (int32_t half = 0; half < 2; ++half)
    {
        int32_t const row = half * 8 + lane / 4;
        if (lane % 4 == 0)
        {
            memory.parts.maximum[warp][row] = sums.maximum[0][half];
            memory.parts.weight[warp][row] = sums.weight[0][half];
        }
#pragma unroll
        for (int32_t n = 0; n < 2 * L::kColumns; ++n)
        {
            int32_t const channel = channelOf<L>(n / 2, 2 * (lane % 4) + n % 2);
            memory.parts.values[warp][row][channel] = sums.values[0][n / 2][2 * half + n % 2];
        }
    }
    __syncthreads();
    float const scale = valueScale(call, head);
    for (int32_t i = 2 * thread; i < kSplitRows * kHead; i += 2 * kSplitThreads)
    {
        int32_t const row = i / kHead;
        int32_t const channel = i % kHead;
        float maximum = -INFINITY;
#pragma unroll
        for (int32_t w = 0; w < kSplitWarps; ++w)
        {
            maximum = fmaxf(maximum, memory.parts.maximum[w][row]);
        }
        float weight = 0.0f;
        float values[2]{};
#pragma unroll
        for (int32_t w = 0; w < kSplitWarps; ++w)
        {
            float const share = exp2f(memory.parts.maximum[w][row] - baseOf(maximum));
            weight += memory.parts.weight[w][row] * share;
            values[0] += memory.parts.values[w][row][channel] * share;
            values[1] += memory.parts.values[w][row][channel + 1] * share;
        }
        if (firstRow + row >= rows)
        {
            continue;
        }
        if (partials.values == nullptr)
        {
            call.write(outputOf(call, batchRow, head, firstRow + row) + channel, values[0] / weight * scale,
                values[1] / weight * scale);
            continue;
        }
        *reinterpret_cast<float2*>(partials.values + (part * kSplitRows + row) * kHead + channel) = {values[0], values[1]};
        if (channel == 0)
        {
            partials.maximum[part * kSplitRows + row] = maximum;
            partials.weight[part * kSplitRows + row] = weight;
        }
    }
}

// Block (b * Hk + h) * S G + row takes one group row. Its threads are divided into groups of D / 2: thread c of each owns the
// channels 2 c and 2 c + 1, group i the parts i, i + kGroups, ..., so that many of them are on their way at once; the groups
// are then added up in their order. A part that saw nothing is not read: it has not written its values. Shared memory holds
// maximum and weight of each part, what its values are multiplied by, and the sums of each group.
template <CacheType kType, typename T, int32_t kHead>
__global__ void __launch_bounds__(kMergeThreads)
    combineSplits(Call<kType, T> call, int32_t tiles, int32_t splits, Partials partials)
{
    constexpr int32_t kGroupThreads = kHead / 2;
    constexpr int32_t kGroups = kMergeThreads / kGroupThreads;
    QWENFORGE_SHARED(maxima, float[kMostSplits]);
    QWENFORGE_SHARED(weights, float[kMostSplits]);
    QWENFORGE_SHARED(shares, float[kMostSplits]);
    QWENFORGE_SHARED(sums, float[kGroups][kHead]);
    int64_t const rows = call.sequence * call.group;
    int64_t const row = blockIdx.x % rows;
    int64_t const keyHead = blockIdx.x / rows;
    int64_t const first = (keyHead * tiles + row / kSplitRows) * splits; // part
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    int32_t const lane = thread % kWarpSize;
    int32_t const group = thread / kGroupThreads;
    int32_t const channel = 2 * (thread % kGroupThreads);
    auto const at = [&](int32_t split) { return (first + split) * kSplitRows + row % kSplitRows; };
    if (thread < splits)
    {
        maxima[thread] = partials.maximum[at(thread)];
        weights[thread] = partials.weight[at(thread)];
    }
    __syncthreads();
    float maximum = -INFINITY;
    for (int32_t split = lane; split < splits; split += kWarpSize)
    {
        maximum = fmaxf(maximum, maxima[split]);
    }
    float const base = baseOf(warpMax(maximum));
    if (thread < splits)
    {
        shares[thread] = exp2f(maxima[thread] - base);
    }
    __syncthreads();
    float weight = 0.0f;
    for (int32_t split = lane; split < splits; split += kWarpSize)
    {
        weight += weights[split] * shares[split];
    }
    weight = warpSum(weight);
    float values[2]{};
#pragma unroll 4
    for (int32_t split = group; split < splits; split += kGroups)
    {
        if (weights[split] != 0.0f) // NaN too
        {
            auto const part = *reinterpret_cast<float2 const*>(partials.values + at(split) * kHead + channel);
            values[0] += part.x * shares[split];
            values[1] += part.y * shares[split];
        }
    }
    sums[group][channel] = values[0];
    sums[group][channel + 1] = values[1];
    __syncthreads();
    if (group > 0)
    {
        return;
    }
#pragma unroll
    for (int32_t other = 1; other < kGroups; ++other)
    {
        values[0] += sums[other][channel];
        values[1] += sums[other][channel + 1];
    }
    auto const head = static_cast<int32_t>(keyHead % call.keyValueHeads);
    float const factor = valueScale(call, head) / weight;
    call.write(outputOf(call, keyHead / call.keyValueHeads, head, row) + channel, values[0] * factor, values[1] * factor);
}

} // namespace attention
} // namespace qwenforge
