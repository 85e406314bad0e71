// What the launchers ask about the current device.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace qwenforge
{

// An attribute of the current device, 0 where there is none.
inline int32_t deviceAttribute(cudaDeviceAttr attribute) noexcept
{
    int device = 0;
    int value = 0;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess)
    {
        static_cast<void>(cudaGetLastError()); // or a later launch would report it
        return 0;
    }
    return value;
}

// The compute capability of the current device, 90 for 9.0; 0 where there is none.
inline int32_t currentSm() noexcept
{
    return 10 * deviceAttribute(cudaDevAttrComputeCapabilityMajor) + deviceAttribute(cudaDevAttrComputeCapabilityMinor);
}

inline int32_t multiprocessors() noexcept
{
    return deviceAttribute(cudaDevAttrMultiProcessorCount);
}

} // namespace qwenforge
