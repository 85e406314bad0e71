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
