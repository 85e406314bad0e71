// The kernels of the mixture of experts, straightforward ones: no tensor cores, every product in fp32.
//
// T tokens of one chunk, E routed and Es shared experts, K routed experts a token, S = K + Es *slots* a token. A *pair* is
// a token and one of its slots, numbered t * S + slot; the slots of the shared experts are the last. Pairs are sorted by
// expert, those of one expert in order of their numbers; a pair's place in that order is its *position*.
//
//   routeTokens    ids and weights of all pairs                                       a warp a token
//   countPairs     pairs of each expert                                               a block an expert
//   placePairs     pairs by position, positions by pair                               a block an expert
//   projectUp      hidden[position] = silu(gate) * up                                 a block a tile of 32 positions
//   projectDown    partial[position] = down * hidden[position], fp32                  a block a tile of 32 positions
//   combine        output[token] = sum of weight * partial over its slots, in order   a block 256 channels of a token
//
// Nothing is added atomically, so that the same input gives the same bits. Which expert a block of projectUp and
// projectDown works for is only known on the device: the grid has as many blocks as there can be tiles, and those behind
// the last tile leave at once.

#pragma once

#include "common/device.cuh"

namespace qwenforge
{
namespace moe
{

constexpr int32_t kMaxExperts = 256;
constexpr int32_t kMaxSharedExperts = 64;
constexpr int32_t kMaxTopK = 8;
constexpr int32_t kLogitsOfLane = kMaxExperts / kWarpSize;

constexpr int32_t kRouteWarps = 4;
constexpr int32_t kSortThreads = 256;
constexpr int32_t kSortWarps = kSortThreads / kWarpSize;
constexpr int32_t kTileThreads = 256;
constexpr int32_t kTilePairs = 32;  // positions of a tile
constexpr int32_t kTileRows = 64;   // weight rows of a tile
constexpr int32_t kTileDepth = 32;  // columns that are in shared memory at a time
constexpr int32_t kPairsOfThread = kTilePairs * kWarpSize / kTileThreads;
constexpr int32_t kCombineThreads = 256;

struct Routing
{
    int32_t tokens;
    int32_t experts;       // E
    int32_t sharedExperts; // Es
    int32_t topK;          // K
    int32_t slots;         // S
    bool normalize;
    int32_t* ids;        // [T, S] expert of a pair
    float* weights;      // [T, S]
    int32_t* counts;     // [E + Es] pairs of an expert
    int32_t* pairAt;     // [T * S] pair by position
    int32_t* positionOf; // [T * S] position by pair
};

// Softmax over the logits in fp32 and the K largest, the lower id where two are equal. Lane l owns the logits l, l + 32,
// ..., l + 224; `taken` has a bit for each of them. NaN is larger than every number here: it gets chosen, its weight is
// NaN, and ids stay distinct and in range whatever the logits are.
template <typename T>
__global__ void __launch_bounds__(kRouteWarps* kWarpSize)
    routeTokens(Routing routing, T const* routerLogits, T const* sharedGateLogits)
{
    constexpr int32_t kNone = kMaxExperts;
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int32_t const token = static_cast<int32_t>(blockIdx.x) * kRouteWarps + static_cast<int32_t>(threadIdx.x) / kWarpSize;
    if (token >= routing.tokens)
    {
        return; // the whole warp
    }
    T const* const logits = routerLogits + static_cast<int64_t>(token) * routing.experts;
    float values[kLogitsOfLane];
    float largest = -INFINITY;
#pragma unroll
    for (int32_t i = 0; i < kLogitsOfLane; ++i)
    {
        int32_t const expert = lane + i * kWarpSize;
        values[i] = expert < routing.experts ? toFloat(logits[expert]) : -INFINITY;
        largest = isLarger(values[i], largest) ? values[i] : largest;
    }
    largest = warpMax(largest);
    float sum = 0.0f;
#pragma unroll
    for (int32_t i = 0; i < kLogitsOfLane; ++i)
    {
        values[i] = lane + i * kWarpSize < routing.experts ? expf(values[i] - largest) : 0.0f;
        sum += values[i];
    }
    sum = warpSum(sum);

    uint32_t taken = 0;
    float total = 0.0f;
    float weight = 0.0f;
    int32_t id = 0;
    for (int32_t rank = 0; rank < routing.topK; ++rank)
    {
        float best = 0.0f;
        int32_t bestId = kNone;
#pragma unroll
        for (int32_t i = 0; i < kLogitsOfLane; ++i)
        {
            int32_t const expert = lane + i * kWarpSize;
            bool const free = expert < routing.experts && (taken >> i & 1u) == 0;
            if (free && (bestId == kNone || isLarger(values[i], best)))
            {
                best = values[i];
                bestId = expert;
            }
        }
#pragma unroll
        for (int32_t distance = kWarpSize / 2; distance > 0; distance /= 2)
        {
            float const other = __shfl_xor_sync(kAllLanes, best, distance);
            int32_t const otherId = __shfl_xor_sync(kAllLanes, bestId, distance);
            bool const larger = isLarger(other, best);
            bool const equal = !larger && !isLarger(best, other);
            if (otherId != kNone && (bestId == kNone || larger || (equal && otherId < bestId)))
            {
                best = other;
                bestId = otherId;
            }
        }
        taken |= bestId % kWarpSize == lane ? 1u << bestId / kWarpSize : 0u;
        total += best / sum;
        if (lane == rank)
        {
            weight = best / sum;
            id = bestId;
        }
    }
    int64_t const first = static_cast<int64_t>(token) * routing.slots;
    if (lane < routing.topK)
    {
        routing.ids[first + lane] = id;
        routing.weights[first + lane] = routing.normalize ? weight / total : weight;
    }
    for (int32_t shared = lane; shared < routing.sharedExperts; shared += kWarpSize)
    {
        float const logit = toFloat(sharedGateLogits[token]);
        routing.ids[first + routing.topK + shared] = routing.experts + shared;
        routing.weights[first + routing.topK + shared] = 1.0f / (1.0f + expf(-logit));
    }
}

// The sum of `value` over the block, for every thread. `sums` may be used again after the next barrier.
__device__ __forceinline__ int32_t blockSum(int32_t value, int32_t (&sums)[kSortWarps])
{
#pragma unroll
    for (int32_t distance = kWarpSize / 2; distance > 0; distance /= 2)
    {
        value += __shfl_xor_sync(kAllLanes, value, distance);
    }
    if (threadIdx.x % kWarpSize == 0)
    {
        sums[threadIdx.x / kWarpSize] = value;
    }
    __syncthreads();
    int32_t total = 0;
#pragma unroll
    for (int32_t warp = 0; warp < kSortWarps; ++warp)
    {
        total += sums[warp];
    }
    return total;
}

// Block e counts the pairs of expert e; thread i looks at the pairs i, i + 256, ...
__global__ void __launch_bounds__(kSortThreads) countPairs(Routing routing)
{
    QWENFORGE_SHARED(sums, int32_t[kSortWarps]);
    int32_t const expert = static_cast<int32_t>(blockIdx.x);
    int32_t const pairs = routing.tokens * routing.slots;
    int32_t count = 0;
    for (int32_t pair = static_cast<int32_t>(threadIdx.x); pair < pairs; pair += kSortThreads)
    {
        count += routing.ids[pair] == expert ? 1 : 0;
    }
    count = blockSum(count, sums);
    if (threadIdx.x == 0)
    {
        routing.counts[expert] = count;
    }
}

// Block e gives its expert's pairs their positions, which begin where those of the experts before it end. Each round of
// the loop looks at 256 pairs, one a thread: a pair's rank among them is the number of hits in the warps before its own
// and in the lanes before its own.
__global__ void __launch_bounds__(kSortThreads) placePairs(Routing routing)
{
    QWENFORGE_SHARED(sums, int32_t[kSortWarps]);
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    int32_t const lane = thread % kWarpSize;
    int32_t const warp = thread / kWarpSize;
    int32_t const expert = static_cast<int32_t>(blockIdx.x);
    int32_t const pairs = routing.tokens * routing.slots;
    int32_t before = 0;
    for (int32_t other = thread; other < expert; other += kSortThreads)
    {
        before += routing.counts[other];
    }
    int32_t next = blockSum(before, sums);
    for (int32_t first = 0; first < pairs; first += kSortThreads)
    {
        int32_t const pair = first + thread;
        bool const hit = pair < pairs && routing.ids[pair] == expert;
        uint32_t const hits = __ballot_sync(kAllLanes, hit);
        __syncthreads(); // everybody has read the sums of the round before
        if (lane == 0)
        {
            sums[warp] = __popc(hits);
        }
        __syncthreads();
        int32_t rank = __popc(hits & ((1u << lane) - 1u));
        int32_t all = 0;
#pragma unroll
        for (int32_t other = 0; other < kSortWarps; ++other)
        {
            rank += other < warp ? sums[other] : 0;
            all += sums[other];
        }
        if (hit)
        {
            routing.pairAt[next + rank] = pair;
            routing.positionOf[pair] = next + rank;
        }
        next += all;
    }
}

// The tile of positions that a block works on.
struct Tile
{
    int32_t expert; // -1: none, the block has nothing to do
    int32_t first;  // position
    int32_t pairs;  // at least 1
};

// Tile number blockIdx.x, of at most `tilePairs` positions: the tiles of expert 0, then those of expert 1, ... Thread 0
// looks for it.
__device__ __forceinline__ Tile findTile(Routing const& routing, Tile& shared, int32_t tilePairs)
{
    if (threadIdx.x == 0)
    {
        int32_t left = static_cast<int32_t>(blockIdx.x);
        int32_t first = 0;
        shared.expert = -1;
        for (int32_t expert = 0; expert < routing.experts + routing.sharedExperts; ++expert)
        {
            int32_t const count = routing.counts[expert];
            int32_t const tiles = (count + tilePairs - 1) / tilePairs;
            if (left < tiles)
            {
                int32_t const rest = count - left * tilePairs;
                shared.expert = expert;
                shared.first = first + left * tilePairs;
                shared.pairs = rest < tilePairs ? rest : tilePairs;
                break;
            }
            left -= tiles;
            first += count;
        }
    }
    __syncthreads();
    return shared;
}

// Shared memory of a tile's product: 32 columns of both operands, widened to fp32. The one float behind each row of 32
// spreads a column over the banks.
struct TileMemory
{
    float inputs[kTilePairs][kTileDepth + 1];
    float weights[kTileRows][kTileDepth + 1];
};

// The products of 32 input rows and 64 weight rows. Lane l of warp w owns the input rows 4w .. 4w + 3 and the weight rows
// `firstRow` and `secondRow`, which depend on l: eight sums. Rows behind `validInputs` and `validRows` and columns behind
// `depth`, a multiple of 8, count as 0 and are not read. inputAt(row) is where an input row begins.
template <typename T, typename InputAt>
__device__ __forceinline__ void multiplyTile(TileMemory& memory, InputAt inputAt, int32_t validInputs, T const* weights,
    int32_t validRows, int32_t depth, int32_t firstRow, int32_t secondRow, float (&first)[kPairsOfThread],
    float (&second)[kPairsOfThread])
{
    constexpr int32_t kEights = kTileDepth / 8;
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    int32_t const row = thread / kEights;
    int32_t const column = thread % kEights * 8;
    int32_t const warp = thread / kWarpSize;
    T const* const weightRow = weights + static_cast<int64_t>(row) * depth;
    T const* const inputRow = row < validInputs ? inputAt(row) : nullptr;
#pragma unroll
    for (int32_t i = 0; i < kPairsOfThread; ++i)
    {
        first[i] = second[i] = 0.0f;
    }
    for (int32_t start = 0; start < depth; start += kTileDepth)
    {
        bool const inside = start + column < depth;
        if (row < kTilePairs)
        {
            Eight<T> loaded{};
            if (inside && inputRow != nullptr)
            {
                loaded = *reinterpret_cast<Eight<T> const*>(inputRow + start + column);
            }
#pragma unroll
            for (int32_t i = 0; i < 8; ++i)
            {
                memory.inputs[row][column + i] = toFloat(loaded.values[i]);
            }
        }
        Eight<T> loaded{};
        if (inside && row < validRows)
        {
            loaded = *reinterpret_cast<Eight<T> const*>(weightRow + start + column);
        }
#pragma unroll
        for (int32_t i = 0; i < 8; ++i)
        {
            memory.weights[row][column + i] = toFloat(loaded.values[i]);
        }
        __syncthreads();
#pragma unroll 8
        for (int32_t k = 0; k < kTileDepth; ++k)
        {
            float const one = memory.weights[firstRow][k];
            float const other = memory.weights[secondRow][k];
#pragma unroll
            for (int32_t i = 0; i < kPairsOfThread; ++i)
            {
                float const input = memory.inputs[warp * kPairsOfThread + i][k];
                first[i] += input * one;
                second[i] += input * other;
            }
        }
        __syncthreads();
    }
}

// A block computes 32 channels of the hidden activation for one tile of positions: the 64 packed weight rows of these
// channels, of which lane l owns gate and up of channel l.
template <typename T>
__global__ void __launch_bounds__(kTileThreads) projectUp(Routing routing, T const* hiddenStates, T const* gateUpWeights,
    int32_t hiddenSize, int32_t intermediateSize, T* hidden)
{
    QWENFORGE_SHARED(found, Tile);
    QWENFORGE_SHARED(memory, TileMemory);
    Tile const tile = findTile(routing, found, kTilePairs);
    if (tile.expert < 0)
    {
        return;
    }
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int32_t const warp = static_cast<int32_t>(threadIdx.x) / kWarpSize;
    int32_t const firstChannel = static_cast<int32_t>(blockIdx.y) * kTileRows / 2;
    int64_t const firstRow = static_cast<int64_t>(tile.expert) * 2 * intermediateSize + 2 * firstChannel;
    int32_t const gateRow = lane / 8 * 16 + lane % 8;
    float gate[kPairsOfThread];
    float up[kPairsOfThread];
    auto const inputAt = [=](int32_t row) {
        int32_t const token = routing.pairAt[tile.first + row] / routing.slots;
        return hiddenStates + static_cast<int64_t>(token) * hiddenSize;
    };
    multiplyTile(memory, inputAt, tile.pairs, gateUpWeights + firstRow * hiddenSize,
        2 * (intermediateSize - firstChannel), hiddenSize, gateRow, gateRow + 8, gate, up);
    int32_t const channel = firstChannel + lane;
#pragma unroll
    for (int32_t i = 0; i < kPairsOfThread; ++i)
    {
        int32_t const row = warp * kPairsOfThread + i;
        if (row < tile.pairs && channel < intermediateSize)
        {
            float const active = gate[i] / (1.0f + expf(-gate[i]));
            int64_t const position = tile.first + row;
            hidden[position * intermediateSize + channel] = fromFloat<T>(active * up[i]);
        }
    }
}

// A block computes 64 output channels for one tile of positions; lane l owns the channels l and l + 32 of them.
template <typename T>
__global__ void __launch_bounds__(kTileThreads) projectDown(Routing routing, T const* hidden, T const* downWeights,
    int32_t hiddenSize, int32_t intermediateSize, float* partial)
{
    QWENFORGE_SHARED(found, Tile);
    QWENFORGE_SHARED(memory, TileMemory);
    Tile const tile = findTile(routing, found, kTilePairs);
    if (tile.expert < 0)
    {
        return;
    }
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int32_t const warp = static_cast<int32_t>(threadIdx.x) / kWarpSize;
    int32_t const firstChannel = static_cast<int32_t>(blockIdx.y) * kTileRows;
    int64_t const firstRow = static_cast<int64_t>(tile.expert) * hiddenSize + firstChannel;
    float first[kPairsOfThread];
    float second[kPairsOfThread];
    auto const inputAt = [=](int32_t row) {
        return hidden + static_cast<int64_t>(tile.first + row) * intermediateSize;
    };
    multiplyTile(memory, inputAt, tile.pairs, downWeights + firstRow * intermediateSize, hiddenSize - firstChannel,
        intermediateSize, lane, lane + kWarpSize, first, second);
#pragma unroll
    for (int32_t i = 0; i < kPairsOfThread; ++i)
    {
        int32_t const row = warp * kPairsOfThread + i;
        float* const out = partial + static_cast<int64_t>(tile.first + row) * hiddenSize;
        int32_t const channel = firstChannel + lane;
        if (row < tile.pairs && channel < hiddenSize)
        {
            out[channel] = first[i];
        }
        if (row < tile.pairs && channel + kWarpSize < hiddenSize)
        {
            out[channel + kWarpSize] = second[i];
        }
    }
}

// Block (t, n) adds up the channels 256 n .. 256 n + 255 of token t, one a thread, slot by slot.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads)
    combine(Routing routing, float const* partial, int32_t hiddenSize, T* output)
{
    int32_t const channel = static_cast<int32_t>(blockIdx.y) * kCombineThreads + static_cast<int32_t>(threadIdx.x);
    if (channel >= hiddenSize)
    {
        return;
    }
    int64_t const token = blockIdx.x;
    float sum = 0.0f;
    for (int32_t slot = 0; slot < routing.slots; ++slot)
    {
        int64_t const pair = token * routing.slots + slot;
        int64_t const position = routing.positionOf[pair];
        sum += routing.weights[pair] * partial[position * hiddenSize + channel];
    }
    output[token * hiddenSize + channel] = fromFloat<T>(sum);
}

} // namespace moe
} // namespace qwenforge
