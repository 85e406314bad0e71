// An op as ONNX Runtime's registry knows it.

#pragma once

#include "onnxruntime/kernel.h"

namespace qwenforge
{

// What an op is called, takes and returns, for one type of its tensors. ONNX Runtime tells an output's type before it asks
// for a kernel, and only where the op fixes it: so an op is registered once for each type of its type variable, and the
// first input of that type decides. The types of the other inputs are left to the kernel, whose errors have names in them.
//
// Inputs are at the places of the specification, those that the attributes make absent left empty.
class CustomOp : private OrtCustomOp
{
public:
    CustomOp(OrtApi const& api, OpTable const& table, nvinfer1::DataType type) noexcept;

    // To an OrtCustomOpDomain, which keeps the address.
    OrtStatus* addTo(OrtCustomOpDomain* domain) const noexcept;

private:
    static CustomOp const& of(OrtCustomOp const* op) noexcept;

    ONNXTensorElementDataType typeOf(TensorSpec const& tensor) const noexcept;
    ONNXTensorElementDataType inputType(size_t index) const noexcept;
    OrtStatus* inferShapes(OrtShapeInferContext* context) const noexcept;

    OrtApi const* mApi;
    OpTable const* mTable;
    nvinfer1::DataType mType;
};

} // namespace qwenforge
