// Attention of many queries at once: a prompt, or the next part of one behind a part-filled cache.
//
//   attendTiled   softmax(scale * q k^T) v, of 128 group rows   a block of 4 warps
//
// The queries of all heads of a group are rows of the same tile, so that keys and values are read once for them.

#pragma once

#include "attention/launch.h"
#include "attention/tiles.cuh"

namespace qwenforge
{
namespace attention
{

constexpr int32_t kTiledWarps = 4;
constexpr int32_t kTiledThreads = kTiledWarps * kWarpSize;
constexpr int32_t kTiledStages = 4;
constexpr int32_t kTiledBlocks = 2; // of a multiprocessor, where its shared memory is as large as SM 80's

template <CacheType kType, typename T, int32_t kHead>
using TiledTiling = Tiling<kType, T, kHead, 4096 / kHead, kTiledRows / kTiledWarps / kTileRows>;

// Of a block: its queries, and the ring of stages that all of its warps read.
template <typename L>
struct TiledMemory
{
    alignas(16) unsigned char queries[kTiledRows * L::kQueryChunks * kChunkBytes];
    alignas(16) unsigned char ring[kTiledStages][L::kStageBytes];
};

// Block (b * Hk + h) * tiles + n takes the group rows from 128 * (tiles - 1 - n) on of head h of row b: the last ones, with
// the most keys, first. Warp w owns 32 of them, those from 32 w on, and skips the stages whose keys none of its rows sees.
template <CacheType kType, typename T, int32_t kHead>
__global__ void __launch_bounds__(kTiledThreads, kTiledBlocks) attendTiled(Call<kType, T> call, int32_t tiles)
{
    using L = TiledTiling<kType, T, kHead>;
    auto& memory = *reinterpret_cast<TiledMemory<L>*>(QWENFORGE_DYNAMIC);
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int32_t const ownRow = static_cast<int32_t>(threadIdx.x) / kWarpSize * L::kRows;
    int64_t const block = blockIdx.x;
    int64_t const firstRow = (tiles - 1 - block % tiles) * kTiledRows;
    auto const head = static_cast<int32_t>(block / tiles % call.keyValueHeads);
    int64_t const batchRow = block / tiles / call.keyValueHeads;
    int64_t const rows = call.sequence * call.group;
    loadQueries<L, kTiledRows, kTiledThreads>(call, batchRow, head, firstRow, rows, memory.queries);

    // The keys that any row of the block sees.
    int64_t const start = call.cachePosition[batchRow];
    int64_t const endRow = firstRow + kTiledRows < rows ? firstRow + kTiledRows : rows;
    int64_t const lowest = start + firstRow / call.group;
    int64_t const highest = start + (endRow - 1) / call.group;
    int64_t const last = highest < call.places.capacity ? highest : call.places.capacity - 1;
    auto const first = static_cast<int32_t>(lowest <= last ? call.firstSeen(lowest < 0 ? 0 : lowest) : 0);
    auto const end = static_cast<int32_t>(lowest <= last && last >= 0 ? last + 1 : 0);
    Sight<L> const sight(call, batchRow, firstRow + ownRow, rows);
    Sums<L> sums;
    attendKeys<L, kTiledStages, kTiledThreads>(call, Keys{batchRow, head, first, L::kKeys, end}, sight,
        memory.queries + queryOffset<L>(ownRow, 0), &memory.ring[0][0], sums);

    float const scale = valueScale(call, head);
#pragma unroll
    for (int32_t i = 0; i < 2 * L::kTiles; ++i)
    {
        int64_t const row = firstRow + ownRow + i / 2 * kTileRows + i % 2 * 8 + lane / 4;
        if (row >= rows)
        {
            continue;
        }
        T* const output = outputOf(call, batchRow, head, row);
        float const factor = scale / sums.weight[i / 2][i % 2];
#pragma unroll
        for (int32_t n = 0; n < L::kColumns; ++n)
        {
            // Two channels that follow each other: columns 2t and 2t + 1 of one tile, or 8-bit, column 2t or 2t + 1 of two.
            int32_t const tile = L::kIsByte ? n / 2 * 2 : n;
            int32_t const column = 2 * (lane % 4) + (L::kIsByte ? n % 2 : 0);
            float const* const values = &sums.values[i / 2][0][0];
            int32_t const element = 2 * (i % 2);
            float const low = values[4 * tile + element + (L::kIsByte ? n % 2 : 0)];
            float const high = values[4 * (tile + (L::kIsByte ? 1 : 0)) + element + (L::kIsByte ? n % 2 : 1)];
            *reinterpret_cast<Two<T>*>(output + channelOf<L>(tile, column))
                = Two<T>{{fromFloat<T>(low * factor), fromFloat<T>(high * factor)}};
        }
    }
}

} // namespace attention
} // namespace qwenforge
