// The mixture of experts on the device; plugins/moe/op.yaml says what it computes. No TensorRT in here.

#pragma once

#include "common/current_device.h"
#include "common/element_type.h"
#include "common/message.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace qwenforge
{

// How the experts' weights are stored; plugins/moe/README.md describes the layouts.
enum class WeightType : int32_t
{
    kFloat = 0,  // as the tokens, 16 bits
    kInt8 = 1,   // one scale a row
    kInt4 = 2,   // one scale for 64 or 128 columns of a row
    kFloat8 = 3, // E4M3, one scale a row; tokens become E4M3 too, with static scales. SM 89 and up
};

// C is hiddenSize, I intermediateSize, E numExperts, El numLocalExperts, Es numSharedExperts.
struct MoeShape
{
    int64_t tokens;           // T, any number of them, 0 included
    int32_t hiddenSize;       // a multiple of 8, of 64 where weights are not kFloat
    int32_t intermediateSize; // the same
    int32_t numExperts;       // 1..256
    int32_t firstLocalExpert; // the experts whose weights are given are firstLocalExpert .. firstLocalExpert + El - 1
    int32_t numLocalExperts;  // 1..E
    int32_t numSharedExperts; // 0..64
    int32_t topK;             // 1..8, at most E
    int32_t normalizeTopK;    // 0 or 1
    WeightType weightType;
    int32_t groupSize; // columns that share a scale: kRowGroupSize, or for kInt4 64 or 128
};

constexpr int32_t kRowGroupSize = 65536;

// Device addresses, multiples of 16 bytes. T is the type given to launchMoe; packed weights are bytes.
struct MoeTensors
{
    void const* hiddenStates;     // T [T, C]
    void const* routerLogits;     // T [T, E]
    void const* gateUpWeights;    // [El + Es, 2 I, C], packed
    void const* downWeights;      // [El + Es, C, I], packed
    void const* sharedGateLogits; // T [T, 1]; null when Es is 0
    void const* gateUpScales;     // [El + Es, groups of C, 2 I], T for kInt4 and else fp32; null for kFloat
    void const* downScales;       // [El + Es, groups of I, C], the same
    void const* activationScales; // fp32 [1 + El + Es]: of the tokens, and of each expert's activated channels; for kFloat8
    void* output;                 // T [T, C]
};

// How the products of the experts are computed.
enum class MoePath : int32_t
{
    kTable = 0,   // what moe/tactics says for this GPU and number of tokens
    kEight = 1,   // tiles of 8 tokens, the columns of a weight row spread over four warps
    kSixteen = 2, // the same with 16 tokens
    kWide = 3,    // tiles of 64 tokens, with INT4 and FP8 weights of 48
    kGrouped = 4, // CUTLASS's grouped GEMM: SM 90, kFloat weights; only in a library built with CUTLASS
};

// What the table says: never kTable, and a path that this library has. Of a shape with more than 2048 tokens, for those.
MoePath chosenPath(MoeShape const& shape, int32_t sm);

// Whether the shape can be computed on `sm` (0: on any); `problem` says by name what is wrong, and what to do instead.
bool checkMoe(MoeShape const& shape, int32_t sm, Message& problem);

// Workspace in bytes, 0 for a shape that cannot be computed: grows with T up to a chunk of 2048 tokens, which larger
// batches go through one after the other. kGrouped needs more than the others, and the current device to say how much.
size_t moeWorkspaceBytes(MoeShape const& shape, MoePath path = MoePath::kTable);

// Launches the kernels on `stream`, and neither allocates nor waits. The grids follow from the shape alone, so that the
// call can be captured in a CUDA graph. The same input gives the same bits on the same path.
//
// Returns cudaErrorInvalidValue for a shape or an address that is not as above or a workspace that is too small,
// cudaErrorNotSupported for weights or a path that this GPU or this library lacks, cudaSuccess without a launch when T is
// 0, and otherwise what the launches return.
cudaError_t launchMoe(MoeShape const& shape, ElementType type, MoeTensors const& tensors, void* workspace,
    size_t workspaceBytes, cudaStream_t stream, MoePath path = MoePath::kTable);

} // namespace qwenforge
