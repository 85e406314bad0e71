// In the place of grouped_gemm.cu where the library is built without CUTLASS.

#include "moe/cutlass/grouped_gemm.h"

namespace qwenforge
{
namespace moe
{

bool hasGroupedGemm() noexcept
{
    return false;
}

size_t groupedGemmWorkspaceBytes(int32_t, int32_t) noexcept
{
    return 0;
}

cudaError_t launchGroupedGemm(GroupedGemm const&, ElementType, GroupedTile, cudaStream_t) noexcept
{
    return cudaErrorNotSupported;
}

} // namespace moe
} // namespace qwenforge
