// The two products of attention on matrix instructions, of a warp's rows with a stage, and the softmax between them.
//
// The fragments C of the scores are, once they are weights and rounded, the fragments A of the second product. 16-bit caches
// are read by ldmatrix, keys as they lie and values transposed. An 8-bit cache has no such instruction; what stands in for
// it is a choice of which channel is which column:
//
//     scores   a lane reads 16 channels of key g, 16 t .. 16 t + 15 of each 64, eight at a time. The four products with
//              them take 4 s .. 4 s + 3 of those 16 for columns 2t, 2t + 1, 2t + 8, 2t + 9: the same of the queries, which
//              is a sum in another order.
//     values   a lane reads 8 channels at once of each of the keys 2t, 2t + 1, 2t + 8, 2t + 9, 8 g .. 8 g + 7 of each 64. Of
//              those 64, column g of tile n is channel 8 g + n; channelOf() says so where sums are written.
//
// Keys behind the last one are filled with zeros and never read. A key that a row does not see has the weight 0, but 0 times
// NaN is NaN: see addValues.

#pragma once

#include "attention/tiling.cuh"
#include "common/mma.cuh"

#include <type_traits>

namespace qwenforge
{
namespace attention
{

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

} // namespace attention
} // namespace qwenforge
