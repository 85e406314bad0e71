// Launching the two products of the experts; experts.cuh has the kernels, one source file for each way of storing weights.

#pragma once

#include "moe/experts.cuh"

namespace qwenforge
{
namespace moe
{

struct ExpertCall
{
    Routing routing;
    Product up;
    Product down;
    unsigned tiles; // at least as many as there will be
};

// routing.tileTokens is 8, 16 or wideTokens(kType).
template <WeightType kType>
void launchExperts(ExpertCall const& call, ElementType type, cudaStream_t stream);

extern template void launchExperts<WeightType::kFloat>(ExpertCall const&, ElementType, cudaStream_t);
extern template void launchExperts<WeightType::kInt8>(ExpertCall const&, ElementType, cudaStream_t);
extern template void launchExperts<WeightType::kInt4>(ExpertCall const&, ElementType, cudaStream_t);
extern template void launchExperts<WeightType::kFloat8>(ExpertCall const&, ElementType, cudaStream_t);

template <WeightType kType, typename T, int32_t kTokens>
void launchTiles(ExpertCall const& call, cudaStream_t stream)
{
    constexpr int32_t kRows = Layout<Format<kType, T>, T, kTokens>::kRows;
    dim3 const threads(kThreads);
    dim3 const up(call.tiles, static_cast<unsigned>(ceilDiv(call.up.rows, kRows)));
    dim3 const down(call.tiles, static_cast<unsigned>(ceilDiv(call.down.rows, kRows)));
    QWENFORGE_LAUNCH((projectUp<kType, T, kTokens>), up, threads, stream, call.routing, call.up);
    QWENFORGE_LAUNCH((projectDown<kType, T, kTokens>), down, threads, stream, call.routing, call.down);
}

template <WeightType kType, typename T>
void launchTyped(ExpertCall const& call, cudaStream_t stream)
{
    switch (call.routing.tileTokens)
    {
    case 8: launchTiles<kType, T, 8>(call, stream); break;
    case 16: launchTiles<kType, T, 16>(call, stream); break;
    default: launchTiles<kType, T, wideTokens(kType)>(call, stream); break;
    }
}

template <WeightType kType>
void launchExperts(ExpertCall const& call, ElementType type, cudaStream_t stream)
{
    type == ElementType::kFloat16 ? launchTyped<kType, __half>(call, stream)
                                  : launchTyped<kType, __nv_bfloat16>(call, stream);
}

} // namespace moe
} // namespace qwenforge
