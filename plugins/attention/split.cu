#include "attention/split.cuh"

#include "common/current_device.h"

namespace qwenforge
{
namespace attention
{
namespace
{

constexpr int64_t kMostParts = 1024; // that splits bring about, on the largest device

int64_t tilesOf(AttentionShape const& shape) noexcept
{
    return ceilDiv(groupRows(shape), kSplitRows);
}

int64_t mostSplits(AttentionShape const& shape) noexcept
{
    int64_t const most = ceilDiv(shape.capacity, kLeastSplitKeys);
    return most < 1 ? 1 : most < kMostSplits ? most : kMostSplits;
}

template <CacheType kType, typename T, int32_t kHead>
cudaError_t launchSplitOf(Call<kType, T> const& call, int32_t splits, void* workspace, cudaStream_t stream)
{
    using L = SplitTiling<kType, T, kHead>;
    static_assert(sizeof(SplitMemory<L>) <= kMostBlockBytes);
    static_assert(kSplitBlocks * (sizeof(SplitMemory<L>) + kReservedBytes) <= 228 * 1024, "SM 90's");
    int64_t const rows = call.sequence * call.group;
    auto const tiles = static_cast<int32_t>(ceilDiv(rows, kSplitRows));
    int64_t const parts = call.batch * call.keyValueHeads * tiles * splits;
    Partials partials{};
    if (splits > 1)
    {
        partials.values = static_cast<float*>(workspace);
        partials.maximum = partials.values + parts * kSplitRows * kHead;
        partials.weight = partials.maximum + parts * kSplitRows;
    }
    cudaError_t const error = QWENFORGE_ALLOW_SHARED((attendSplit<kType, T, kHead>), sizeof(SplitMemory<L>));
    if (error != cudaSuccess)
    {
        return error;
    }
    QWENFORGE_LAUNCH_SHARED((attendSplit<kType, T, kHead>), dim3(static_cast<unsigned>(parts)), dim3(kSplitThreads),
        sizeof(SplitMemory<L>), stream, call, tiles, splits, partials);
    if (splits > 1)
    {
        QWENFORGE_LAUNCH((combineSplits<kType, T, kHead>),
            dim3(static_cast<unsigned>(call.batch * call.keyValueHeads * rows)), dim3(kMergeThreads), stream, call, tiles, splits,
            partials);
    }
    return cudaGetLastError();
}

} // namespace

// Twice as many blocks as the device takes at once, so that rows of unequal lengths even out.
int32_t splitsOf(AttentionShape const& shape) noexcept
{
    int64_t const whole = shape.batch * shape.numKeyValueHeads * tilesOf(shape);
    int64_t const wanted = 2 * kSplitBlocks * static_cast<int64_t>(multiprocessors());
    int64_t const splits = ceilDiv(wanted < kMostParts ? wanted : kMostParts, whole < 1 ? 1 : whole);
    int64_t const most = mostSplits(shape);
    return static_cast<int32_t>(splits < 1 ? 1 : splits < most ? splits : most);
}

// With more than one split there are fewer parts than kMostParts and one more for each that is not divided, which are
// fewer than kMostParts themselves.
size_t partialBytes(AttentionShape const& shape) noexcept
{
    if (shape.headSize != 64 && shape.headSize != 128)
    {
        return 0;
    }
    int64_t const tiles = tilesOf(shape) < kMostSplitRows / kSplitRows ? tilesOf(shape) : kMostSplitRows / kSplitRows;
    int64_t const parts = shape.batch * shape.numKeyValueHeads * tiles * mostSplits(shape);
    int64_t const bounded = parts < 2 * kMostParts ? parts : 2 * kMostParts;
    return static_cast<size_t>(bounded) * kSplitRows * static_cast<size_t>(shape.headSize + 2) * sizeof(float);
}

template <CacheType kType, typename T>
cudaError_t launchSplit(Call<kType, T> const& call, int32_t splits, void* partials, cudaStream_t stream)
{
    return call.headSize == 64 ? launchSplitOf<kType, T, 64>(call, splits, partials, stream)
                               : launchSplitOf<kType, T, 128>(call, splits, partials, stream);
}

#define QWENFORGE_INSTANTIATE(type, T) \
    template cudaError_t launchSplit(Call<CacheType::type, T> const&, int32_t, void*, cudaStream_t)
QWENFORGE_INSTANTIATE(kFloat, __half);
QWENFORGE_INSTANTIATE(kFloat, __nv_bfloat16);
QWENFORGE_INSTANTIATE(kFloat8, __half);
QWENFORGE_INSTANTIATE(kInt8, __half);
#undef QWENFORGE_INSTANTIATE

} // namespace attention
} // namespace qwenforge
