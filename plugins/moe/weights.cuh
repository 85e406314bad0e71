// How weights come into matrix instructions: for each way of storing them, one *step* of columns and the fragments in it.
//
// A step is 64 or 128 bytes of an input row, in chunks of 16 bytes; the same columns of a weight row are 64 or 32 bytes:
//
//                          columns   weight row   input row   instructions of a step
//     as the tokens             32     64 bytes    64 bytes   2 of 16 columns
//     INT8                      32     32 bytes    64 bytes   2 of 16 columns
//     INT4                      64     32 bytes   128 bytes   4 of 16 columns
//     FP8 (inputs too)          64     64 bytes    64 bytes   2 of 32 columns
//
// Packed integers lie so that ldmatrix, which deals out 4 bytes of each row of 16, gives lane t = lane % 4 the columns that
// the instruction wants of it, 2t, 2t + 1, 2t + 8 and 2t + 9 of 16:
//
//     INT8   of each 16 columns, bytes 4t .. 4t + 3 are those four columns, each plus 128
//     INT4   of each 32 columns, bytes 4t .. 4t + 3 are a word whose nibbles p and p + 4 are the pair p: of the first 16
//            columns 2t and 2t + 1 (pair 0), 2t + 8 and 2t + 9 (pair 1), of the second 16 the same (2, 3), each plus 8
//
// An integer becomes a floating-point number by being put into the significand of a power of two, 1024 in fp16 and 128 in
// bf16, which is then subtracted: exact.

#pragma once

#include "common/mma.cuh"
#include "moe/moe.h"

namespace qwenforge
{
namespace moe
{

__device__ __forceinline__ uint32_t subtractPairs(uint32_t left, uint32_t right, __half)
{
    __half2 const difference
        = __hsub2(reinterpret_cast<__half2 const&>(left), reinterpret_cast<__half2 const&>(right));
    return reinterpret_cast<uint32_t const&>(difference);
}

__device__ __forceinline__ uint32_t subtractPairs(uint32_t left, uint32_t right, __nv_bfloat16)
{
    __nv_bfloat162 const difference
        = __hsub2(reinterpret_cast<__nv_bfloat162 const&>(left), reinterpret_cast<__nv_bfloat162 const&>(right));
    return reinterpret_cast<uint32_t const&>(difference);
}

// Bytes 0 and 1 (kFirst) or 2 and 3 of `packed`, each minus 128, as two elements.
template <bool kFirst>
__device__ __forceinline__ uint32_t widenBytes(uint32_t packed, __half type)
{
    uint32_t const pair = __byte_perm(packed, 0x64646464u, kFirst ? 0x4140u : 0x4342u); // 1024 + byte
    return subtractPairs(pair, 0x64806480u, type);                                       // 1152
}

// bf16 has room for 7 of the 8 bits behind 128: the eighth goes into what is subtracted, 256 without it and 128 with it.
template <bool kFirst>
__device__ __forceinline__ uint32_t widenBytes(uint32_t packed, __nv_bfloat16 type)
{
    uint32_t const pair = __byte_perm(packed, 0u, kFirst ? 0x4140u : 0x4342u);
    return subtractPairs((pair & 0x007f007fu) | 0x43004300u, (pair & 0x00800080u) ^ 0x43804380u, type);
}

// Nibbles p and p + 4 of `packed`, each minus 8, as two elements.
__device__ __forceinline__ uint32_t widenNibbles(uint32_t packed, int32_t p, __half type)
{
    return subtractPairs((packed >> 4 * p & 0x000f000fu) | 0x64006400u, 0x64086408u, type);
}

__device__ __forceinline__ uint32_t widenNibbles(uint32_t packed, int32_t p, __nv_bfloat16 type)
{
    return subtractPairs((packed >> 4 * p & 0x000f000fu) | 0x43004300u, 0x43084308u, type);
}

// Chunk number `chunk` of a row of kChunks of them lies here, so that the same chunk of eight rows in a row lies in eight
// different places of 128 bytes and ldmatrix meets no bank twice.
template <int32_t kChunks>
__device__ __forceinline__ int32_t placeOf(int32_t row, int32_t chunk)
{
    constexpr int32_t kRowsOf128 = 8 / kChunks;
    return chunk ^ (row / kRowsOf128 % kChunks);
}

constexpr int32_t kChunkBytes = 16;

// Positions of a tile of the wide kernels: what fits a thread's 128 registers.
constexpr int32_t wideTokens(WeightType type)
{
    return type == WeightType::kInt4 || type == WeightType::kFloat8 ? 48 : 64;
}

// T is the type of the tokens. A format has
//     Input                       type of the inputs
//     kColumns                    of a step
//     kWeightChunks, kInputChunks chunks of a row of a step
//     kScaledSteps                whether every step has scales of its own, of type T
//     kScaledRows                 whether a row has one scale, fp32
//     Fragments                   what a warp holds of its 16 rows: load(rows, firstRow), then get(k) for instruction k
template <WeightType kType, typename T>
struct Format;

// 16 rows of a step whose weight rows are as wide as the input rows.
struct WideFragments
{
    uint32_t registers[2][4];

    template <typename Rows>
    __device__ __forceinline__ void load(Rows const& rows, int32_t firstRow)
    {
        int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
        int32_t const row = firstRow + lane % 16;
#pragma unroll
        for (int32_t k = 0; k < 2; ++k)
        {
            loadMatrices(registers[k], rows[row][placeOf<4>(row, 2 * k + lane / 16)]);
        }
    }
    __device__ __forceinline__ FragmentA get(int32_t k) const
    {
        return {{registers[k][0], registers[k][1], registers[k][2], registers[k][3]}};
    }
};

// 16 rows of 32 bytes: registers 0 and 1 are the first chunk of rows g and g + 8, 2 and 3 the second.
struct NarrowRegisters
{
    uint32_t registers[4];

    template <typename Rows>
    __device__ __forceinline__ void load(Rows const& rows, int32_t firstRow)
    {
        int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
        int32_t const row = firstRow + lane % 16;
        loadMatrices(registers, rows[row][placeOf<2>(row, lane / 16)]);
    }
};

template <typename T>
struct ByteFragments : NarrowRegisters
{
    __device__ __forceinline__ FragmentA get(int32_t k) const
    {
        uint32_t const top = registers[2 * k];
        uint32_t const bottom = registers[2 * k + 1];
        return {{widenBytes<true>(top, T{}), widenBytes<true>(bottom, T{}), widenBytes<false>(top, T{}),
            widenBytes<false>(bottom, T{})}};
    }
};

template <typename T>
struct NibbleFragments : NarrowRegisters
{
    __device__ __forceinline__ FragmentA get(int32_t k) const
    {
        uint32_t const top = registers[k / 2 * 2];
        uint32_t const bottom = registers[k / 2 * 2 + 1];
        int32_t const pair = k % 2 * 2;
        return {{widenNibbles(top, pair, T{}), widenNibbles(bottom, pair, T{}), widenNibbles(top, pair + 1, T{}),
            widenNibbles(bottom, pair + 1, T{})}};
    }
};

template <typename T>
struct Format<WeightType::kFloat, T>
{
    using Input = T;
    using Fragments = WideFragments;
    static constexpr int32_t kColumns = 32;
    static constexpr int32_t kWeightChunks = 4;
    static constexpr int32_t kInputChunks = 4;
    static constexpr bool kScaledSteps = false;
    static constexpr bool kScaledRows = false;
};

template <typename T>
struct Format<WeightType::kInt8, T>
{
    using Input = T;
    using Fragments = ByteFragments<T>;
    static constexpr int32_t kColumns = 32;
    static constexpr int32_t kWeightChunks = 2;
    static constexpr int32_t kInputChunks = 4;
    static constexpr bool kScaledSteps = false;
    static constexpr bool kScaledRows = true;
};

template <typename T>
struct Format<WeightType::kInt4, T>
{
    using Input = T;
    using Fragments = NibbleFragments<T>;
    static constexpr int32_t kColumns = 64;
    static constexpr int32_t kWeightChunks = 2;
    static constexpr int32_t kInputChunks = 8;
    static constexpr bool kScaledSteps = true;
    static constexpr bool kScaledRows = false;
};

template <typename T>
struct Format<WeightType::kFloat8, T>
{
    using Input = __nv_fp8_e4m3;
    using Fragments = WideFragments;
    static constexpr int32_t kColumns = 64;
    static constexpr int32_t kWeightChunks = 4;
    static constexpr int32_t kInputChunks = 4;
    static constexpr bool kScaledSteps = false;
    static constexpr bool kScaledRows = true;
};

} // namespace moe
} // namespace qwenforge
