// The experts' products on Hopper's matrix instructions, by CUTLASS's grouped GEMM. No CUTLASS in here.

#pragma once

#include "common/element_type.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace qwenforge
{
namespace moe
{

// out[p] = weights[e] * in[p] for every position p of every stored expert e; positions are sorted by expert, those of
// an expert begin where those of the one before end. All addresses are the device's, those of tensors multiples of 16
// bytes. R is the sum of the counts, which the host does not know.
struct GroupedGemm
{
    void const* inputs;      // [R, depth]
    void const* weights;     // [experts, rows, depth]
    void* outputs;           // [R, rows]
    int32_t const* counts;   // [experts] positions of an expert, 0 or more
    int32_t experts;         // at least 1
    int32_t rows;            // a multiple of 8
    int32_t depth;           // a multiple of 8
    void* workspace;         // a multiple of 256 bytes
    size_t workspaceBytes;
    int32_t multiprocessors; // of the device, at least 2; as many blocks are launched, however many positions there are
};

// Positions, weight rows and depth of what a block computes at a time.
enum class GroupedTile : int32_t
{
    k64x128,  // 64 x 128 x 64, two warp groups that take turns at products and results
    k128x128, // 128 x 128 x 64, two warp groups that share a tile, two blocks that share the weights they load
};

// Whether this library was built with CUTLASS.
bool hasGroupedGemm() noexcept;

// Workspace in bytes for either tile and type; grows with both numbers. 0 without CUTLASS, without an expert, and for
// fewer multiprocessors than two.
size_t groupedGemmWorkspaceBytes(int32_t experts, int32_t multiprocessors) noexcept;

// Launches two kernels on `stream`: one that writes down each expert's product in the workspace, from `counts`, and
// CUTLASS's. It neither allocates nor waits nor reads anything back, so that the call can be captured in a CUDA graph.
// Sums are in fp32, in an order that does not depend on the counts: the same input gives the same bits.
//
// Returns cudaErrorNotSupported without CUTLASS, cudaErrorInvalidValue for numbers or addresses that are not as above
// or a workspace that is too small, and otherwise what the launches return: on devices of another compute capability
// than 9.0, that there is no kernel for them.
cudaError_t launchGroupedGemm(
    GroupedGemm const& gemm, ElementType type, GroupedTile tile, cudaStream_t stream) noexcept;

} // namespace moe
} // namespace qwenforge
