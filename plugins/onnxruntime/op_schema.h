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
// for a kernel, and only where the op fixes it: so an op is registered once for each type of its type variable, and the
// first input of that type decides. The types of the other inputs are left to the kernel, whose errors have names in them.
//
// Inputs are at the places of the specification, those that the attributes make absent left empty.
//
// It is registered for an execution provider that has no kernels too, to say so in a session without CUDA: ONNX Runtime
// 1.31 would cast the inputs of a node that nobody takes to float32, and then complain of their type.
class CustomOp : private OrtCustomOp
{
public:
    CustomOp(OrtApi const& api, OpTable const& table, nvinfer1::DataType type, char const* provider) noexcept;

    // To an OrtCustomOpDomain, which keeps the address.
    OrtStatus* addTo(OrtCustomOpDomain* domain) const noexcept;

private:
    static CustomOp const& of(OrtCustomOp const* op) noexcept;

    ONNXTensorElementDataType typeOf(TensorSpec const& tensor) const noexcept;
    ONNXTensorElementDataType inputType(size_t index) const noexcept;
    OrtStatus* createKernel(OrtApi const& api, OrtKernelInfo const* info, Kernel*& kernel) const noexcept;
    OrtStatus* inferShapes(OrtShapeInferContext* context) const noexcept;

    OrtApi const* mApi;
    OpTable const* mTable;
    nvinfer1::DataType mType;
    char const* mProvider;
};

} // namespace qwenforge
