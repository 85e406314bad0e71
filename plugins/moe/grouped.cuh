// What stands around the grouped GEMM: it wants the tokens of an expert one behind the other, and leaves gate and up as rows.
//
//   gatherTokens   gathered[position] = the pair's token                       a block 2048 channels of a pair
//   activate       hidden[position] = silu(gate) * up                          a block 2048 channels of a pair
//
// A thread owns eight channels, which it reads and writes at once. Pairs whose expert is not local have no position.

#pragma once

#include "common/device.cuh"
#include "moe/routing.h"

namespace qwenforge
{
namespace moe
{

constexpr int32_t kRowThreads = 256;
constexpr int32_t kRowChannels = 8 * kRowThreads;

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    gatherTokens(Routing routing, T const* states, int32_t hiddenSize, T* gathered)
{
    int32_t const channel = static_cast<int32_t>(blockIdx.y) * kRowChannels + static_cast<int32_t>(threadIdx.x) * 8;
    int64_t const position = routing.positionOf[blockIdx.x];
    if (position < 0 || channel >= hiddenSize)
    {
        return;
    }
    int64_t const token = static_cast<int32_t>(blockIdx.x) / routing.slots;
    *reinterpret_cast<Eight<T>*>(gathered + position * hiddenSize + channel)
        = *reinterpret_cast<Eight<T> const*>(states + token * hiddenSize + channel);
}

// gateUp [positions, 2 I] has its columns in the order of the packed rows: eight of the gate, then the eight of up.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    activate(Routing routing, T const* gateUp, int32_t intermediateSize, T* hidden)
{
    int32_t const channel = static_cast<int32_t>(blockIdx.y) * kRowChannels + static_cast<int32_t>(threadIdx.x) * 8;
    int64_t const position = routing.positionOf[blockIdx.x];
    if (position < 0 || channel >= intermediateSize)
    {
        return;
    }
    auto const* const both = reinterpret_cast<Eight<T> const*>(gateUp + 2 * (position * intermediateSize + channel));
    Eight<T> const gate = both[0];
    Eight<T> const up = both[1];
    Eight<T> result;
#pragma unroll
    for (int32_t i = 0; i < 8; ++i)
    {
        float const value = toFloat(gate.values[i]);
        result.values[i] = fromFloat<T>(value / (1.0f + expf(-value)) * toFloat(up.values[i]));
    }
    *reinterpret_cast<Eight<T>*>(hidden + position * intermediateSize + channel) = result;
}

} // namespace moe
} // namespace qwenforge
