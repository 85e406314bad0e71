// The two products of the experts, on matrix instructions, for every way of storing weights (weights.cuh).
//
// Operands are swapped: weight rows are the 16 rows of an instruction and tokens its 8 columns, so that a few tokens do not
// leave most of it idle, and so that one thread holds gate and up of the same channel (rows g and g + 8 of a packed group
// of 16) and the activation needs no exchange.
//
// A block of 8 warps works for one tile of at most kTokens positions and, in the *narrow* kernels (8 or 16 positions), for
// 32 weight rows, whose columns are divided into 4 *slices*: warp w owns rows 16 (w % 2) .. + 15 of the block in slice
// w / 2. Many blocks with little to do each keep all of the memory's channels busy when there are few tokens. In the *wide*
// kernels (48 or 64 positions) it works for 128 rows and one slice: warp w owns rows 16 w .. 16 w + 15. Block (x, y) has
// tile x and the y-th 32 or 128 rows; a block whose x is no tile leaves at once.
//
// A lane owns what fragment C gives it (common/mma.cuh): of every 8 positions the positions 2t and 2t + 1 (t = lane % 4) of
// its warp's rows g and g + 8 (g = lane / 4), four sums. Of the slices' warps, those of slice 0 write the results.
//
// Columns are taken a *step* of 32 or 64 at a time (weights.cuh) through kStages stages of shared memory, filled by
// asynchronous copies kStages - 1 steps ahead. Shared memory is kStages times
//
//     weights  [slice] [row of the block] [place] 16 bytes    the step's columns of the block's weight rows
//     inputs   [slice] [position]         [place] 16 bytes    the same columns of the tile's input rows
//     scales   [slice] [row of the block] of type T           INT4 alone: of the group that the step lies in
//
// where a row's 16-byte chunk c lies at place placeOf(row, c), so that ldmatrix meets no bank twice. Thread i makes the
// copies i, i + 256, ... of each of the three. One barrier a step is enough: behind it everybody sees the copies that all
// threads have waited for, and has finished with the stage read in the step before, which is the one that is filled next.
// In the end the slices are added up in their order, by way of the same memory:
//
//     sums     [slice] [warp of a slice] [sum] [lane] fp32
//
// Bounds. A copy asks the step at which its row ends (Source) and, past it, or for rows behind the matrix or positions
// behind the tile, writes zeros without reading; zeros add nothing, also to integers, whose zero point meets inputs of
// zero. A copy never straddles a row's end, because depth is a multiple of 8 elements of 16 bits or of 64 packed ones: whole
// chunks. Slice s has the steps s * steps .. s * steps + steps - 1; those behind the last column are zeros as well. Results
// are written for rows of the matrix and positions of the tile alone.

#pragma once

#include "moe/routing.h"
#include "moe/weights.cuh"

namespace qwenforge
{
namespace moe
{

constexpr int32_t kWarps = 8;
constexpr int32_t kThreads = kWarps * kWarpSize;
constexpr int32_t kMostSharedBytes = 47 * 1024; // a block gets 48 KiB without asking, and two fit SM 86, 89, 120
constexpr int32_t kMostStages = 6; // an estimate, not measured
constexpr int32_t kBlocks = 2; // of a multiprocessor, at the least: 128 registers a thread

// What the kernels of one format T and WeightType need to know about a product.
struct Product
{
    void const* inputs;            // rows of `depth` elements, by token or by position
    unsigned char const* weights;  // [El + Es, rows, bytes of `depth` columns]
    void const* scales;            // [El + Es, groups, rows]
    float const* activationScales; // null, or of the tokens and then of each stored expert
    void* outputs;
    int32_t rows;
    int32_t depth;
    int32_t groupShift; // with scales for steps: a group is 1 << groupShift steps
};

template <typename F, typename T, int32_t kTokens>
struct Layout
{
    static constexpr int32_t kSlices = kTokens <= 16 ? 4 : 1;
    static constexpr int32_t kRowWarps = kWarps / kSlices;
    static constexpr int32_t kRows = 16 * kRowWarps;
    static constexpr int32_t kScaleChunks = F::kScaledSteps ? kRows * static_cast<int32_t>(sizeof(T)) / kChunkBytes : 0;
    // Copies of 16 bytes in a step.
    static constexpr int32_t kWeightCopies = kSlices * kRows * F::kWeightChunks;
    static constexpr int32_t kInputCopies = kSlices * kTokens * F::kInputChunks;
    static constexpr int32_t kScaleCopies = kSlices * kScaleChunks;
    static constexpr int32_t kStageBytes = (kWeightCopies + kInputCopies + kScaleCopies) * kChunkBytes;
    static constexpr int32_t kFitting = kMostSharedBytes / kStageBytes;
    static constexpr int32_t kStages = kFitting < kMostStages ? kFitting : kMostStages;
    static constexpr int32_t kSums = kTokens / 8 * 4; // of a lane
    static_assert(kStages >= 3, "two steps have to be under way while one is read");
    static_assert(kWeightCopies % kThreads == 0 && kScaleCopies <= kThreads, "what fill() counts on");
};

template <typename F, typename T, int32_t kTokens>
struct alignas(16) Stage
{
    using L = Layout<F, T, kTokens>;
    unsigned char weights[L::kSlices][L::kRows][F::kWeightChunks][kChunkBytes];
    unsigned char inputs[L::kSlices][kTokens][F::kInputChunks][kChunkBytes];
    unsigned char scales[L::kSlices][L::kScaleChunks > 0 ? L::kScaleChunks * kChunkBytes : 1];
};

template <typename F, typename T, int32_t kTokens>
union ExpertMemory
{
    using L = Layout<F, T, kTokens>;
    Stage<F, T, kTokens> stages[L::kStages];
    float sums[L::kSlices][L::kRowWarps][L::kSums][kWarpSize];
};

template <int32_t kTokens>
using Sums = float[kTokens / 8][4]; // of each 8 positions, the fragment C

// sums += one step of a slice: the warp's 16 rows from ownRow on times all positions.
template <typename F, typename T, int32_t kTokens>
__device__ __forceinline__ void multiplyStep(
    Stage<F, T, kTokens> const& stage, int32_t slice, int32_t ownRow, int32_t lane, Sums<kTokens>& sums)
{
    typename F::Fragments weights;
    weights.load(stage.weights[slice], ownRow);
    FragmentA fragments[F::kInputChunks / 2];
#pragma unroll
    for (int32_t k = 0; k < F::kInputChunks / 2; ++k)
    {
        fragments[k] = weights.get(k);
    }
    auto const* const scales = reinterpret_cast<T const*>(stage.scales[slice]);
    float const top = F::kScaledSteps ? toFloat(scales[ownRow + lane / 4]) : 1.0f;
    float const bottom = F::kScaledSteps ? toFloat(scales[ownRow + lane / 4 + 8]) : 1.0f;
    constexpr int32_t kTiles = kTokens == 8 ? 1 : 2; // of 8 positions, at a time
#pragma unroll
    for (int32_t tile8 = 0; tile8 < kTokens / 8; tile8 += kTiles)
    {
        float stepSums[kTiles][4];
#pragma unroll
        for (int32_t i = 0; i < 4 * kTiles; ++i)
        {
            stepSums[i / 4][i % 4] = F::kScaledSteps ? 0.0f : sums[tile8 + i / 4][i % 4];
        }
#pragma unroll
        for (int32_t k = 0; k < F::kInputChunks / 2; k += 3 - kTiles)
        {
            uint32_t both[4]; // B of two instructions: of two times 8 positions, or of two times the columns
            int32_t const row = 8 * tile8 + lane / 16 * 8 * (kTiles - 1) + lane % 8;
            int32_t const chunk = 2 * k + (kTiles == 1 ? lane / 8 : lane / 8 % 2);
            loadMatrices(both, stage.inputs[slice][row][placeOf<F::kInputChunks>(row, chunk)]);
            multiplyAdd<typename F::Input>(stepSums[0], fragments[k], {both[0], both[1]});
            multiplyAdd<typename F::Input>(stepSums[kTiles - 1], fragments[k + 2 - kTiles], {both[2], both[3]});
        }
#pragma unroll
        for (int32_t i = 0; i < 4 * kTiles; ++i)
        {
            float& sum = sums[tile8 + i / 4][i % 4];
            float const step = stepSums[i / 4][i % 4];
            sum = F::kScaledSteps ? sum + (i % 4 < 2 ? top : bottom) * step : step;
        }
    }
}

// Adds up the slices, in their order, in the sums of slice 0.
template <typename F, typename T, int32_t kTokens>
__device__ __forceinline__ void addSlices(ExpertMemory<F, T, kTokens>& memory, int32_t slice, int32_t rowWarp,
    int32_t lane, Sums<kTokens>& sums)
{
    using L = Layout<F, T, kTokens>;
    // Every copy was waited for already: the groups that are still under way are empty.
    __syncthreads(); // nobody reads the stages any more, whose memory this is
    if (slice > 0)
    {
#pragma unroll
        for (int32_t i = 0; i < L::kSums; ++i)
        {
            memory.sums[slice][rowWarp][i][lane] = sums[i / 4][i % 4];
        }
    }
    __syncthreads();
    if (slice == 0)
    {
#pragma unroll
        for (int32_t other = 1; other < L::kSlices; ++other)
        {
#pragma unroll
            for (int32_t i = 0; i < L::kSums; ++i)
            {
                sums[i / 4][i % 4] += memory.sums[other][rowWarp][i][lane];
            }
        }
    }
}

// Where a thread's copy comes from at step 0, and for how many steps there is something to copy.
struct Source
{
    unsigned char const* address;
    int32_t steps;
};

// Of a copy that begins at `firstColumn` of a row of `depth` columns.
template <int32_t kColumns>
__device__ __forceinline__ Source sourceOf(unsigned char const* address, int32_t firstColumn, int32_t depth)
{
    int32_t const left = depth - firstColumn;
    return {address, left > 0 ? (left + kColumns - 1) / kColumns : 0};
}

// sums = weights (the block's rows of expert tile.expert, from firstRow on) * inputs (the tile's rows), for the warps of
// slice 0; the others' are left over. inputAt(row) is where an input row begins.
template <typename F, typename T, int32_t kTokens, typename InputAt>
__device__ __forceinline__ void multiply(ExpertMemory<F, T, kTokens>& memory, Product const& product, Tile const& tile,
    int32_t firstRow, InputAt inputAt, Sums<kTokens>& sums)
{
    using L = Layout<F, T, kTokens>;
    constexpr int32_t kOfWeights = L::kWeightCopies / kThreads;
    constexpr int32_t kOfInputs = (L::kInputCopies + kThreads - 1) / kThreads;
    constexpr int32_t kWeightStride = F::kWeightChunks * kChunkBytes; // bytes of a row in a step
    constexpr int32_t kInputStride = F::kInputChunks * kChunkBytes;
    constexpr int32_t kScalesOfChunk = kChunkBytes / static_cast<int32_t>(sizeof(T));
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    int32_t const lane = thread % kWarpSize;
    int32_t const slice = thread / kWarpSize / L::kRowWarps;
    int32_t const ownRow = thread / kWarpSize % L::kRowWarps * 16;
    int32_t const depth = product.depth;
    int32_t const allSteps = (depth + F::kColumns - 1) / F::kColumns;
    int32_t const steps = (allSteps + L::kSlices - 1) / L::kSlices;
    int64_t const rowBytes = static_cast<int64_t>(depth) * kWeightStride / F::kColumns;
    int64_t const row0 = static_cast<int64_t>(tile.expert) * product.rows + firstRow;
    unsigned char const* const weights = product.weights + row0 * rowBytes;

    // Thread i makes the copies i, i + 256, ... of every step. Rows that follow each other at a distance of 8 have their
    // chunks in the same places, so that a thread's copies go to places 256 * 16 bytes apart.
    Source weightSources[kOfWeights];
    Source inputSources[kOfInputs];
#pragma unroll
    for (int32_t i = 0; i < kOfWeights; ++i)
    {
        int32_t const row = (thread + i * kThreads) / F::kWeightChunks;
        int32_t const chunk = thread % F::kWeightChunks;
        int32_t const firstStep = row / L::kRows * steps;
        int32_t const column = firstStep * F::kColumns + chunk * (F::kColumns / F::kWeightChunks);
        bool const valid = firstRow + row % L::kRows < product.rows;
        weightSources[i] = sourceOf<F::kColumns>(
            weights + row % L::kRows * rowBytes + static_cast<int64_t>(firstStep) * kWeightStride + chunk * kChunkBytes,
            valid ? column : depth, depth);
    }
#pragma unroll
    for (int32_t i = 0; i < kOfInputs; ++i)
    {
        int32_t const row = (thread + i * kThreads) / F::kInputChunks;
        int32_t const chunk = thread % F::kInputChunks;
        int32_t const firstStep = row / kTokens * steps;
        int32_t const column = firstStep * F::kColumns + chunk * (F::kColumns / F::kInputChunks);
        bool const valid = row % kTokens < tile.pairs;
        auto const* const begin
            = reinterpret_cast<unsigned char const*>(inputAt(valid ? row % kTokens : 0)); // never read where not valid
        inputSources[i]
            = sourceOf<F::kColumns>(begin + static_cast<int64_t>(firstStep) * kInputStride + chunk * kChunkBytes,
                valid ? column : depth, depth);
    }
    int32_t const weightPlace = thread / F::kWeightChunks * F::kWeightChunks
        + placeOf<F::kWeightChunks>(thread / F::kWeightChunks, thread % F::kWeightChunks);
    int32_t const inputPlace = thread / F::kInputChunks * F::kInputChunks
        + placeOf<F::kInputChunks>(thread / F::kInputChunks % kTokens, thread % F::kInputChunks);

    // Scales, one copy of a few threads: the rows' in the group of columns that the step lies in.
    constexpr int32_t kOfScales = L::kScaleChunks > 0 ? L::kScaleChunks : 1; // of a slice
    int32_t const scaleRow = firstRow + thread % kOfScales * kScalesOfChunk;
    int32_t const firstScaleStep = thread / kOfScales * steps;
    int32_t const groups = (allSteps + (1 << product.groupShift) - 1) >> product.groupShift;
    Source const scaleSource{static_cast<unsigned char const*>(product.scales)
            + (static_cast<int64_t>(tile.expert) * groups * product.rows + scaleRow) * static_cast<int32_t>(sizeof(T)),
        scaleRow < product.rows ? allSteps - firstScaleStep : 0};

    auto const fill = [&](int32_t step) {
        Stage<F, T, kTokens>& stage = memory.stages[step % L::kStages];
#pragma unroll
        for (int32_t i = 0; i < kOfWeights; ++i)
        {
            bool const inside = step < weightSources[i].steps;
            copyAsync16(&stage.weights[0][0][0][0] + (weightPlace + i * kThreads) * kChunkBytes,
                inside ? weightSources[i].address + step * kWeightStride : weights, inside);
        }
#pragma unroll
        for (int32_t i = 0; i < kOfInputs; ++i)
        {
            bool const inside = step < inputSources[i].steps;
            if (L::kInputCopies % kThreads == 0 || thread + i * kThreads < L::kInputCopies)
            {
                copyAsync16(&stage.inputs[0][0][0][0] + (inputPlace + i * kThreads) * kChunkBytes,
                    inside ? inputSources[i].address + step * kInputStride : weights, inside);
            }
        }
        if (F::kScaledSteps && thread < L::kScaleCopies)
        {
            bool const inside = step < scaleSource.steps;
            int32_t const group = (firstScaleStep + step) >> product.groupShift;
            copyAsync16(&stage.scales[0][0] + thread * kChunkBytes,
                inside ? scaleSource.address + group * product.rows * static_cast<int32_t>(sizeof(T)) : weights, inside);
        }
    };

#pragma unroll
    for (int32_t tile8 = 0; tile8 < kTokens / 8; ++tile8)
    {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i)
        {
            sums[tile8][i] = 0.0f;
        }
    }
#pragma unroll
    for (int32_t step = 0; step < L::kStages - 1; ++step)
    {
        if (step < steps)
        {
            fill(step);
        }
        commitCopies();
    }
    for (int32_t step = 0; step < steps; ++step)
    {
        waitForCopies<L::kStages - 2>();
        __syncthreads();
        if (step + L::kStages - 1 < steps)
        {
            fill(step + L::kStages - 1);
        }
        commitCopies();
        multiplyStep<F, T, kTokens>(memory.stages[step % L::kStages], slice, ownRow, lane, sums);
    }
    if (L::kSlices > 1)
    {
        addSlices<F, T, kTokens>(memory, slice, ownRow / 16, lane, sums);
    }
}

// What a sum has to be multiplied by: the scale of the row and those of the activations. 1 where there is none.
template <typename F>
__device__ __forceinline__ float scaleOf(Product const& product, int32_t expert, int32_t row, float activations)
{
    if (!F::kScaledRows)
    {
        return 1.0f;
    }
    return static_cast<float const*>(product.scales)[static_cast<int64_t>(expert) * product.rows + row] * activations;
}

// hidden[position] = silu(gate) * up, for the channels of the block's rows. product.rows is 2 I.
template <WeightType kType, typename T, int32_t kTokens>
__global__ void __launch_bounds__(kThreads, kBlocks) projectUp(Routing routing, Product product)
{
    using F = Format<kType, T>;
    using L = Layout<F, T, kTokens>;
    using Input = typename F::Input;
    QWENFORGE_SHARED(memory, ExpertMemory<F, T, kTokens>);
    if (static_cast<int32_t>(blockIdx.x) >= *routing.tileCount)
    {
        return;
    }
    Tile const tile = routing.tiles[blockIdx.x];
    int32_t const firstRow = static_cast<int32_t>(blockIdx.y) * L::kRows;
    auto const inputAt = [&](int32_t row) {
        int32_t const token = routing.pairAt[tile.first + row] / routing.slots;
        return static_cast<Input const*>(product.inputs) + static_cast<int64_t>(token) * product.depth;
    };
    Sums<kTokens> sums;
    multiply<F, T, kTokens>(memory, product, tile, firstRow, inputAt, sums);
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int32_t const warp = static_cast<int32_t>(threadIdx.x) / kWarpSize;
    int32_t const gateRow = firstRow + 16 * warp + lane / 4;
    if (warp >= L::kRowWarps || gateRow >= product.rows)
    {
        return; // another slice, or rows behind the last
    }
    bool const quantized = kType == WeightType::kFloat8;
    float const inputScale = quantized ? product.activationScales[0] : 1.0f;
    float const outputScale = quantized ? product.activationScales[1 + tile.expert] : 1.0f;
    float const gateScale = scaleOf<F>(product, tile.expert, gateRow, inputScale);
    float const upScale = scaleOf<F>(product, tile.expert, gateRow + 8, inputScale);
    int32_t const channel = firstRow / 2 + 8 * warp + lane / 4;
#pragma unroll
    for (int32_t i = 0; i < kTokens / 8; ++i)
    {
#pragma unroll
        for (int32_t side = 0; side < 2; ++side)
        {
            int32_t const row = 8 * i + lane % 4 * 2 + side;
            if (row < tile.pairs)
            {
                float const gate = sums[i][side] * gateScale;
                float const active = gate / (1.0f + expf(-gate)) * (sums[i][side + 2] * upScale);
                int64_t const place = static_cast<int64_t>(tile.first + row) * (product.rows / 2) + channel;
                static_cast<Input*>(product.outputs)[place] = fromFloat<Input>(active / outputScale);
            }
        }
    }
}

// partial[position] = down * hidden[position], for the block's rows. product.rows is C.
template <WeightType kType, typename T, int32_t kTokens>
__global__ void __launch_bounds__(kThreads, kBlocks) projectDown(Routing routing, Product product)
{
    using F = Format<kType, T>;
    using L = Layout<F, T, kTokens>;
    using Input = typename F::Input;
    QWENFORGE_SHARED(memory, ExpertMemory<F, T, kTokens>);
    if (static_cast<int32_t>(blockIdx.x) >= *routing.tileCount)
    {
        return;
    }
    Tile const tile = routing.tiles[blockIdx.x];
    int32_t const firstRow = static_cast<int32_t>(blockIdx.y) * L::kRows;
    auto const inputAt = [&](int32_t row) {
        return static_cast<Input const*>(product.inputs) + static_cast<int64_t>(tile.first + row) * product.depth;
    };
    Sums<kTokens> sums;
    multiply<F, T, kTokens>(memory, product, tile, firstRow, inputAt, sums);
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int32_t const warp = static_cast<int32_t>(threadIdx.x) / kWarpSize;
    if (warp >= L::kRowWarps)
    {
        return; // another slice
    }
    float const inputScale = kType == WeightType::kFloat8 ? product.activationScales[1 + tile.expert] : 1.0f;
#pragma unroll
    for (int32_t side = 0; side < 2; ++side)
    {
        int32_t const channel = firstRow + 16 * warp + lane / 4 + 8 * side;
        if (channel >= product.rows)
        {
            continue;
        }
        float const scale = scaleOf<F>(product, tile.expert, channel, inputScale);
#pragma unroll
        for (int32_t i = 0; i < kTokens / 4; ++i)
        {
            int32_t const row = 8 * (i / 2) + lane % 4 * 2 + i % 2;
            if (row < tile.pairs)
            {
                int64_t const place = static_cast<int64_t>(tile.first + row) * product.rows + channel;
                static_cast<T*>(product.outputs)[place] = fromFloat<T>(sums[i / 2][2 * side + i % 2] * scale);
            }
        }
    }
}

constexpr int32_t kQuantizeThreads = 256;

// Tokens as E4M3: block n turns the elements 2048 n .. 2048 n + 2047 into that, eight a thread.
template <typename T>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantizeTokens(T const* states, int64_t count, float const* scale, __nv_fp8_e4m3* quantized)
{
    int64_t const first = (static_cast<int64_t>(blockIdx.x) * kQuantizeThreads + threadIdx.x) * 8;
    if (first >= count)
    {
        return;
    }
    Eight<T> const loaded = *reinterpret_cast<Eight<T> const*>(states + first);
#pragma unroll
    for (int32_t i = 0; i < 8; ++i)
    {
        quantized[first + i] = fromFloat<__nv_fp8_e4m3>(toFloat(loaded.values[i]) / *scale);
    }
}

} // namespace moe
} // namespace qwenforge
