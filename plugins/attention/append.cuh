// What happens to a new token before anybody attends: its heads are normalized if asked, query and key are turned, key and
// value go into the caches.
//
//   rotateAndAppend   a warp a head of a token: its Hq query heads, then Hk key heads, then Hk value heads
//
// A lane owns the channels 2 l and 2 l + 1 of each 64 of the lower half of a head and those D / 2 behind them, which are
// turned together; nothing is shared between warps. Tables are read only at positions that they have; another position
// makes query and key NaN. A token without a place in the cache is not appended, and its query becomes NaN; so does the
// query of a token that would see a page that does not exist, so that nobody has to look for such pages later.

#pragma once

#include "attention/cache.cuh"

namespace qwenforge
{
namespace attention
{

constexpr int32_t kMaxHeadSize = 256;
constexpr int32_t kAppendWarps = 8;
constexpr int32_t kAppendThreads = kAppendWarps * kWarpSize;
constexpr int32_t kAppendBlocks = 5; // of a multiprocessor, at the least
constexpr int32_t kLaneChannels = 2; // that follow each other

// The channels of a lane: [which 64 of the half][lower or upper half][2].
using LaneChannels = float[kMaxHeadSize / 2 / (kLaneChannels * kWarpSize)][2][kLaneChannels];
constexpr int32_t kLaneSteps = kMaxHeadSize / 2 / (kLaneChannels * kWarpSize);

// Calls visit(values, channel) for every two channels that follow each other and belong to the lane.
template <typename Visit>
__device__ __forceinline__ void forLaneChannels(LaneChannels& channels, int32_t headSize, Visit visit)
{
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int32_t const half = headSize / 2;
#pragma unroll
    for (int32_t step = 0; step < kLaneSteps; ++step)
    {
        int32_t const channel = kLaneChannels * (step * kWarpSize + lane);
        if (channel < half)
        {
            visit(channels[step][0], channel);
            visit(channels[step][1], half + channel);
        }
    }
}

// channels *= weight / sqrt(mean of their squares + epsilon)
template <typename T>
__device__ __forceinline__ void normalize(LaneChannels& channels, int32_t headSize, T const* weight, float epsilon)
{
    float squares = 0.0f;
    forLaneChannels(channels, headSize,
        [&](float (&values)[2], int32_t) { squares += values[0] * values[0] + values[1] * values[1]; });
    float const factor = 1.0f / sqrtf(warpSum(squares) / static_cast<float>(headSize) + epsilon);
    forLaneChannels(channels, headSize, [&](float (&values)[2], int32_t channel) {
        auto const weights = *reinterpret_cast<Two<T> const*>(weight + channel);
        values[0] *= factor * toFloat(weights.values[0]);
        values[1] *= factor * toFloat(weights.values[1]);
    });
}

// Turns the channels i and i + D / 2 by the angle of `position`.
template <CacheType kType, typename T>
__device__ __forceinline__ void turn(LaneChannels& channels, Call<kType, T> const& call, int64_t position)
{
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int32_t const half = call.headSize / 2;
    bool const known = position >= 0 && position < call.positions;
#pragma unroll
    for (int32_t step = 0; step < kLaneSteps; ++step)
    {
        int32_t const channel = kLaneChannels * (step * kWarpSize + lane);
        if (channel >= half)
        {
            continue;
        }
#pragma unroll
        for (int32_t i = 0; i < kLaneChannels; ++i)
        {
            float const cos = known ? toFloat(call.cos[position * half + channel + i]) : NAN;
            float const sin = known ? toFloat(call.sin[position * half + channel + i]) : NAN;
            float const low = channels[step][0][i];
            float const high = channels[step][1][i];
            channels[step][0][i] = low * cos - high * sin;
            channels[step][1][i] = high * cos + low * sin;
        }
    }
}

// Writes the channels to a vector of a cache, in units of scaleOf(channel).
template <typename Element, typename ScaleOf>
__device__ __forceinline__ void store(LaneChannels& channels, int32_t headSize, Element* vector, ScaleOf scaleOf)
{
    forLaneChannels(channels, headSize, [&](float (&values)[2], int32_t channel) {
        Two<Element> result;
        result.values[0] = quantize<Element>(values[0], scaleOf(channel));
        result.values[1] = quantize<Element>(values[1], scaleOf(channel + 1));
        *reinterpret_cast<Two<Element>*>(vector + channel) = result;
    });
}

// Whether all pages of row `row` exist that a query at `place` sees; asked by all lanes of a warp.
template <CacheType kType, typename T>
__device__ __forceinline__ bool seesItsPages(Call<kType, T> const& call, int64_t row, int64_t place)
{
    if (call.places.pageTable == nullptr || place < 0)
    {
        return place >= 0;
    }
    bool missing = false;
    int64_t const last = place >> call.places.shift;
    for (int64_t number = (call.firstSeen(place) >> call.places.shift) + static_cast<int32_t>(threadIdx.x) % kWarpSize;
         number <= last; number += kWarpSize)
    {
        missing = missing || call.places.page(row, number << call.places.shift) < 0;
    }
    return __ballot_sync(kAllLanes, missing) == 0;
}

template <CacheType kType, typename T>
__global__ void __launch_bounds__(kAppendThreads, kAppendBlocks) rotateAndAppend(Call<kType, T> call)
{
    int32_t const vectors = call.heads + 2 * call.keyValueHeads;
    int64_t const index = static_cast<int64_t>(blockIdx.x) * kAppendWarps + static_cast<int32_t>(threadIdx.x) / kWarpSize;
    int64_t const token = index / vectors;
    auto const vector = static_cast<int32_t>(index % vectors);
    if (token >= call.batch * call.sequence) // the whole warp
    {
        return;
    }
    bool const isQuery = vector < call.heads;
    bool const isKey = !isQuery && vector < call.heads + call.keyValueHeads;
    int32_t const head = isQuery ? vector : (vector - call.heads) % call.keyValueHeads;
    T const* const from = (isQuery ? call.query : isKey ? call.key : call.value)
        + token * (isQuery ? call.queryStride : call.keyValueStride) + static_cast<int64_t>(head) * call.headSize;
    LaneChannels channels;
    forLaneChannels(channels, call.headSize, [&](float (&values)[2], int32_t channel) {
        auto const pair = *reinterpret_cast<Two<T> const*>(from + channel);
        values[0] = toFloat(pair.values[0]);
        values[1] = toFloat(pair.values[1]);
    });
    if (isQuery || isKey)
    {
        T const* const weight = isQuery ? call.queryNorm : call.keyNorm;
        if (weight != nullptr)
        {
            normalize(channels, call.headSize, weight, call.epsilon);
        }
        turn(channels, call, call.positionIds[token]);
    }

    int64_t const row = token / call.sequence;
    int64_t const place = call.place(token);
    if (isQuery)
    {
        bool const answers = seesItsPages(call, row, place);
        float const* const scales
            = call.keyScales == nullptr ? nullptr : call.keyScales + head / call.group * call.headSize;
        forLaneChannels(channels, call.headSize, [&](float (&values)[2], int32_t channel) {
            if (!answers)
            {
                values[0] = values[1] = NAN;
            }
            else if (scales != nullptr)
            {
                values[0] *= scales[channel];
                values[1] *= scales[channel + 1];
            }
        });
        auto* const to = call.rotated + (token * call.heads + head) * call.headSize;
        store(channels, call.headSize, to, [](int32_t) { return 1.0f; });
    }
    else if (int64_t const page = place < 0 ? -1 : call.places.page(row, place); page >= 0)
    {
        int64_t const to = call.places.vector(page, head, call.keyValueHeads, place) * call.headSize;
        if (isKey)
        {
            store(channels, call.headSize, call.keyCache + to,
                [&](int32_t channel) { return call.keyScales == nullptr ? 1.0f : call.keyScales[head * call.headSize + channel]; });
        }
        else
        {
            float const scale = call.valueScales == nullptr ? 1.0f : call.valueScales[head];
            store(channels, call.headSize, call.valueCache + to, [&](int32_t) { return scale; });
        }
    }
}

} // namespace attention
} // namespace qwenforge
