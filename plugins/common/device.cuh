// What every kernel file needs: conversions, 16-byte accesses, reductions over a warp, and a launch that reports errors.
//
// With QWENFORGE_SIMT the same source is compiled by the host's compiler and run by the emulator of tests/support/simt.

#pragma once

namespace qwenforge
{
template <typename T>
struct SharedType
{
    using Type = T;
};
} // namespace qwenforge

// QWENFORGE_SHARED(sums, float[8]) declares float sums[8] in shared memory.
#ifdef QWENFORGE_SIMT
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>
#define QWENFORGE_SHARED(name, ...) __shared__ typename qwenforge::SharedType<__VA_ARGS__>::Type name
#define QWENFORGE_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
// Kernels whose shared memory is too large to be declared: QWENFORGE_DYNAMIC is its address. A kernel has to be allowed it
// on each device, which is cheap and no work of a stream; the result is a CUDA error.
#define QWENFORGE_ALLOW_SHARED(kernel, bytes) \
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))
#define QWENFORGE_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
    kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)
#define QWENFORGE_DYNAMIC qwenforge::dynamicShared
namespace qwenforge
{
extern __shared__ __align__(16) unsigned char dynamicShared[];
} // namespace qwenforge
#endif

// What the emulator's sanitizer is told about the parts of a workspace; nothing elsewhere.
#ifndef QWENFORGE_FORBID
#define QWENFORGE_FORBID(address, bytes)
#define QWENFORGE_ALLOW(address, bytes)
#endif

#include <cstdint>

namespace qwenforge
{

constexpr int32_t kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int64_t kMaxGrid = 0x7fffffff; // blocks along x

__device__ __forceinline__ float toFloat(__half value)
{
    return __half2float(value);
}

__device__ __forceinline__ float toFloat(__nv_bfloat16 value)
{
    return __bfloat162float(value);
}

template <typename T>
__device__ __forceinline__ T fromFloat(float value);

template <>
__device__ __forceinline__ __half fromFloat<__half>(float value)
{
    return __float2half_rn(value);
}

template <>
__device__ __forceinline__ __nv_bfloat16 fromFloat<__nv_bfloat16>(float value)
{
    return __float2bfloat16_rn(value);
}

// Past the largest E4M3 number, 448, comes 448; infinity, which E4M3 lacks, becomes NaN.
template <>
__device__ __forceinline__ __nv_fp8_e4m3 fromFloat<__nv_fp8_e4m3>(float value)
{
    __nv_fp8_e4m3 result;
    float const finite = value - value == 0.0f ? value : NAN;
    result.__x = __nv_cvt_float_to_fp8(finite, __NV_SATFINITE, __NV_E4M3);
    return result;
}

// `value` itself, which the compiler takes for a new one: in a loop, what follows from it is computed again each time
// instead of being kept in registers.
__device__ __forceinline__ int32_t recomputed(int32_t value)
{
#ifndef QWENFORGE_SIMT
    asm volatile("" : "+r"(value));
#endif
    return value;
}

// Eight elements of 16 bits, read or written in one access; its address is a multiple of 16 bytes.
template <typename T>
struct alignas(16) Eight
{
    T values[8];
};

__device__ __forceinline__ float warpSum(float value)
{
#pragma unroll
    for (int32_t distance = kWarpSize / 2; distance > 0; distance /= 2)
    {
        value += __shfl_xor_sync(kAllLanes, value, distance);
    }
    return value;
}

// NaN counts as larger than every number, so that it is never lost.
__device__ __forceinline__ bool isLarger(float a, float b)
{
    return (a != a && b == b) || a > b;
}

__device__ __forceinline__ float warpMax(float value)
{
#pragma unroll
    for (int32_t distance = kWarpSize / 2; distance > 0; distance /= 2)
    {
        float const other = __shfl_xor_sync(kAllLanes, value, distance);
        value = isLarger(other, value) ? other : value;
    }
    return value;
}

// Whether 16-byte accesses may begin at `address`.
inline bool isAddress(void const* address) noexcept
{
    return address != nullptr && reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

constexpr int64_t ceilDiv(int64_t value, int64_t divisor)
{
    return (value + divisor - 1) / divisor;
}

} // namespace qwenforge
