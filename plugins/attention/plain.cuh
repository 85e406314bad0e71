// Attention without matrix instructions, for head sizes that the others do not have, and to compare them with.
//
//   attendPlain   softmax(scale * q k^T) v over the cache   a block a query head of a token

#pragma once

#include "attention/cache.cuh"

namespace qwenforge
{
namespace attention
{

constexpr int32_t kPlainWarps = 4;
constexpr int32_t kPlainThreads = kPlainWarps * kWarpSize;

// Block (b * S + j) * Hq + h takes one query head of one token, which sees the keys from `first` to its own place. Warp w
// takes the keys first + w, first + w + 4, ... with a running maximum and sum (online softmax); lane l owns the channels
// l, l + 32, ... of query and sum, at most kChannels of them. Shared memory holds maximum, sum and vector of each warp,
// which are merged in the order of the warps. A token without a place in the cache, or with a key in a page that does not
// exist, gets NaN.
template <CacheType kType, typename T, int32_t kChannels>
__global__ void __launch_bounds__(kPlainThreads) attendPlain(Call<kType, T> call)
{
    QWENFORGE_SHARED(maxima, float[kPlainWarps]);
    QWENFORGE_SHARED(sums, float[kPlainWarps]);
    QWENFORGE_SHARED(vectors, float[kPlainWarps][kChannels * kWarpSize]);
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int32_t const warp = static_cast<int32_t>(threadIdx.x) / kWarpSize;
    int64_t const token = static_cast<int64_t>(blockIdx.x) / call.heads;
    auto const head = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(call.heads));
    int32_t const keyHead = head / call.group;
    int64_t const query = (token * call.heads + head) * call.headSize;
    int64_t const row = token / call.sequence;
    int64_t const place = call.place(token);

    float queries[kChannels];
    float vector[kChannels];
#pragma unroll
    for (int32_t i = 0; i < kChannels; ++i)
    {
        int32_t const channel = lane + i * kWarpSize;
        queries[i] = channel < call.headSize ? toFloat(call.rotated[query + channel]) * call.scale : 0.0f;
        vector[i] = 0.0f;
    }
    float maximum = -INFINITY;
    float sum = 0.0f;
    for (int64_t key = call.firstSeen(place) + warp; key <= place; key += kPlainWarps)
    {
        int64_t const page = call.places.page(row, key);
        int64_t const from = page < 0 ? 0 : call.places.vector(page, keyHead, call.keyValueHeads, key) * call.headSize;
        float score = 0.0f;
#pragma unroll
        for (int32_t i = 0; i < kChannels; ++i)
        {
            int32_t const channel = lane + i * kWarpSize;
            score += page >= 0 && channel < call.headSize ? queries[i] * toFloat(call.keyCache[from + channel]) : 0.0f;
        }
        score = page < 0 ? NAN : warpSum(score);
        float const larger = isLarger(score, maximum) ? score : maximum;
        // While nothing but -inf was seen there is no finite maximum to subtract.
        float const kept = larger == -INFINITY ? 1.0f : expf(maximum - larger);
        float const weight = larger == -INFINITY ? 0.0f : expf(score - larger);
        sum = sum * kept + weight;
#pragma unroll
        for (int32_t i = 0; i < kChannels; ++i)
        {
            int32_t const channel = lane + i * kWarpSize;
            float const value = page >= 0 && channel < call.headSize ? toFloat(call.valueCache[from + channel]) : 0.0f;
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
    for (int32_t other = 0; other < kPlainWarps; ++other)
    {
        largest = isLarger(maxima[other], largest) ? maxima[other] : largest;
    }
    float const scale = call.valueScales == nullptr ? 1.0f : call.valueScales[keyHead];
    for (int32_t channel = 2 * static_cast<int32_t>(threadIdx.x); channel < call.headSize; channel += 2 * kPlainThreads)
    {
        float total = 0.0f;
        float first = 0.0f;
        float second = 0.0f;
#pragma unroll
        for (int32_t other = 0; other < kPlainWarps; ++other)
        {
            // A warp that saw no key, or nothing but -inf, has nothing to add; where none has, 0 / 0 is NaN.
            float const share = maxima[other] == -INFINITY ? 0.0f : expf(maxima[other] - largest);
            total += sums[other] * share;
            first += vectors[other][channel] * share;
            second += vectors[other][channel + 1] * share;
        }
        float const factor = place < 0 ? NAN : scale;
        call.write(query + channel, first / total * factor, second / total * factor);
    }
}

} // namespace attention
} // namespace qwenforge
