// One node of a graph in ONNX Runtime: its attributes and tensors checked, its workspace taken, its op launched.

#pragma once

#include "common/contract.h"
#include "onnxruntime/ort.h"

#include <cuda_runtime_api.h>

#include <new>

namespace qwenforge
{

// The functions of an op (MoeOp and its like), so that the front end is compiled once for all of them.
struct OpTable
{
    OpSpec const& spec;
    size_t (*workspaceBytes)(Contract const& contract, Binding const& binding) noexcept;
    bool (*checkSizes)(Contract const& contract, Binding const& binding, Message& problem) noexcept;
    cudaError_t (*launch)(Contract const& contract, Binding const& binding, Tensors const& tensors, void* workspace,
        size_t workspaceBytes, cudaStream_t stream) noexcept;
    // Gives the number of outputs that share an input's memory, their indices and those inputs', in memory for delete[].
    size_t (*aliasMap)(int** inputs, int** outputs) noexcept;
};

// ONNX Runtime asks without saying of which op, so that each has a function of its own.
template <typename Op>
size_t aliasMap(int** inputs, int** outputs) noexcept
{
    OpSpec const& spec = Op::spec();
    *inputs = new (std::nothrow) int[kMaxTensors];
    *outputs = new (std::nothrow) int[kMaxTensors];
    size_t count = 0;
    for (int32_t i = 0; *inputs != nullptr && *outputs != nullptr && i < spec.outputCount; ++i)
    {
        if (spec.outputs[i].aliases >= 0)
        {
            (*inputs)[count] = spec.outputs[i].aliases;
            (*outputs)[count++] = i;
        }
    }
    return count;
}

template <typename Op>
inline constexpr OpTable kOpTable{Op::spec(), Op::workspaceBytes, Op::checkSizes, Op::launch, aliasMap<Op>};

// Immutable after creation: a session may run it from several threads.
class Kernel
{
public:
    // Null and an object in `kernel`, or what is wrong with the node: an attribute, a tensor that has to be there or must
    // not, a type, an extent that the graph knows already, or a constant where the op writes.
    static OrtStatus* create(OrtApi const& api, OpTable const& op, OrtKernelInfo const* info, Kernel*& kernel) noexcept;

    Kernel(Kernel const&) = delete;
    Kernel& operator=(Kernel const&) = delete;
    ~Kernel();

    OrtStatus* compute(OrtKernelContext* context) const noexcept;

private:
    Kernel(OrtApi const& api, OpTable const& op, AttributeValue const* attributes) noexcept;

    OrtStatus* checkNode(OrtKernelInfo const* info) const noexcept;
    OrtStatus* checkWritten(OrtKernelInfo const* info) const noexcept;
    OrtStatus* bind(OrtKernelContext* context, Binding& binding, Tensors& tensors) const noexcept;
    OrtStatus* launch(OrtKernelContext* context, Binding const& binding, Tensors const& tensors) const noexcept;
    bool checkPresence(int32_t input, bool given, Message& problem) const noexcept;

    OrtApi const& mApi;
    OpTable const& mOp;
    Contract mContract;
    OrtAllocator* mAllocator{nullptr};
    OrtMemoryInfo const* mMemory{nullptr}; // the allocator's
};

} // namespace qwenforge
