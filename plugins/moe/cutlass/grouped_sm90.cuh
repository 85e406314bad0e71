// CUTLASS's grouped GEMM for compute capability 9.0: one warp group loads tensors by TMA, two others multiply by wgmma.
// A block goes from tile to tile, and learns from the shapes in device memory whose tile it is.
//
// A is the inputs and M their positions, B the weights and N their rows, both with the depth K innermost. A tile behind
// an expert's last position or row is filled up with zeros and stored only as far as the expert's own go.
//
// The host's part of a call may be captured: it encodes three TMA descriptors, in which the device will replace shapes,
// strides and addresses (by cuTensorMapEncodeTiled, which CUTLASS gets from the runtime: nothing is linked to the
// driver), sets an attribute of the kernel, and launches it. The launch is ours and not that of CUTLASS's adapter,
// which gives an error of its own for every one of CUDA's.

#pragma once

#include "moe/cutlass/grouped_kernel.h"

#include <cute/tensor.hpp>
#include <cutlass/bfloat16.h>
#include <cutlass/device_kernel.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/epilogue/thread/activation.h>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/half.h>
#include <cutlass/layout/matrix.h>

#include <type_traits>

namespace qwenforge
{
namespace moe
{

template <typename T>
using CutlassElement = std::conditional_t<std::is_same_v<T, __half>, cutlass::half_t, cutlass::bfloat16_t>;

template <GroupedTile kTile>
struct TileOf;

template <>
struct TileOf<GroupedTile::k64x128>
{
    using Shape = cute::Shape<cute::_64, cute::_128, cute::_64>;
    using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
    using Schedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong;
    using EpilogueSchedule = cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong;
};

template <>
struct TileOf<GroupedTile::k128x128>
{
    using Shape = cute::Shape<cute::_128, cute::_128, cute::_64>;
    using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
    using Schedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
    using EpilogueSchedule = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
};

// The types of CUTLASS that make up one kernel. A layout with a star is one whose strides are in an array.
template <typename T, GroupedTile kTile>
struct GroupedTypes
{
    using Element = CutlassElement<T>;
    using Tile = TileOf<kTile>;
    using Arch = cutlass::arch::Sm90;
    using TensorOp = cutlass::arch::OpClassTensorOp;
    using RowMajor = cutlass::layout::RowMajor*;
    using WeightsLayout = cutlass::layout::ColumnMajor*; // [depth, rows] in CUTLASS's terms
    static constexpr int kAlignment = 16 / static_cast<int>(sizeof(Element));

    // The sums as they are, rounded to the element type; no other tensor is read.
    using Result = cutlass::epilogue::fusion::Sm90EVT<
        cutlass::epilogue::fusion::Sm90Compute<cutlass::epilogue::thread::Identity, Element, float,
            cutlass::FloatRoundStyle::round_to_nearest>,
        cutlass::epilogue::fusion::Sm90AccFetch>;
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<Arch, TensorOp, typename Tile::Shape,
        typename Tile::Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor,
        kAlignment, Element, RowMajor, kAlignment, typename Tile::EpilogueSchedule, Result>::CollectiveOp;
    // As many stages as fit the shared memory that the epilogue leaves.
    using Stages
        = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<Arch, TensorOp, Element, RowMajor,
        kAlignment, Element, WeightsLayout, kAlignment, float, typename Tile::Shape, typename Tile::Cluster, Stages,
        typename Tile::Schedule>::CollectiveOp;
    using Shape = cute::Shape<int, int, int>;
    using Kernel
        = cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<Shape>, Mainloop, Epilogue>;

    // describeGroups writes what the kernel reads as these types.
    static constexpr GroupShape kExample = __builtin_bit_cast(GroupShape, Shape{2, 3, 5});
    static_assert(sizeof(Shape) == sizeof(GroupShape) && alignof(Shape) == alignof(GroupShape));
    static_assert(kExample.positions == 2 && kExample.rows == 3 && kExample.depth == 5);
    using Stride = cute::Stride<int64_t, cute::Int<1>, cute::Int<0>>; // two of three are known and take no room
    static_assert(sizeof(Stride) == sizeof(int64_t) && alignof(Stride) == alignof(int64_t));
    static_assert(std::is_same_v<typename Kernel::StrideA, Stride*> && std::is_same_v<typename Kernel::StrideB, Stride*>
        && std::is_same_v<typename Kernel::StrideD, Stride*>);
    static_assert(sizeof(Element) == kGroupedElementBytes);
};

template <typename T, GroupedTile kTile>
typename GroupedTypes<T, kTile>::Kernel::Arguments groupedArguments(
    GroupedGemm const& gemm, GroupArrays const& groups) noexcept
{
    using Types = GroupedTypes<T, kTile>;
    using Element = typename Types::Element;
    using Stride = typename Types::Stride;
    constexpr int32_t kCluster = cute::size(typename Types::Tile::Cluster{});
    typename Types::Kernel::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    arguments.problem_shape.num_groups = gemm.experts;
    arguments.problem_shape.problem_shapes = reinterpret_cast<typename Types::Shape*>(groups.shapes);
    arguments.mainloop.ptr_A = reinterpret_cast<Element const**>(groups.inputs);
    arguments.mainloop.dA = reinterpret_cast<Stride*>(groups.depthStrides);
    arguments.mainloop.ptr_B = reinterpret_cast<Element const**>(groups.weights);
    arguments.mainloop.dB = reinterpret_cast<Stride*>(groups.depthStrides);
    arguments.epilogue.ptr_D = reinterpret_cast<Element**>(groups.outputs);
    arguments.epilogue.dD = reinterpret_cast<Stride*>(groups.rowStrides);
    arguments.hw_info.sm_count = gemm.multiprocessors / kCluster * kCluster; // whole clusters
    return arguments;
}

template <typename T, GroupedTile kTile>
size_t GroupedKernel<T, kTile>::workspaceBytes(int32_t multiprocessors) noexcept
{
    GroupedGemm gemm{};
    gemm.multiprocessors = multiprocessors;
    return GroupedTypes<T, kTile>::Kernel::get_workspace_size(
        groupedArguments<T, kTile>(gemm, GroupArrays(/*experts=*/0, /*base=*/nullptr)));
}

template <typename T, GroupedTile kTile>
cudaError_t GroupedKernel<T, kTile>::launch(
    GroupedGemm const& gemm, GroupArrays const& groups, void* workspace, cudaStream_t stream) noexcept
{
    using Kernel = typename GroupedTypes<T, kTile>::Kernel;
    using Cluster = typename TileOf<kTile>::Cluster;
    auto const arguments = groupedArguments<T, kTile>(gemm, groups);
    if (Kernel::initialize_workspace(arguments, workspace, stream) != cutlass::Status::kSuccess)
    {
        return cudaErrorUnknown;
    }
    auto const params = Kernel::to_underlying_arguments(arguments, workspace);
    auto* const kernel = &cutlass::device_kernel<Kernel>;
    cudaError_t const error
        = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
    if (error != cudaSuccess)
    {
        return error;
    }
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {cute::size<0>(Cluster{}), cute::size<1>(Cluster{}), cute::size<2>(Cluster{})};
    cudaLaunchConfig_t config{};
    config.gridDim = Kernel::get_grid_shape(params);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = Kernel::SharedStorageSize;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = cute::size(Cluster{}) > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, params);
}

} // namespace moe
} // namespace qwenforge
