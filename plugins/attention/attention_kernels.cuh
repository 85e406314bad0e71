// The kernels of attention over a linear cache, straightforward ones: no tensor cores, every sum in fp32.
//
//   rotateAndAppend   query and key rotated, key and value into the cache   a block a token
//   attend            softmax(scale * q k^T) v over the cache               a block a query head of a token

#pragma once

#include "common/device.cuh"

namespace qwenforge
{
namespace attention
{

constexpr int32_t kMaxHeadSize = 256;
constexpr int32_t kAppendThreads = 256;
constexpr int32_t kAttendWarps = 4;
constexpr int32_t kAttendThreads = kAttendWarps * kWarpSize;

template <typename T>
struct Call
{
    int64_t sequence; // S
    int64_t capacity; // M
    int64_t positions;
    int32_t heads;         // Hq
    int32_t keyValueHeads; // Hk
    int32_t headSize;      // D
    int32_t window;
    float scale;
    T const* query; // [B, S, Hq, D]
    T const* key;   // [B, S, Hk, D]
    T const* value; // [B, S, Hk, D]
    T const* cos;   // [P, D / 2]
    T const* sin;
    int32_t const* positionIds;   // [B, S]
    int32_t const* cachePosition; // [B]
    T* keyCache;                  // [B, Hk, M, D]
    T* valueCache;
    T* rotated; // [B, S, Hq, D]
    T* output;  // [B, S, Hq, D]

    // The place in the cache of token b * S + j, -1 where the cache has none.
    __device__ int64_t place(int64_t token) const
    {
        int64_t const place = cachePosition[token / sequence] + token % sequence;
        return place >= 0 && place < capacity ? place : -1;
    }

    // Where the vector of one place and head begins in a cache.
    __device__ int64_t cacheOffset(int64_t token, int32_t keyValueHead, int64_t place) const
    {
        return ((token / sequence * keyValueHeads + keyValueHead) * capacity + place) * headSize;
    }
};

// Block b * S + j takes one token. Its threads share out the pairs of channels i and i + D / 2 that are rotated together,
// those of the query heads first and those of the key heads behind them, and then the channels of value. Tables are read
// only at positions that they have; another position makes query and key NaN.
template <typename T>
__global__ void __launch_bounds__(kAppendThreads) rotateAndAppend(Call<T> call)
{
    int64_t const token = blockIdx.x;
    int64_t const place = call.place(token);
    int64_t const position = call.positionIds[token];
    bool const known = position >= 0 && position < call.positions;
    int32_t const half = call.headSize / 2;
    int32_t const pairs = (call.heads + call.keyValueHeads) * half;
    for (int32_t index = static_cast<int32_t>(threadIdx.x); index < pairs; index += kAppendThreads)
    {
        int32_t const head = index / half;
        int32_t const channel = index % half;
        float const cos = known ? toFloat(call.cos[position * half + channel]) : NAN;
        float const sin = known ? toFloat(call.sin[position * half + channel]) : NAN;
        bool const isQuery = head < call.heads;
        int32_t const keyHead = head - call.heads;
        if (!isQuery && place < 0)
        {
            continue;
        }
        T const* const from = isQuery ? call.query + (token * call.heads + head) * call.headSize
                                      : call.key + (token * call.keyValueHeads + keyHead) * call.headSize;
        T* const to = isQuery ? call.rotated + (token * call.heads + head) * call.headSize
                              : call.keyCache + call.cacheOffset(token, keyHead, place);
        float const low = toFloat(from[channel]);
        float const high = toFloat(from[channel + half]);
        to[channel] = fromFloat<T>(low * cos - high * sin);
        to[channel + half] = fromFloat<T>(high * cos + low * sin);
    }
    if (place < 0)
    {
        return;
    }
    int32_t const channels = call.keyValueHeads * call.headSize;
    for (int32_t index = static_cast<int32_t>(threadIdx.x); index < channels; index += kAppendThreads)
    {
        int32_t const head = index / call.headSize;
        int32_t const channel = index % call.headSize;
        call.valueCache[call.cacheOffset(token, head, place) + channel] = call.value[token * channels + index];
    }
}

// Block (b * S + j) * Hq + h takes one query head of one token, which sees the keys from `first` to its own place. Warp w
// takes the keys first + w, first + w + 4, ... with a running maximum and sum (online softmax); lane l owns the channels
// l, l + 32, ... of query and sum, at most kChannels of them. Shared memory holds maximum, sum and vector of each warp,
// which are merged in the order of the warps. A token without a place in the cache gets NaN.
template <typename T, int32_t kChannels>
__global__ void __launch_bounds__(kAttendThreads) attend(Call<T> call)
{
    QWENFORGE_SHARED(maxima, float[kAttendWarps]);
    QWENFORGE_SHARED(sums, float[kAttendWarps]);
    QWENFORGE_SHARED(vectors, float[kAttendWarps][kChannels * kWarpSize]);
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int32_t const warp = static_cast<int32_t>(threadIdx.x) / kWarpSize;
    int64_t const token = static_cast<int64_t>(blockIdx.x) / call.heads;
    auto const head = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(call.heads));
    int32_t const keyHead = head / (call.heads / call.keyValueHeads);
    int64_t const row = (token * call.heads + head) * call.headSize;
    int64_t const place = call.place(token);
    int64_t const first = call.window > 0 && place >= call.window ? place - call.window + 1 : 0;
    T const* const keys = call.keyCache + call.cacheOffset(token, keyHead, 0);
    T const* const values = call.valueCache + call.cacheOffset(token, keyHead, 0);

    float query[kChannels];
    float vector[kChannels];
#pragma unroll
    for (int32_t i = 0; i < kChannels; ++i)
    {
        int32_t const channel = lane + i * kWarpSize;
        query[i] = channel < call.headSize ? toFloat(call.rotated[row + channel]) * call.scale : 0.0f;
        vector[i] = 0.0f;
    }
    float maximum = -INFINITY;
    float sum = 0.0f;
    for (int64_t key = first + warp; key <= place; key += kAttendWarps)
    {
        float score = 0.0f;
#pragma unroll
        for (int32_t i = 0; i < kChannels; ++i)
        {
            int32_t const channel = lane + i * kWarpSize;
            score += channel < call.headSize ? query[i] * toFloat(keys[key * call.headSize + channel]) : 0.0f;
        }
        score = warpSum(score);
        float const larger = isLarger(score, maximum) ? score : maximum;
        // While nothing but -inf was seen there is no finite maximum to subtract.
        float const kept = larger == -INFINITY ? 1.0f : expf(maximum - larger);
        float const weight = larger == -INFINITY ? 0.0f : expf(score - larger);
        sum = sum * kept + weight;
#pragma unroll
        for (int32_t i = 0; i < kChannels; ++i)
        {
            int32_t const channel = lane + i * kWarpSize;
            float const value = channel < call.headSize ? toFloat(values[key * call.headSize + channel]) : 0.0f;
            vector[i] = vector[i] * kept + weight * value;
        }
        maximum = larger;
    }
    if (lane == 0)
    {
        maxima[warp] = maximum;
        sums[warp] = sum;
    }
#pragma unroll
    for (int32_t i = 0; i < kChannels; ++i)
    {
        vectors[warp][lane + i * kWarpSize] = vector[i];
    }
    __syncthreads();

    float largest = -INFINITY;
#pragma unroll
    for (int32_t other = 0; other < kAttendWarps; ++other)
    {
        largest = isLarger(maxima[other], largest) ? maxima[other] : largest;
    }
    for (int32_t channel = static_cast<int32_t>(threadIdx.x); channel < call.headSize; channel += kAttendThreads)
    {
        float total = 0.0f;
        float result = 0.0f;
#pragma unroll
        for (int32_t other = 0; other < kAttendWarps; ++other)
        {
            // A warp that saw no key, or nothing but -inf, has nothing to add; where none has, 0 / 0 is NaN.
            float const share = maxima[other] == -INFINITY ? 0.0f : expf(maxima[other] - largest);
            total += sums[other] * share;
            result += vectors[other][channel] * share;
        }
        call.output[row + channel] = fromFloat<T>(place < 0 ? NAN : result / total);
    }
}

} // namespace attention
} // namespace qwenforge
