#include "moe/cutlass/grouped_sm90.cuh"

namespace qwenforge
{
namespace moe
{

template struct GroupedKernel<__nv_bfloat16, GroupedTile::k64x128>;

} // namespace moe
} // namespace qwenforge
