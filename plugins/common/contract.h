// What TensorRT and ONNX Runtime ask about an op's tensors, answered from its specification and its attributes.
//
// Input and output indices of TensorRT are *positions*: they leave out inputs that the attributes make absent. Indices of
// the specification count those too, and so do ONNX Runtime's.

#pragma once

#include "common/element_type.h"
#include "common/message.h"
#include "common/op_spec.h"

namespace qwenforge
{

// The sizes and types that the tensors of one call bring.
struct Binding
{
    int64_t sizes[kMaxSizes];
    nvinfer1::DataType types[kMaxTypeVariables];
};

// The addresses of one call, by indices of the specification; those of absent inputs are null.
struct Tensors
{
    void const* inputs[kMaxTensors];
    void* outputs[kMaxTensors];
};

// Of the type that a type variable is bound to, one that the specifications allow.
inline ElementType elementType(nvinfer1::DataType type) noexcept
{
    return type == nvinfer1::DataType::kBF16 ? ElementType::kBFloat16 : ElementType::kFloat16;
}

class Contract
{
public:
    Contract(OpSpec const& spec, AttributeValue const* attributes) noexcept;

    OpSpec const& spec() const noexcept
    {
        return *mSpec;
    }
    AttributeValue const* attributes() const noexcept
    {
        return mAttributes;
    }
    int32_t inputCount() const noexcept
    {
        return mInputCount;
    }
    int32_t outputCount() const noexcept
    {
        return mSpec->outputCount;
    }

    // The position of the input with an index of the specification, -1 where the attributes make it absent.
    int32_t position(int32_t input) const noexcept
    {
        return mPositionOf[input];
    }

    // The position of the input whose memory an output shares, -1 for none or for an output that does not exist.
    int32_t aliasedInput(int32_t output) const noexcept;

    bool checkCounts(int32_t inputs, int32_t outputs, Message& problem) const noexcept;

    bool outputTypes(nvinfer1::DataType const* inputs, nvinfer1::DataType* outputs, Message& problem) const noexcept;

    bool outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs, nvinfer1::IExprBuilder& builder,
        Message& problem) const noexcept;

    // Reads nothing behind `position`, as TensorRT fills the descriptions one by one.
    bool supportsFormat(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors) const noexcept;

    // At build time: types, formats, ranks and those extents that are known already. Without `outputs` only the inputs'.
    bool checkConfiguration(nvinfer1::DynamicPluginTensorDesc const* inputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, Message& problem) const noexcept;

    // The largest extents that occur for each size, for the workspace. TensorRT bounds each tensor on its own, so the
    // bounds of one size may differ from tensor to tensor. Sizes of which no bound is known become 0.
    Binding maximum(nvinfer1::DynamicPluginTensorDesc const* inputs) const noexcept;

    // At run time: every extent is known and has to agree. `outputs` may be null where they are still to be made.
    bool bind(nvinfer1::PluginTensorDesc const* inputs, nvinfer1::PluginTensorDesc const* outputs, Binding& binding,
        Message& problem) const noexcept;

    nvinfer1::Dims outputShape(int32_t output, Binding const& binding) const noexcept;

    // Of an output, in elements.
    int64_t outputVolume(int32_t output, Binding const& binding) const noexcept;

    // Collects the addresses; false when one that is needed is null or unaligned, or when an output does not share the
    // memory of the input that it aliases; `howToShare` ends that sentence with what the caller is to do.
    bool bindAddresses(void const* const* inputs, void* const* outputs, Binding const& binding, char const* howToShare,
        Tensors& tensors, Message& problem) const noexcept;

private:
    // What is known so far of a type variable or a size, and the tensor that said it.
    struct TypeState
    {
        nvinfer1::DataType types[kMaxTypeVariables]{};
        char const* from[kMaxTypeVariables]{};
    };
    struct SizeState
    {
        int64_t sizes[kMaxSizes]{};
        char const* from[kMaxSizes]{};
    };

    TensorSpec const& tensorAt(int32_t position) const noexcept;
    int64_t extent(DimensionSpec const& dimension, Binding const& binding) const noexcept;
    int64_t volume(TensorSpec const& tensor, Binding const& binding) const noexcept;
    bool acceptType(TensorSpec const& tensor, nvinfer1::DataType type, TypeState& state, Message& problem) const noexcept;
    bool acceptShape(TensorSpec const& tensor, nvinfer1::Dims const& shape, bool unknownAllowed, SizeState& state,
        Message& problem) const noexcept;
    bool accept(TensorSpec const& tensor, nvinfer1::PluginTensorDesc const& given, bool unknownAllowed, TypeState& types,
        SizeState& sizes, Message& problem) const noexcept;
    bool acceptAddress(TensorSpec const& tensor, void const* address, Binding const& binding, Message& problem) const
        noexcept;

    OpSpec const* mSpec;
    AttributeValue mAttributes[kMaxAttributes]{};
    int32_t mInputCount{0};
    int32_t mIndexAt[kMaxTensors]{};    // specification's index of the input at a position
    int32_t mPositionOf[kMaxTensors]{}; // position of the input with an index, -1 where it is absent
};

} // namespace qwenforge
