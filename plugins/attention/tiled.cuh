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
    auto const block = static_cast<int32_t>(blockIdx.x);
    int32_t const firstRow = (tiles - 1 - block % tiles) * kTiledRows;
    int32_t const head = block / tiles % call.keyValueHeads;
    int32_t const batchRow = block / tiles / call.keyValueHeads;
    auto const rows = static_cast<int32_t>(call.sequence * call.group); // no more than a grid has blocks
    loadQueries<L, kTiledRows, kTiledThreads>(call, batchRow, head, firstRow, rows, memory.queries);

    // The keys that any row of the block sees.
    int64_t const start = call.cachePosition[batchRow];
    int32_t const endRow = firstRow + kTiledRows < rows ? firstRow + kTiledRows : rows;
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
        int32_t const row = firstRow + ownRow + i / 2 * kTileRows + i % 2 * 8 + lane / 4;
        if (row >= rows)
        {
            continue;
        }
        int64_t const output = outputOf(call, batchRow, head, row);
        float const factor = scale / sums.weight[i / 2][i % 2];
        int32_t const element = 2 * (i % 2); // of fragments C
        float const(&values)[L::kColumns][4] = sums.values[i / 2];
#pragma unroll
        for (int32_t n = 0; n < L::kColumns; n += 2)
        {
            // Channels that follow each other are two columns of one tile, or of an 8-bit cache, one column of two.
#pragma unroll
            for (int32_t e = 0; e < 2; ++e)
            {
                int32_t const tile = L::kIsByte ? n : n + e;
                int32_t const column = 2 * (lane % 4) + (L::kIsByte ? e : 0);
                float const low = L::kIsByte ? values[n][element + e] : values[n + e][element];
                float const high = L::kIsByte ? values[n + 1][element + e] : values[n + e][element + 1];
                call.write(output + channelOf<L>(tile, column), low * factor, high * factor);
            }
        }
    }
}

} // namespace attention
} // namespace qwenforge
