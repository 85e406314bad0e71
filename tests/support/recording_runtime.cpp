// In the place of CUDA's runtime, where there is no GPU: says what it is asked for, one call a line on stdout, and
// launches nothing. It has only what moe/cutlass may call; any other call of the runtime is one to address 0.
//
//   launch GRID BLOCK SHARED            kernel<<<...>>>
//   encode BOX SWIZZLE                  a TMA descriptor: elements of a box, bytes of a swizzled row
//   allow SHARED                        bytes of shared memory that a kernel may have
//   launch GRID BLOCK SHARED CLUSTER    cudaLaunchKernelExC

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>

namespace
{

struct
{
    dim3 grid;
    dim3 block;
    size_t shared;
    cudaStream_t stream;
} pushed;

CUresult encode(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank, void*, cuuint64_t const*, cuuint64_t const*,
    cuuint32_t const* box, cuuint32_t const*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
    CUtensorMapFloatOOBfill)
{
    int const bytes = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16 << static_cast<int>(swizzle);
    std::printf("encode %ux%u %d\n", box[0], box[1], bytes);
    return rank == 2 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

void sayLaunch(dim3 grid, dim3 block, size_t shared)
{
    std::printf("launch %ux%ux%u %u %zu", grid.x, grid.y, grid.z, block.x * block.y * block.z, shared);
}

} // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*)
{
    static void* handle = nullptr;
    return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, char const*, char*, char const*, int, uint3*, uint3*, dim3*, dim3*, int*) {}

void __cudaRegisterVar(void**, char*, char*, char const*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream)
{
    pushed = {grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream)
{
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *static_cast<cudaStream_t*>(stream) = pushed.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, void const*)
{
    *kernel = nullptr;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t)
{
    sayLaunch(grid, block, shared);
    std::puts("");
    return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(cudaLaunchConfig_t const* config, void const*, void**)
{
    sayLaunch(config->gridDim, config->blockDim, config->dynamicSmemBytes);
    for (unsigned i = 0; i < config->numAttrs; ++i)
    {
        auto const& size = config->attrs[i].val.clusterDim;
        bool const isCluster = config->attrs[i].id == cudaLaunchAttributeClusterDimension;
        isCluster ? std::printf(" %ux%ux%u", size.x, size.y, size.z) : std::printf(" another attribute");
    }
    std::puts("");
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(void const*, cudaFuncAttribute attribute, int value)
{
    std::printf("allow %d\n", value);
    return attribute == cudaFuncAttributeMaxDynamicSharedMemorySize ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaGetDriverEntryPointByVersion(
    char const* name, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result)
{
    *function = reinterpret_cast<void*>(&encode);
    bool const isEncode = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
    *result = isEncode ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

cudaError_t cudaGetLastError()
{
    return cudaSuccess;
}

char const* cudaGetErrorName(cudaError_t error)
{
    return error == cudaSuccess ? "cudaSuccess" : "an error";
}

} // extern "C"
