#include "attention/tiled.cuh"

namespace qwenforge
{
namespace attention
{
namespace
{

template <CacheType kType, typename T, int32_t kHead>
cudaError_t launchTiledOf(Call<kType, T> const& call, cudaStream_t stream)
{
    using L = TiledTiling<kType, T, kHead>;
    static_assert(sizeof(TiledMemory<L>) <= kMostBlockBytes);
    static_assert(kTiledBlocks * (sizeof(TiledMemory<L>) + kReservedBytes) <= 164 * 1024, "SM 80's");
    auto const tiles = static_cast<int32_t>(ceilDiv(call.sequence * call.group, kTiledRows));
    cudaError_t const error = QWENFORGE_ALLOW_SHARED((attendTiled<kType, T, kHead>), sizeof(TiledMemory<L>));
    if (error != cudaSuccess)
    {
        return error;
    }
    QWENFORGE_LAUNCH_SHARED((attendTiled<kType, T, kHead>),
        dim3(static_cast<unsigned>(call.batch * call.keyValueHeads * tiles)), dim3(kTiledThreads),
        sizeof(TiledMemory<L>), stream, call, tiles);
    return cudaGetLastError();
}

} // namespace

template <CacheType kType, typename T>
cudaError_t launchTiled(Call<kType, T> const& call, cudaStream_t stream)
{
    return call.headSize == 64 ? launchTiledOf<kType, T, 64>(call, stream) : launchTiledOf<kType, T, 128>(call, stream);
}

#define QWENFORGE_INSTANTIATE(type, T) template cudaError_t launchTiled(Call<CacheType::type, T> const&, cudaStream_t)
QWENFORGE_INSTANTIATE(kFloat, __half);
QWENFORGE_INSTANTIATE(kFloat, __nv_bfloat16);
QWENFORGE_INSTANTIATE(kFloat8, __half);
QWENFORGE_INSTANTIATE(kInt8, __half);
#undef QWENFORGE_INSTANTIATE

} // namespace attention
} // namespace qwenforge
