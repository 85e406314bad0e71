// What a warp does with the keys and values of a *stage* in shared memory: scores of 16 or 32 group rows (launch.h), softmax
// as it goes, and the weighted sum; the kernels of split.cuh and tiled.cuh differ in who owns which keys.
//
// A warp owns kTiles tiles of 16 group rows, the rows of mma.m16n8k16's C: with g = lane / 4 and t = lane % 4, a lane holds
// of each tile the rows g and g + 8. Scores have keys as columns, and those fragments C are, rounded, the fragments A of
// the second product, whose columns are channels.
//
// 16-bit caches are read by ldmatrix, keys as they lie and values transposed. An 8-bit cache has no such instruction;
// what stands in for it is a choice of which channel is which column:
//
//     scores   a lane reads 16 channels of key g at once, 16 t .. 16 t + 15 of each 64. The four products with them take
//              4 s .. 4 s + 3 of those 16 for columns 2t, 2t + 1, 2t + 8, 2t + 9: the same of the queries, which is
//              a sum in another order.
//     values   a lane reads 8 channels at once of each of the keys 2t, 2t + 1, 2t + 8, 2t + 9, 8 g .. 8 g + 7 of each 64. Of
//              those 64, column g of tile n is channel 8 g + n; channelOf() says so where sums are written.
//
// Keys behind the last one are filled with zeros and never read. A key that a row does not see has the weight 0, but 0 times
// NaN is NaN: see addValues.

#pragma once

#include "attention/cache.cuh"
#include "common/mma.cuh"

#include <type_traits>

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

// Two of the 8-bit elements of `word`, 0 and 1 or (kHigh) 2 and 3, as fp16.
template <bool kHigh>
__device__ __forceinline__ uint32_t widenTwo(uint32_t word, int8_t)
{
    // 1024 + (element + 128), minus 1152.
    uint32_t const pair = __byte_perm(word ^ 0x80808080u, 0x64646464u, kHigh ? 0x4342u : 0x4140u);
    __half2 const result
        = __hsub2(reinterpret_cast<__half2 const&>(pair), __halves2half2(__float2half(1152.0f), __float2half(1152.0f)));
    return reinterpret_cast<uint32_t const&>(result);
}

template <bool kHigh>
__device__ __forceinline__ uint32_t widenTwo(uint32_t word, __nv_fp8_e4m3)
{
    auto const both = static_cast<__nv_fp8x2_storage_t>(kHigh ? word >> 16 : word & 0xffffu);
    __half2_raw const result = __nv_cvt_fp8x2_to_halfraw2(both, __NV_E4M3);
    return static_cast<uint32_t>(result.y) << 16 | result.x;
}

// Element `index` of each of two words, as fp16.
__device__ __forceinline__ uint32_t widenAcross(uint32_t low, uint32_t high, uint32_t index, int8_t)
{
    uint32_t const pair = __byte_perm(low, high, index * 0x11u | (index + 4u) * 0x1100u);
    uint32_t const biased = (pair & 0x00ff00ffu) ^ 0x64806480u;
    __half2 const result
        = __hsub2(reinterpret_cast<__half2 const&>(biased), __halves2half2(__float2half(1152.0f), __float2half(1152.0f)));
    return reinterpret_cast<uint32_t const&>(result);
}

__device__ __forceinline__ uint32_t widenAcross(uint32_t low, uint32_t high, uint32_t index, __nv_fp8_e4m3 type)
{
    return widenTwo<false>(__byte_perm(low, high, index | (index + 4u) << 4), type);
}

// scores += queries * keys, of the warp's rows in `queries` (its first row's address) and all keys of a stage.
template <typename L>
__device__ __forceinline__ void multiplyKeys(unsigned char const* queries, unsigned char const* keys, Scores<L>& scores)
{
    int32_t const lane = recomputed(static_cast<int32_t>(threadIdx.x) % kWarpSize);
    if constexpr (!L::kIsByte)
    {
#pragma unroll
        for (int32_t step = 0; step < L::kQueryChunks / 2; ++step) // of 16 channels
        {
            FragmentA a[L::kTiles];
#pragma unroll
            for (int32_t tile = 0; tile < L::kTiles; ++tile)
            {
                loadMatrices(a[tile].registers,
                    queries + queryOffset<L>(tile * kTileRows + lane % 16, 2 * step + lane / 16));
            }
#pragma unroll
            for (int32_t n = 0; n < L::kKeys / 8; n += 2)
            {
                uint32_t b[4];
                int32_t const key = 8 * n + lane / 16 * 8 + lane % 8;
                loadMatrices(b, keys + offsetOf<L>(key, 2 * step + lane / 8 % 2, /*isValue=*/false));
#pragma unroll
                for (int32_t tile = 0; tile < L::kTiles; ++tile)
                {
                    multiplyAdd<typename L::Operand>(scores[tile][n], a[tile], {b[0], b[1]});
                    multiplyAdd<typename L::Operand>(scores[tile][n + 1], a[tile], {b[2], b[3]});
                }
            }
        }
    }
    else
    {
#pragma unroll
        for (int32_t step = 0; step < L::kQueryChunks / 4; ++step) // of a lane's 8 channels of 64, two products
        {
            int32_t const own = recomputed(lane);
            uint4 rows[L::kTiles][2]; // g and g + 8
#pragma unroll
            for (int32_t i = 0; i < 2 * L::kTiles; ++i)
            {
                rows[i / 2][i % 2] = *reinterpret_cast<uint4 const*>(queries
                    + queryOffset<L>(i / 2 * kTileRows + i % 2 * 8 + own / 4, step / 2 * 8 + 2 * (own % 4) + step % 2));
            }
#pragma unroll
            for (int32_t n = 0; n < L::kKeys / 8; ++n)
            {
                uint2 const key = *reinterpret_cast<uint2 const*>(keys
                    + offsetOf<L>(8 * n + own / 4, step / 2 * 4 + own % 4, /*isValue=*/false) + step % 2 * 8);
                FragmentB const first{
                    {widenTwo<false>(key.x, typename L::Element{}), widenTwo<true>(key.x, typename L::Element{})}};
                FragmentB const second{
                    {widenTwo<false>(key.y, typename L::Element{}), widenTwo<true>(key.y, typename L::Element{})}};
#pragma unroll
                for (int32_t tile = 0; tile < L::kTiles; ++tile)
                {
                    uint4 const& top = rows[tile][0];
                    uint4 const& bottom = rows[tile][1];
                    multiplyAdd<__half>(scores[tile][n], {{top.x, bottom.x, top.y, bottom.y}}, first);
                    multiplyAdd<__half>(scores[tile][n], {{top.z, bottom.z, top.w, bottom.w}}, second);
                }
            }
        }
    }
}

// Turns the scores of the keys from `firstKey` on into weights, exp2(score - maximum), and rescales what was summed up
// under a smaller maximum. `factor` is the scale of the attention times log2(e).
template <typename L>
__device__ __forceinline__ void weigh(
    Scores<L>& scores, Sums<L>& sums, Sight<L> const& sight, int32_t firstKey, float factor)
{
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    bool const seenByAll = sight.isSeenByAll(firstKey, L::kKeys);
#pragma unroll
    for (int32_t i = 0; i < 2 * L::kTiles; ++i)
    {
        int32_t const tile = i / 2;
        int32_t const half = i % 2;
        float maximum = sums.maximum[tile][half];
#pragma unroll
        for (int32_t n = 0; n < 2 * (L::kKeys / 8); ++n)
        {
            float& score = scores[tile][n / 2][2 * half + n % 2];
            int32_t const key = firstKey + 8 * (n / 2) + 2 * (lane % 4) + n % 2;
            score = seenByAll || sight.sees(tile, half, key) ? score * factor : -INFINITY;
            maximum = fmaxf(maximum, score); // of a number and NaN it is the number; the weight will be NaN
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 2));
        float const base = baseOf(maximum);
        float const kept = exp2f(sums.maximum[tile][half] - base);
        sums.maximum[tile][half] = maximum;
        float weight = sums.weight[tile][half] * kept;
#pragma unroll
        for (int32_t n = 0; n < 2 * (L::kKeys / 8); ++n)
        {
            float& score = scores[tile][n / 2][2 * half + n % 2];
            score = exp2f(score - base);
            weight += score;
        }
        sums.weight[tile][half] = weight;
#pragma unroll
        for (int32_t n = 0; n < L::kColumns; ++n)
        {
            sums.values[tile][n][2 * half] *= kept;
            sums.values[tile][n][2 * half + 1] *= kept;
        }
    }
}

// The values of 16 keys of a stage, as fragments B of channels 16 n .. 16 n + 15 (or as channelOf has it), n = 0, 1, ...
template <typename L>
struct ValueFragments
{
    unsigned char const* stage;
    int32_t firstKey; // within the stage
    int32_t lane;
    uint32_t words[4][2]; // of 8-bit values: of four keys, the lane's 8 channels of 64

    __device__ __forceinline__ ValueFragments(unsigned char const* values, int32_t key)
        : stage(values)
        , firstKey(key)
        , lane(recomputed(static_cast<int32_t>(threadIdx.x) % kWarpSize))
    {
    }

    __device__ __forceinline__ void get(int32_t n, FragmentB (&fragments)[2])
    {
        if constexpr (L::kIsByte)
        {
            if (n % 4 == 0)
            {
                load(n / 4);
            }
#pragma unroll
            for (int32_t i = 0; i < 2; ++i)
            {
                int32_t const word = n % 4 / 2;
                auto const index = static_cast<uint32_t>(n % 2 * 2 + i);
                fragments[i].registers[0]
                    = widenAcross(words[0][word], words[1][word], index, typename L::Element{});
                fragments[i].registers[1]
                    = widenAcross(words[2][word], words[3][word], index, typename L::Element{});
            }
        }
        else
        {
            uint32_t all[4];
            loadTransposed(all, stage + offsetOf<L>(firstKey + lane % 16, 2 * n + lane / 16, /*isValue=*/true));
            fragments[0] = {{all[0], all[1]}};
            fragments[1] = {{all[2], all[3]}};
        }
    }

private:
    __device__ __forceinline__ void load(int32_t block)
    {
        int32_t const own = recomputed(lane);
        int32_t const byte = 64 * block + 8 * (own / 4);
#pragma unroll
        for (int32_t i = 0; i < 4; ++i)
        {
            int32_t const row = firstKey + 2 * (own % 4) + i % 2 + i / 2 * 8;
            uint2 const both = *reinterpret_cast<uint2 const*>(
                stage + offsetOf<L>(row, byte / kChunkBytes, /*isValue=*/true) + byte % kChunkBytes);
            words[i][0] = both.x;
            words[i][1] = both.y;
        }
    }
};

__device__ __forceinline__ uint32_t packTwo(float low, float high, __half)
{
    __half2 const pair = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
}

__device__ __forceinline__ uint32_t packTwo(float low, float high, __nv_bfloat16)
{
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
}

// Takes the elements out of `pair` that are NaN or infinite; returns a 1 in the place of each of them, and else 0.
template <typename Operand>
__device__ __forceinline__ uint32_t takeNonFinite(uint32_t& pair)
{
    constexpr uint32_t kExponent = std::is_same_v<Operand, __half> ? 0x7c00u : 0x7f80u;
    constexpr uint32_t kOne = std::is_same_v<Operand, __half> ? 0x3c00u : 0x3f80u;
    bool const low = (pair & kExponent) == kExponent;
    bool const high = (pair >> 16 & kExponent) == kExponent;
    pair &= (low ? 0u : 0xffffu) | (high ? 0u : 0xffff0000u);
    return (low ? kOne : 0u) | (high ? kOne << 16 : 0u);
}

// The fragment A of a tile's rows and the 16 keys from `firstKey` on.
template <typename L>
__device__ __forceinline__ FragmentA onesWhereSeen(Sight<L> const& sight, int32_t tile, int32_t firstKey)
{
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    FragmentA seen;
#pragma unroll
    for (int32_t i = 0; i < 4; ++i)
    {
        int32_t const key = firstKey + i / 2 * 8 + 2 * (lane % 4);
        seen.registers[i] = packTwo(sight.sees(tile, i % 2, key) ? 1.0f : 0.0f,
            sight.sees(tile, i % 2, key + 1) ? 1.0f : 0.0f, typename L::Operand{});
    }
    return seen;
}

// sums += weights * values of a stage whose keys are those from `firstKey` on.
//
// Where some rows see a key and others do not, the latter's weight is 0, but what 0 is multiplied with may be NaN or
// infinite. Such elements are then taken out, and a second product, of ones where a row sees a key with ones where an
// element was taken out, tells which sums become NaN.
template <typename L>
__device__ __forceinline__ void addValues(
    Scores<L> const& weights, unsigned char const* values, Sums<L>& sums, Sight<L> const& sight, int32_t firstKey)
{
    using Operand = typename L::Operand;
#pragma unroll
    for (int32_t step = 0; step < L::kKeys / 16; ++step) // of 16 keys
    {
        bool const seenByAll = sight.isSeenByAll(firstKey + 16 * step, 16);
        FragmentA a[L::kTiles];
#pragma unroll
        for (int32_t i = 0; i < 4 * L::kTiles; ++i)
        {
            int32_t const tile = i / 4;
            int32_t const half = i % 2; // register i % 4 holds row g or g + 8, of the first or the last 8 keys
            float const* const pair = &weights[tile][2 * step + i / 2 % 2][2 * half];
            a[tile].registers[i % 4] = packTwo(pair[0], pair[1], Operand{});
        }
        ValueFragments<L> fragments(values, 16 * step);
#pragma unroll
        for (int32_t n = 0; n < L::kColumns / 2; ++n)
        {
            FragmentB b[2];
            fragments.get(n, b);
            if (!seenByAll)
            {
                FragmentB taken[2];
#pragma unroll
                for (int32_t i = 0; i < 4; ++i)
                {
                    taken[i / 2].registers[i % 2] = takeNonFinite<Operand>(b[i / 2].registers[i % 2]);
                }
                bool const any = (taken[0].registers[0] | taken[0].registers[1] | taken[1].registers[0]
                                     | taken[1].registers[1])
                    != 0;
                if (__ballot_sync(kAllLanes, any) != 0)
                {
#pragma unroll
                    for (int32_t i = 0; i < 2 * L::kTiles; ++i)
                    {
                        float counts[4]{};
                        multiplyAdd<Operand>(counts, onesWhereSeen(sight, i / 2, firstKey + 16 * step), taken[i % 2]);
#pragma unroll
                        for (int32_t j = 0; j < 4; ++j)
                        {
                            float& sum = sums.values[i / 2][2 * n + i % 2][j];
                            sum = counts[j] > 0.0f ? NAN : sum;
                        }
                    }
                }
            }
#pragma unroll
            for (int32_t tile = 0; tile < L::kTiles; ++tile)
            {
                multiplyAdd<Operand>(sums.values[tile][2 * n], a[tile], b[0]);
                multiplyAdd<Operand>(sums.values[tile][2 * n + 1], a[tile], b[1]);
            }
        }
    }
}

// Who shares a ring of stages: the threads of a warp, or of a block of kThreads.
template <int32_t kThreads>
__device__ __forceinline__ void synchronize()
{
    if constexpr (kThreads == kWarpSize)
    {
        __syncwarp();
    }
    else
    {
        __syncthreads();
    }
}

// The keys of one key and value head of one row of the batch that somebody goes through: `count` stages of them, of the keys
// first, first + stride, ...; none is read from `end` on.
struct Keys
{
    int64_t batchRow;
    int32_t head;
    int32_t first;
    int32_t stride;
    int32_t end;

    __device__ __forceinline__ int32_t count() const
    {
        return first < end ? (end - first + stride - 1) / stride : 0;
    }
};

// Asks for the keys or values of a stage; `thread` is one of kThreads that share the work.
template <typename L, int32_t kThreads>
__device__ __forceinline__ void fillStage(Call<L::kType, typename L::T> const& call, Keys const& keys, int32_t firstKey,
    bool isValue, int32_t thread, unsigned char* stage)
{
    auto const* const cache = reinterpret_cast<unsigned char const*>(isValue ? call.valueCache : call.keyCache);
    constexpr int32_t kCopies = L::kKeys * L::kChunks / kThreads;
    static_assert(L::kKeys * L::kChunks % kThreads == 0, "every thread makes the same number of copies");
    int32_t const own = recomputed(thread);
#pragma unroll
    for (int32_t i = 0; i < kCopies; ++i)
    {
        int32_t const row = (own + i * kThreads) / L::kChunks;
        int32_t const chunk = (own + i * kThreads) % L::kChunks;
        int64_t const key = firstKey + row;
        int64_t const page = key < keys.end ? call.places.page(keys.batchRow, key) : -1;
        int64_t const vector = page < 0 ? 0 : call.places.vector(page, keys.head, call.keyValueHeads, key);
        copyAsync16(stage + offsetOf<L>(row, chunk, isValue), cache + (vector * L::kChunks + chunk) * kChunkBytes,
            page >= 0);
    }
}

// Goes through `keys`, by way of a ring of kStages stages that keys and values take turns in. kThreads threads share the
// ring and all of them have to call this. A stage is asked for kStages - 1 turns ahead, into the one that everybody has
// finished reading before the synchronization of this turn.
template <typename L, int32_t kStages, int32_t kThreads>
__device__ __forceinline__ void attendKeys(Call<L::kType, typename L::T> const& call, Keys const& keys,
    Sight<L> const& sight, unsigned char const* queries, unsigned char* ring, Sums<L>& sums)
{
    int32_t const thread = static_cast<int32_t>(threadIdx.x) % kThreads;
    int32_t const turns = 2 * keys.count();
    float const factor = call.scale * kLog2E;
    auto const fill = [&](int32_t turn) {
        if (turn < turns)
        {
            fillStage<L, kThreads>(call, keys, keys.first + turn / 2 * keys.stride, turn % 2 == 1, thread,
                ring + turn % kStages * L::kStageBytes);
        }
        commitCopies();
    };
    auto const next = [&](int32_t turn) {
        waitForCopies<kStages - 2>();
        synchronize<kThreads>();
        fill(turn + kStages - 1);
        return ring + turn % kStages * L::kStageBytes;
    };
#pragma unroll
    for (int32_t turn = 0; turn < kStages - 1; ++turn)
    {
        fill(turn);
    }
    for (int32_t turn = 0; turn < turns; turn += 2)
    {
        int32_t const firstKey = keys.first + turn / 2 * keys.stride;
        bool const isSeen = sight.isSeenBySome(firstKey, L::kKeys); // the same for the whole warp
        Scores<L> scores{};
        unsigned char const* const keyStage = next(turn);
        if (isSeen)
        {
            multiplyKeys<L>(queries, keyStage, scores);
            weigh<L>(scores, sums, sight, firstKey, factor);
        }
        unsigned char const* const valueStage = next(turn + 1);
        if (isSeen)
        {
            addValues<L>(scores, valueStage, sums, sight, firstKey);
        }
    }
    waitForCopies<0>();
    sums.finish();
}

// Brings the queries of kRows group rows from firstRow on into shared memory, zeros for those that are not there.
template <typename L, int32_t kRows, int32_t kThreads>
__device__ __forceinline__ void loadQueries(Call<L::kType, typename L::T> const& call, int64_t batchRow, int32_t head,
    int64_t firstRow, int64_t rows, unsigned char* queries)
{
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kRows * L::kQueryChunks; i += kThreads)
    {
        int64_t const row = firstRow + i / L::kQueryChunks;
        int32_t const chunk = i % L::kQueryChunks;
        int64_t const token = batchRow * call.sequence + (row < rows ? row / call.group : 0);
        int64_t const vector = token * call.heads + head * call.group + (row < rows ? row % call.group : 0);
        copyAsync16(queries + queryOffset<L>(i / L::kQueryChunks, chunk),
            reinterpret_cast<unsigned char const*>(call.rotated) + (vector * L::kQueryChunks + chunk) * kChunkBytes,
            row < rows);
    }
    commitCopies();
    waitForCopies<0>();
    __syncthreads();
}

// The first element of the output of a group row.
template <CacheType kType, typename T>
__device__ __forceinline__ int64_t outputOf(Call<kType, T> const& call, int64_t batchRow, int32_t head, int64_t row)
{
    int64_t const token = batchRow * call.sequence + row / call.group;
    return (token * call.heads + head * call.group + row % call.group) * call.headSize;
}

template <CacheType kType, typename T>
__device__ __forceinline__ float valueScale(Call<kType, T> const& call, int32_t head)
{
    return call.valueScales == nullptr ? 1.0f : call.valueScales[head];
}

} // namespace attention
} // namespace qwenforge
