// ONNX Runtime's objects in the terms of a Contract.

#pragma once

#include "common/message.h"
#include "common/op_spec.h"
#include "onnxruntime/ort.h"

#include <memory>

namespace qwenforge
{

ONNXTensorElementDataType elementTypeOf(nvinfer1::DataType type) noexcept;
nvinfer1::DataType dataTypeOf(ONNXTensorElementDataType type) noexcept;

// Reads and checks the attributes of a node into `values` [spec.attributeCount].
bool readAttributes(OrtApi const& api, OpSpec const& spec, OrtKernelInfo const* info, AttributeValue* values,
    Message& problem) noexcept;

// Type and shape in the linear format. Extents that are not known are -1; a rank of 0 may be one that is not known.
OrtStatus* describe(
    OrtApi const& api, OrtTensorTypeAndShapeInfo const* info, nvinfer1::PluginTensorDesc& description) noexcept;

OrtStatus* describe(OrtApi const& api, OrtValue const* value, nvinfer1::PluginTensorDesc& description) noexcept;

OrtStatus* addressOf(OrtApi const& api, OrtValue const* value, void*& address) noexcept;

inline OrtStatus* refusal(OrtApi const& api, Message const& problem) noexcept
{
    return api.CreateStatus(ORT_INVALID_ARGUMENT, problem.text());
}

// "QwenForgeMoE 'layer 3': " and the problem, for an error that ONNX Runtime passes on as it is.
OrtStatus* refuseNode(
    OrtApi const& api, OpSpec const& spec, OrtKernelInfo const* info, Message const& problem) noexcept;

template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

} // namespace qwenforge
