#include "moe/cutlass/grouped_sm90.cuh"

namespace qwenforge
{
namespace moe
{

template struct GroupedKernel<__half, GroupedTile::k128x128>;

} // namespace moe
} // namespace qwenforge
