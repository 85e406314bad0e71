// An op as ONNX Runtime's registry knows it.

#pragma once

#include "onnxruntime/kernel.h"

namespace qwenforge
{

// The execution providers that an op is registered for: the one with the kernels, and the one of every session.
#ifdef QWENFORGE_SIMT
inline constexpr char const* kProviders[]{"CPUExecutionProvider"}; // the kernels are emulated
#else
inline constexpr char const* kProviders[]{"CUDAExecutionProvider", "CPUExecutionProvider"};
#endif

// What an op is called, takes and returns, for one type of its tensors. ONNX Runtime tells an output's type before it asks
// for a kernel, from the types of the inputs alone: so an op is registered once for each type of its type variable, and
// where an attribute chooses types of outputs, for each of those that it can choose. Two inputs decide which registration
// a node belongs to, the first of the type variable and the first whose type the attribute chooses. The types of the
// others are left to the kernel, whose errors have names in them; it also checks the attribute against the type.
//
// Outputs that share an input's memory are declared (GetAliasMap): inside of a graph ONNX Runtime then gives both one
// buffer. At the edges of a graph its caller does, and the kernel refuses the call where he did not.
//
// Inputs are at the places of the specification, those that the attributes make absent left empty.
//
// It is registered for an execution provider that has no kernels too, to say so in a session without CUDA: ONNX Runtime
// 1.31 would cast the inputs of a node that nobody takes to float32, and then complain of their type.
class CustomOp : private OrtCustomOp
{
public:
    // `type` is that of the type variable, `choice` a value of the attribute that chooses types of outputs.
    CustomOp(OrtApi const& api, OpTable const& table, nvinfer1::DataType type, int32_t choice,
        char const* provider) noexcept;

    // To an OrtCustomOpDomain, which keeps the address.
    OrtStatus* addTo(OrtCustomOpDomain* domain) const noexcept;

private:
    static CustomOp const& of(OrtCustomOp const* op) noexcept;

    ONNXTensorElementDataType typeOf(TensorSpec const& tensor) const noexcept;
    ONNXTensorElementDataType inputType(size_t index) const noexcept;
    OrtStatus* createKernel(OrtApi const& api, OrtKernelInfo const* info, Kernel*& kernel) const noexcept;

    OrtApi const* mApi;
    OpTable const* mTable;
    nvinfer1::DataType mType;
    int32_t mChoice;
    char const* mProvider;
};

} // namespace qwenforge
