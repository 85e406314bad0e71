// What a warp owns and where it lies: tiles of 16 group rows (launch.h), and a *stage* of keys or values in shared memory.
//
// A warp owns kTiles tiles of rows, the rows of mma.m16n8k16's C: with g = lane / 4 and t = lane % 4, a lane holds of each
// tile the rows g and g + 8. Scores have keys as columns, sums have channels.

#pragma once

#include "attention/cache.cuh"

namespace qwenforge
{
namespace attention
{

constexpr int32_t kChunkBytes = 16;
constexpr int32_t kTileRows = 16;
constexpr float kLog2E = 1.4426950408889634f;

// kKeys is the number of keys of a stage, kTiles of a warp's tiles of rows.
template <CacheType kCacheType, typename Tokens, int32_t kHead, int32_t kKeyCount, int32_t kTileCount>
struct Tiling
{
    static constexpr CacheType kType = kCacheType;
    using T = Tokens;
    using Element = typename CacheFormat<kType, T>::Element;
    using Operand = typename CacheFormat<kType, T>::Operand;
    static constexpr int32_t kSize = kHead;
    static constexpr int32_t kKeys = kKeyCount;
    static constexpr int32_t kTiles = kTileCount;
    static constexpr int32_t kRows = kTiles * kTileRows;
    static constexpr bool kIsByte = sizeof(Element) == 1;
    static constexpr int32_t kChunks = kHead * static_cast<int32_t>(sizeof(Element)) / kChunkBytes;       // of a key
    static constexpr int32_t kQueryChunks = kHead * static_cast<int32_t>(sizeof(Operand)) / kChunkBytes; // of a row
    static constexpr int32_t kStageBytes = kKeys * kChunks * kChunkBytes;
    static constexpr int32_t kColumns = kHead / 8; // tiles of 8 channels
    static_assert(kHead % 64 == 0 && kKeys % 16 == 0, "what the fragments count on");
};

// Chunks of 16 bytes are exchanged within a row, so that no access of a warp meets a bank twice (8-bit values with D = 64:
// twice): ldmatrix takes one chunk of eight rows in a row; a lane's 16 channels of an 8-bit key are one of four chunks of two
// rows in a row; a lane's 8-bit values are half of one of two chunks of every other row.
template <typename L>
__device__ __forceinline__ int32_t offsetOf(int32_t row, int32_t chunk, bool isValue)
{
    int32_t const pattern = !L::kIsByte       ? row % 8
        : isValue                             ? row / 2 % (L::kChunks / 2) * 2
        : L::kChunks == 8                     ? row % 2 * 4
                                              : 0;
    return (row * L::kChunks + (chunk ^ pattern)) * kChunkBytes;
}

template <typename L>
__device__ __forceinline__ int32_t queryOffset(int32_t row, int32_t chunk)
{
    return (row * L::kQueryChunks + (chunk ^ row % 8)) * kChunkBytes;
}

// The channel of column `column` of tile n of the sums.
template <typename L>
__device__ __forceinline__ int32_t channelOf(int32_t n, int32_t column)
{
    return L::kIsByte ? n / 8 * 64 + 8 * column + n % 8 : 8 * n + column;
}

// What the queries of a warp's rows see: the keys up to last, which is -1 where there are none, and of these at most
// `window`. Of a lane, rows g and g + 8 of each tile. The bounds below hold for every row of the warp: keys outside of someFirst .. someLast are seen by nobody,
// those within allFirst .. allLast by everybody.
template <typename L>
struct Sight
{
    int32_t last[L::kTiles][2];
    int32_t window; // at least 1
    int32_t someFirst;
    int32_t someLast;
    int32_t allFirst;
    int32_t allLast;

    // Of the group rows from firstRow on, of which there are `rows` in all.
    __device__ __forceinline__ Sight(
        Call<L::kType, typename L::T> const& call, int64_t batchRow, int64_t firstRow, int64_t rows)
    {
        int64_t const start = call.cachePosition[batchRow];
        int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
        window = call.window > 0 ? call.window : INT32_MAX;
#pragma unroll
        for (int32_t i = 0; i < 2 * L::kTiles; ++i)
        {
            int64_t const row = firstRow + i / 2 * kTileRows + i % 2 * 8 + lane / 4;
            int64_t const place = start + row / call.group;
            bool const sees = row < rows && place >= 0 && place < call.places.capacity;
            last[i / 2][i % 2] = sees ? static_cast<int32_t>(place) : -1;
        }
        int64_t const end = firstRow + L::kRows < rows ? firstRow + L::kRows : rows;
        int64_t const lowest = start + firstRow / call.group;
        int64_t const highest = start + (end - 1) / call.group;
        bool const allSee = lowest >= 0 && highest < call.places.capacity;
        int64_t const from = lowest < 0 ? 0 : lowest;
        int64_t const to = highest < call.places.capacity ? highest : call.places.capacity - 1;
        bool const someSee = firstRow < rows && from <= to;
        someFirst = someSee ? static_cast<int32_t>(call.firstSeen(from)) : 0;
        someLast = someSee ? static_cast<int32_t>(to) : -1;
        allFirst = someSee ? static_cast<int32_t>(call.firstSeen(to)) : 0;
        allLast = someSee && allSee ? static_cast<int32_t>(lowest) : -1;
    }

    __device__ __forceinline__ bool sees(int32_t tile, int32_t half, int32_t key) const
    {
        int32_t const behind = last[tile][half] - key;
        return behind >= 0 && behind < window;
    }
    // Of the keys from `key` on.
    __device__ __forceinline__ bool isSeenBySome(int32_t key, int32_t count) const
    {
        return key <= someLast && key + count > someFirst;
    }
    __device__ __forceinline__ bool isSeenByAll(int32_t key, int32_t count) const
    {
        return key >= allFirst && key + count - 1 <= allLast;
    }
};

// What a warp has summed up so far, of a lane's rows: [tile][row g or g + 8], and fragments C.
template <typename L>
struct Sums
{
    float maximum[L::kTiles][2]; // of the scores, times log2(e)
    float weight[L::kTiles][2];  // of the lane's keys alone, until finish()
    float values[L::kTiles][L::kColumns][4];

    __device__ __forceinline__ Sums()
    {
#pragma unroll
        for (int32_t tile = 0; tile < L::kTiles; ++tile)
        {
            maximum[tile][0] = maximum[tile][1] = -INFINITY;
            weight[tile][0] = weight[tile][1] = 0.0f;
#pragma unroll
            for (int32_t n = 0; n < 4 * L::kColumns; ++n)
            {
                values[tile][n / 4][n % 4] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ void finish()
    {
#pragma unroll
        for (int32_t i = 0; i < 2 * L::kTiles; ++i)
        {
            float& sum = weight[i / 2][i % 2];
            sum += __shfl_xor_sync(kAllLanes, sum, 1);
            sum += __shfl_xor_sync(kAllLanes, sum, 2);
        }
    }
};

// What has to be subtracted from scores whose maximum this is; while nothing but -inf was seen, nothing.
__device__ __forceinline__ float baseOf(float maximum)
{
    return maximum == -INFINITY ? 0.0f : maximum;
}

template <typename L>
using Scores = float[L::kTiles][L::kKeys / 8][4];

} // namespace attention
} // namespace qwenforge
