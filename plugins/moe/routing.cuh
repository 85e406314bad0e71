// The kernels of routing.h: which pair lies where, and the sum over a token's slots.
//
//   routeFew     the four of them below at once, for at most 512 pairs         one block
//   routeTokens  stored expert and weight of all pairs                         a warp a token
//   countPairs   pairs of each stored expert                                   a block an expert
//   placePairs   pairs by position, positions by pair, tiles                   a block an expert
//   combine      output[token] = sum of weight * partial over its slots        a block 256 channels of a token
//
// Nothing is added atomically, so that the same input gives the same bits.
//
// Bounds. Slots are at most kMaxTopK + kMaxSharedExperts and tokens those of a chunk, so that pairs and positions fit
// int32_t. Ids of experts come from this file alone: a token's K are distinct and below E whatever its logits are, because
// only a free expert is ever chosen and K <= E. Positions are 0 .. P - 1 for the P pairs of stored experts, P <= T * S, and
// no two pairs share one. An expert of n pairs has ceil(n / tileTokens) tiles of 1 .. tileTokens pairs, all experts
// together at most mostTiles() of moe.cu, for which the workspace and the grids of the products are made.

#pragma once

#include "common/device.cuh"
#include "moe/routing.h"

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
constexpr int32_t kFewPairs = 512;
constexpr int32_t kCombineThreads = 256;

// The K largest of a token's logits, the lower id where two are equal, and their softmax in fp32. Lane l owns the logits
// l, l + 32, ..., l + 224, as far as there are experts; `taken` has a bit for each of them. Lane r keeps the expert of rank
// r. Logits are compared and not probabilities, which rounding or underflow can make equal where the logits are not. NaN is
// larger than every number here: it gets chosen, and the sum and with it every weight are NaN.
template <typename T>
__device__ __forceinline__ void routeToken(
    Routing const& routing, T const* routerLogits, T const* sharedGateLogits, int32_t token)
{
    constexpr int32_t kNone = kMaxExperts;
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    T const* const logits = routerLogits + static_cast<int64_t>(token) * routing.experts;
    float owned[kLogitsOfLane];
    float largest = -INFINITY;
#pragma unroll
    for (int32_t i = 0; i < kLogitsOfLane; ++i)
    {
        int32_t const expert = lane + i * kWarpSize;
        owned[i] = expert < routing.experts ? toFloat(logits[expert]) : -INFINITY;
        largest = isLarger(owned[i], largest) ? owned[i] : largest;
    }
    largest = warpMax(largest);
    float sum = 0.0f;
#pragma unroll
    for (int32_t i = 0; i < kLogitsOfLane; ++i)
    {
        sum += lane + i * kWarpSize < routing.experts ? expf(owned[i] - largest) : 0.0f;
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
            if (free && (bestId == kNone || isLarger(owned[i], best)))
            {
                best = owned[i];
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
        float const probability = expf(best - largest) / sum;
        total += probability;
        if (lane == rank)
        {
            weight = probability;
            id = bestId;
        }
    }
    int64_t const first = static_cast<int64_t>(token) * routing.slots;
    if (lane < routing.topK)
    {
        int32_t const local = id - routing.firstLocal;
        routing.stored[first + lane] = local >= 0 && local < routing.localExperts ? local : -1;
        routing.weights[first + lane] = routing.normalize ? weight / total : weight;
    }
    for (int32_t shared = lane; shared < routing.sharedExperts; shared += kWarpSize)
    {
        float const logit = toFloat(sharedGateLogits[token]);
        routing.stored[first + routing.topK + shared] = routing.localExperts + shared;
        routing.weights[first + routing.topK + shared] = 1.0f / (1.0f + expf(-logit));
    }
}

template <typename T>
__global__ void __launch_bounds__(kRouteWarps* kWarpSize)
    routeTokens(Routing routing, T const* routerLogits, T const* sharedGateLogits)
{
    int32_t const token = static_cast<int32_t>(blockIdx.x) * kRouteWarps + static_cast<int32_t>(threadIdx.x) / kWarpSize;
    if (token < routing.tokens) // or the whole warp has nothing to do
    {
        routeToken(routing, routerLogits, sharedGateLogits, token);
    }
}

// One block routes and sorts: warp w the tokens w, w + 8, ..., then thread i the pairs i and i + 256, of which there are at
// most kFewPairs: what the three arrays in shared memory are for, an element a pair. A pair's position is the number of
// pairs of lower experts and of earlier pairs of its own; a tile begins at every tileTokens-th pair of an expert, and its
// number is the number of tiles that begin at lower positions. Pairs of foreign experts (-1) are before nobody and begin
// nothing.
template <typename T>
__global__ void __launch_bounds__(kSortThreads) routeFew(Routing routing, T const* routerLogits, T const* sharedGateLogits)
{
    QWENFORGE_SHARED(expertOf, int32_t[kFewPairs]);
    QWENFORGE_SHARED(positionOf, int32_t[kFewPairs]);
    QWENFORGE_SHARED(begins, bool[kFewPairs]);
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    int32_t const pairs = routing.tokens * routing.slots;
    for (int32_t token = thread / kWarpSize; token < routing.tokens; token += kSortWarps)
    {
        routeToken(routing, routerLogits, sharedGateLogits, token);
    }
    __syncthreads();
    for (int32_t pair = thread; pair < pairs; pair += kSortThreads)
    {
        expertOf[pair] = routing.stored[pair];
    }
    __syncthreads();
    for (int32_t pair = thread; pair < pairs; pair += kSortThreads)
    {
        int32_t const expert = expertOf[pair];
        int32_t before = 0;
        int32_t rank = 0;
        for (int32_t other = 0; other < pairs; ++other)
        {
            int32_t const otherExpert = expertOf[other];
            before += otherExpert >= 0 && otherExpert < expert ? 1 : 0;
            rank += otherExpert == expert && other < pair ? 1 : 0;
        }
        positionOf[pair] = expert < 0 ? -1 : before + rank;
        begins[pair] = expert >= 0 && rank % routing.tileTokens == 0;
        routing.positionOf[pair] = positionOf[pair];
        if (expert >= 0)
        {
            routing.pairAt[before + rank] = pair;
        }
    }
    __syncthreads();
    for (int32_t pair = thread; pair < pairs; pair += kSortThreads)
    {
        int32_t tilesBefore = 0;
        int32_t behind = 0; // pairs of this expert from this one on
        for (int32_t other = 0; other < pairs; ++other)
        {
            tilesBefore += begins[other] && positionOf[other] < positionOf[pair] ? 1 : 0;
            behind += expertOf[other] == expertOf[pair] && positionOf[other] >= positionOf[pair] ? 1 : 0;
        }
        if (begins[pair])
        {
            int32_t const size = behind < routing.tileTokens ? behind : routing.tileTokens;
            routing.tiles[tilesBefore] = Tile{expertOf[pair], positionOf[pair], size};
        }
    }
    if (thread == 0)
    {
        int32_t count = 0;
        for (int32_t pair = 0; pair < pairs; ++pair)
        {
            count += begins[pair] ? 1 : 0;
        }
        *routing.tileCount = count;
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

// Block e counts the pairs of stored expert e; thread i looks at the pairs i, i + 256, ...
__global__ void __launch_bounds__(kSortThreads) countPairs(Routing routing)
{
    QWENFORGE_SHARED(sums, int32_t[kSortWarps]);
    int32_t const expert = static_cast<int32_t>(blockIdx.x);
    int32_t const pairs = routing.tokens * routing.slots;
    int32_t count = 0;
    for (int32_t pair = static_cast<int32_t>(threadIdx.x); pair < pairs; pair += kSortThreads)
    {
        count += routing.stored[pair] == expert ? 1 : 0;
    }
    count = blockSum(count, sums);
    if (threadIdx.x == 0)
    {
        routing.counts[expert] = count;
    }
}

// Block e gives its expert's pairs their positions, which begin where those of the experts before it end, and writes its
// tiles. Each round of the loop looks at 256 pairs, one a thread: a pair's rank among them is the number of hits in the
// warps before its own and in the lanes before its own. Block 0 also marks the pairs that have no position, and the last
// block knows how many tiles there are.
__global__ void __launch_bounds__(kSortThreads) placePairs(Routing routing)
{
    QWENFORGE_SHARED(sums, int32_t[kSortWarps]);
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    int32_t const lane = thread % kWarpSize;
    int32_t const warp = thread / kWarpSize;
    int32_t const expert = static_cast<int32_t>(blockIdx.x);
    int32_t const pairs = routing.tokens * routing.slots;
    int32_t before = 0;
    int32_t tiles = 0;
    for (int32_t other = thread; other < expert; other += kSortThreads)
    {
        before += routing.counts[other];
        tiles += (routing.counts[other] + routing.tileTokens - 1) / routing.tileTokens;
    }
    int32_t const first = blockSum(before, sums);
    __syncthreads();
    int32_t const firstTile = blockSum(tiles, sums);
    int32_t const count = routing.counts[expert];
    int32_t const ownTiles = (count + routing.tileTokens - 1) / routing.tileTokens;
    for (int32_t tile = thread; tile < ownTiles; tile += kSortThreads)
    {
        int32_t const begin = tile * routing.tileTokens;
        int32_t const rest = count - begin;
        int32_t const size = rest < routing.tileTokens ? rest : routing.tileTokens;
        routing.tiles[firstTile + tile] = Tile{expert, first + begin, size};
    }
    if (thread == 0 && expert + 1 == routing.localExperts + routing.sharedExperts)
    {
        *routing.tileCount = firstTile + ownTiles;
    }
    int32_t next = first;
    for (int32_t start = 0; start < pairs; start += kSortThreads)
    {
        int32_t const pair = start + thread;
        int32_t const found = pair < pairs ? routing.stored[pair] : -1;
        bool const hit = found == expert;
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
        if (expert == 0 && found < 0 && pair < pairs)
        {
            routing.positionOf[pair] = -1;
        }
        next += all;
    }
}

// Block (t, n) adds up the channels 256 n .. 256 n + 255 of token t, one a thread, slot by slot; slots whose expert is not
// local add nothing.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads)
    combine(Routing routing, T const* partial, int32_t hiddenSize, T* output)
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
        if (position >= 0)
        {
            sum += routing.weights[pair] * toFloat(partial[position * hiddenSize + channel]);
        }
    }
    output[token * hiddenSize + channel] = fromFloat<T>(sum);
}

} // namespace moe
} // namespace qwenforge
