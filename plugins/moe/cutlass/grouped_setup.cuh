// Fills the arrays of the groups on the device, where alone the experts' counts are known.
//
//   describeGroups   shape, addresses and strides of every expert's product                a warp an expert

#pragma once

#include "common/device.cuh"
#include "moe/cutlass/grouped_arrays.h"

namespace qwenforge
{
namespace moe
{

constexpr int32_t kSetupWarps = 8;

// Lane l adds up the counts l, l + 32, ... of the experts before the warp's own; lane 0 writes. An expert without
// positions gets a product of no rows, at the address where the next one begins.
__global__ void __launch_bounds__(kSetupWarps* kWarpSize) describeGroups(GroupedGemm gemm, GroupArrays groups)
{
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    int32_t const warp = static_cast<int32_t>(threadIdx.x) / kWarpSize;
    int32_t const expert = static_cast<int32_t>(blockIdx.x) * kSetupWarps + warp;
    if (expert >= gemm.experts)
    {
        return; // the whole warp
    }
    int32_t first = 0;
    for (int32_t other = lane; other < expert; other += kWarpSize)
    {
        first += gemm.counts[other];
    }
#pragma unroll
    for (int32_t distance = kWarpSize / 2; distance > 0; distance /= 2)
    {
        first += __shfl_xor_sync(kAllLanes, first, distance);
    }
    if (lane == 0)
    {
        int64_t const inputBytes = gemm.depth * kGroupedElementBytes;
        int64_t const outputBytes = gemm.rows * kGroupedElementBytes;
        int64_t const weightBytes = gemm.rows * inputBytes;
        groups.shapes[expert] = {gemm.counts[expert], gemm.rows, gemm.depth};
        groups.inputs[expert] = static_cast<unsigned char const*>(gemm.inputs) + first * inputBytes;
        groups.weights[expert] = static_cast<unsigned char const*>(gemm.weights) + expert * weightBytes;
        groups.outputs[expert] = static_cast<unsigned char*>(gemm.outputs) + first * outputBytes;
        groups.depthStrides[expert] = gemm.depth;
        groups.rowStrides[expert] = gemm.rows;
    }
}

inline void launchDescribeGroups(GroupedGemm const& gemm, GroupArrays const& groups, cudaStream_t stream)
{
    auto const blocks = static_cast<unsigned>(ceilDiv(gemm.experts, kSetupWarps));
    QWENFORGE_LAUNCH(describeGroups, dim3(blocks), dim3(kSetupWarps * kWarpSize), stream, gemm, groups);
}

} // namespace moe
} // namespace qwenforge
