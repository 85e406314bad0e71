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

// The emulated device is of compute capability 9.0.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int)
{
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
    return cudaSuccess;
}
