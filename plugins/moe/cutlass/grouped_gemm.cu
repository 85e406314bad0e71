#include "moe/cutlass/grouped_gemm.h"

#include "moe/cutlass/grouped_kernel.h"
#include "moe/cutlass/grouped_setup.cuh"

#include <algorithm>

namespace qwenforge
{
namespace moe
{
namespace
{

// The blocks of the largest cluster.
constexpr int32_t kFewestMultiprocessors = 2;

template <typename T>
size_t kernelBytes(int32_t multiprocessors) noexcept
{
    return std::max(GroupedKernel<T, GroupedTile::k64x128>::workspaceBytes(multiprocessors),
        GroupedKernel<T, GroupedTile::k128x128>::workspaceBytes(multiprocessors));
}

bool isValid(GroupedGemm const& gemm) noexcept
{
    return gemm.experts >= 1 && gemm.rows >= 8 && gemm.rows % 8 == 0 && gemm.depth >= 8 && gemm.depth % 8 == 0
        && gemm.multiprocessors >= kFewestMultiprocessors && isAddress(gemm.inputs) && isAddress(gemm.weights)
        && isAddress(gemm.outputs) && gemm.counts != nullptr && gemm.workspace != nullptr
        && reinterpret_cast<uintptr_t>(gemm.workspace) % kGroupedAlignment == 0
        && gemm.workspaceBytes >= groupedGemmWorkspaceBytes(gemm.experts, gemm.multiprocessors);
}

template <typename T>
cudaError_t launchTile(
    GroupedGemm const& gemm, GroupedTile tile, GroupArrays const& groups, void* workspace, cudaStream_t stream) noexcept
{
    return tile == GroupedTile::k64x128
        ? GroupedKernel<T, GroupedTile::k64x128>::launch(gemm, groups, workspace, stream)
        : GroupedKernel<T, GroupedTile::k128x128>::launch(gemm, groups, workspace, stream);
}

} // namespace

bool hasGroupedGemm() noexcept
{
    return true;
}

size_t groupedGemmWorkspaceBytes(int32_t experts, int32_t multiprocessors) noexcept
{
    if (experts < 1 || multiprocessors < kFewestMultiprocessors)
    {
        return 0;
    }
    return GroupArrays(experts, nullptr).bytes
        + std::max(kernelBytes<__half>(multiprocessors), kernelBytes<__nv_bfloat16>(multiprocessors));
}

cudaError_t launchGroupedGemm(
    GroupedGemm const& gemm, ElementType type, GroupedTile tile, cudaStream_t stream) noexcept
{
    if (!isValid(gemm) || (tile != GroupedTile::k64x128 && tile != GroupedTile::k128x128))
    {
        return cudaErrorInvalidValue;
    }
    GroupArrays const groups(gemm.experts, gemm.workspace);
    launchDescribeGroups(gemm, groups, stream);
    cudaError_t const error = cudaGetLastError();
    if (error != cudaSuccess)
    {
        return error; // before CUTLASS asks for a driver that there is not
    }
    void* const rest = static_cast<unsigned char*>(gemm.workspace) + groups.bytes;
    return type == ElementType::kFloat16 ? launchTile<__half>(gemm, tile, groups, rest, stream)
                                         : launchTile<__nv_bfloat16>(gemm, tile, groups, rest, stream);
}

} // namespace moe
} // namespace qwenforge
