// One instantiation of CUTLASS's kernel: sm90_<type>_<tile>.cu holds it, grouped_gemm.cu calls it.

#pragma once

#include "moe/cutlass/grouped_arrays.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace qwenforge
{
namespace moe
{

template <typename T, GroupedTile kTile>
struct GroupedKernel
{
    // What it needs beside the arrays of the groups: a TMA descriptor for each tensor and multiprocessor.
    static size_t workspaceBytes(int32_t multiprocessors) noexcept;

    // `gemm` is valid, `groups` are filled by what is before on the stream, `workspace` is as large as said above.
    static cudaError_t launch(
        GroupedGemm const& gemm, GroupArrays const& groups, void* workspace, cudaStream_t stream) noexcept;
};

extern template struct GroupedKernel<__half, GroupedTile::k64x128>;
extern template struct GroupedKernel<__half, GroupedTile::k128x128>;
extern template struct GroupedKernel<__nv_bfloat16, GroupedTile::k64x128>;
extern template struct GroupedKernel<__nv_bfloat16, GroupedTile::k128x128>;

} // namespace moe
} // namespace qwenforge
