// What the plugins' sources call of the CUDA runtime, for a build without it: kernels run in the emulator.

#include <cuda_runtime_api.h>

cudaError_t cudaGetLastError()
{
    return cudaSuccess;
}

char const* cudaGetErrorString(cudaError_t)
{
    return "an error of the emulated CUDA runtime";
}

cudaError_t cudaGetDevice(int* device)
{
    *device = 0;
    return cudaSuccess;
}

// An H100's compute capability.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int)
{
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
    return cudaSuccess;
}
