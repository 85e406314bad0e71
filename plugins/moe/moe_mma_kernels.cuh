// The two products of the experts on matrix instructions; the rest of the chain is moe_kernels.cuh's.
//
// Operands are swapped: weight rows are the 16 rows of an instruction and tokens its 8 columns, so that a few tokens do not
// leave most of it idle, and so that one thread holds gate and up of the same channel (rows g and g + 8 of a packed group
// of 16) and the activation needs no exchange.
//
// A block of 8 warps computes 128 weight rows by kTokens positions of one expert; warp w owns the rows 16w .. 16w + 15 and
// all positions. Columns are taken 32 at a time through three stages of shared memory, filled by asynchronous copies two
// steps ahead. A stage holds 128 weight rows and then kTokens input rows, each 32 elements and a padding of 8: rows are 80
// bytes apart, so that the eight rows of an 8 x 8 matrix lie in different banks. Rows and columns behind the operands'
// ends are filled with zeros and never read. One barrier a step is enough: a thread fills the stage that everybody finished
// reading before that barrier.

#pragma once

#include "common/mma.cuh"
#include "moe/moe_kernels.cuh"

namespace qwenforge
{
namespace moe
{

constexpr int32_t kMmaWarps = 8;
constexpr int32_t kMmaThreads = kMmaWarps * kWarpSize;
constexpr int32_t kMmaRows = 16 * kMmaWarps;
constexpr int32_t kMmaDepth = 32;
constexpr int32_t kMmaStride = kMmaDepth + 8;
constexpr int32_t kMmaStages = 3;
constexpr int32_t kFewTokens = 16;  // positions of a tile when experts have few
constexpr int32_t kManyTokens = 64; // and when they have many

template <typename T, int32_t kTokens>
struct MmaMemory
{
    alignas(16) T rows[kMmaStages][kMmaRows + kTokens][kMmaStride];
};

// The sums of a warp: of each 8 positions, the fragment C.
template <int32_t kTokens>
using Sums = float[kTokens / 8][4];

// sums += weights (kMmaRows rows) * inputs (kTokens rows), both `depth` columns wide, a multiple of 8. inputAt(row) is
// where an input row begins.
template <typename T, int32_t kTokens, typename InputAt>
__device__ __forceinline__ void multiplyRows(MmaMemory<T, kTokens>& memory, InputAt inputAt, int32_t validInputs,
    T const* weights, int32_t validRows, int32_t depth, Sums<kTokens>& sums)
{
    constexpr int32_t kEights = kMmaDepth / 8;
    constexpr int32_t kRows = kMmaRows + kTokens;
    constexpr int32_t kCopies = (kRows * kEights + kMmaThreads - 1) / kMmaThreads;
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    int32_t const lane = thread % kWarpSize;
    int32_t const warp = thread / kWarpSize;

    // Thread i copies the eights i, i + 256, ...: which row each belongs to, and where it begins, stays the same.
    T const* sources[kCopies];
    bool valid[kCopies];
#pragma unroll
    for (int32_t i = 0; i < kCopies; ++i)
    {
        int32_t const row = (thread + i * kMmaThreads) / kEights;
        bool const isWeight = row < kMmaRows;
        valid[i] = isWeight ? row < validRows : row - kMmaRows < validInputs;
        sources[i] = !valid[i] ? weights
            : isWeight         ? weights + static_cast<int64_t>(row) * depth
                               : inputAt(row - kMmaRows);
    }
    int32_t const column = thread % kEights * 8; // of every eight of this thread: 256 is a multiple of kEights
    auto const fill = [&](int32_t step) {
        int32_t const start = step * kMmaDepth + column;
#pragma unroll
        for (int32_t i = 0; i < kCopies; ++i)
        {
            int32_t const row = (thread + i * kMmaThreads) / kEights;
            bool const inside = valid[i] && start < depth;
            if (row < kRows)
            {
                copyAsync16(
                    &memory.rows[step % kMmaStages][row][column], inside ? sources[i] + start : weights, inside);
            }
        }
    };

#pragma unroll
    for (int32_t tile = 0; tile < kTokens / 8; ++tile)
    {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i)
        {
            sums[tile][i] = 0.0f;
        }
    }
    int32_t const steps = (depth + kMmaDepth - 1) / kMmaDepth;
#pragma unroll
    for (int32_t step = 0; step < kMmaStages - 1; ++step)
    {
        if (step < steps)
        {
            fill(step);
        }
        commitCopies();
    }
    for (int32_t step = 0; step < steps; ++step)
    {
        waitForCopies<kMmaStages - 2>();
        __syncthreads();
        if (step + kMmaStages - 1 < steps)
        {
            fill(step + kMmaStages - 1);
        }
        commitCopies();
        auto const& stage = memory.rows[step % kMmaStages];
#pragma unroll
        for (int32_t k = 0; k < kMmaDepth; k += 16)
        {
            FragmentA a;
            loadMatrices(a.registers, &stage[16 * warp + lane % 16][k + lane / 16 * 8]);
#pragma unroll
            for (int32_t tile = 0; tile < kTokens / 8; tile += 2)
            {
                uint32_t two[4]; // B of two tiles of 8 positions
                int32_t const row = kMmaRows + 8 * tile + lane / 16 * 8 + lane % 8;
                loadMatrices(two, &stage[row][k + lane / 8 % 2 * 8]);
                multiplyAdd<T>(sums[tile], a, {two[0], two[1]});
                multiplyAdd<T>(sums[tile + 1], a, {two[2], two[3]});
            }
        }
    }
}

// 64 channels of the hidden activation for one tile of positions.
template <typename T, int32_t kTokens>
__global__ void __launch_bounds__(kMmaThreads) projectUpMma(Routing routing, T const* hiddenStates, T const* gateUpWeights,
    int32_t hiddenSize, int32_t intermediateSize, T* hidden)
{
    QWENFORGE_SHARED(found, Tile);
    QWENFORGE_SHARED(memory, MmaMemory<T, kTokens>);
    Tile const tile = findTile(routing, found, kTokens);
    if (tile.expert < 0)
    {
        return;
    }
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int32_t const warp = static_cast<int32_t>(threadIdx.x) / kWarpSize;
    int32_t const firstChannel = static_cast<int32_t>(blockIdx.y) * kMmaRows / 2;
    int64_t const firstRow = static_cast<int64_t>(tile.expert) * 2 * intermediateSize + 2 * firstChannel;
    Sums<kTokens> sums;
    auto const inputAt = [=](int32_t row) {
        int32_t const token = routing.pairAt[tile.first + row] / routing.slots;
        return hiddenStates + static_cast<int64_t>(token) * hiddenSize;
    };
    multiplyRows<T, kTokens>(memory, inputAt, tile.pairs, gateUpWeights + firstRow * hiddenSize,
        2 * (intermediateSize - firstChannel), hiddenSize, sums);
    int32_t const channel = firstChannel + 8 * warp + lane / 4;
#pragma unroll
    for (int32_t i = 0; i < kTokens / 8; ++i)
    {
#pragma unroll
        for (int32_t side = 0; side < 2; ++side)
        {
            int32_t const row = 8 * i + lane % 4 * 2 + side;
            if (row < tile.pairs && channel < intermediateSize)
            {
                float const gate = sums[i][side];
                float const active = gate / (1.0f + expf(-gate));
                int64_t const position = tile.first + row;
                hidden[position * intermediateSize + channel] = fromFloat<T>(active * sums[i][side + 2]);
            }
        }
    }
}

// 128 output channels for one tile of positions.
template <typename T, int32_t kTokens>
__global__ void __launch_bounds__(kMmaThreads) projectDownMma(Routing routing, T const* hidden, T const* downWeights,
    int32_t hiddenSize, int32_t intermediateSize, float* partial)
{
    QWENFORGE_SHARED(found, Tile);
    QWENFORGE_SHARED(memory, MmaMemory<T, kTokens>);
    Tile const tile = findTile(routing, found, kTokens);
    if (tile.expert < 0)
    {
        return;
    }
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int32_t const warp = static_cast<int32_t>(threadIdx.x) / kWarpSize;
    int32_t const firstChannel = static_cast<int32_t>(blockIdx.y) * kMmaRows;
    int64_t const firstRow = static_cast<int64_t>(tile.expert) * hiddenSize + firstChannel;
    Sums<kTokens> sums;
    auto const inputAt
        = [=](int32_t row) { return hidden + static_cast<int64_t>(tile.first + row) * intermediateSize; };
    multiplyRows<T, kTokens>(memory, inputAt, tile.pairs, downWeights + firstRow * intermediateSize,
        hiddenSize - firstChannel, intermediateSize, sums);
#pragma unroll
    for (int32_t i = 0; i < kTokens / 8; ++i)
    {
#pragma unroll
        for (int32_t part = 0; part < 4; ++part)
        {
            int32_t const row = 8 * i + lane % 4 * 2 + part % 2;
            int32_t const channel = firstChannel + 16 * warp + lane / 4 + part / 2 * 8;
            if (row < tile.pairs && channel < hiddenSize)
            {
                partial[static_cast<int64_t>(tile.first + row) * hiddenSize + channel] = sums[i][part];
            }
        }
    }
}

} // namespace moe
} // namespace qwenforge
