#include "onnxruntime/shape_inference.h"

#include "common/fields.h"
#include "onnxruntime/ort_values.h"

namespace qwenforge
{
namespace
{

// A number, or -1 and the graph's name for it, which may be empty.
struct Extent
{
    int64_t value{-1};
    char const* name{""};

    bool isKnown() const noexcept
    {
        return value >= 0 || name[0] != '\0';
    }
    bool saysMoreThan(Extent const& other) const noexcept
    {
        return other.value < 0 && (value >= 0 || (isKnown() && !other.isKnown()));
    }
};

// Of type variables, and of what an attribute chooses for outputs.
struct Types
{
    ONNXTensorElementDataType variables[kMaxTypeVariables]{};
    ONNXTensorElementDataType chosen{ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED};
};

// Where the type of a tensor is kept, null for a type that is fixed or that an attribute chooses for inputs only. What is
// chosen comes from the first input of that choice, as with the registrations of an op (op_schema.h), and not from the
// attribute: where the two disagree the kernel says so by name.
ONNXTensorElementDataType* typeOf(OpSpec const& spec, TensorSpec const& tensor, Types& types) noexcept
{
    if (tensor.typeAttribute >= 0)
    {
        return tensor.typeAttribute == typeChoosingAttribute(spec) ? &types.chosen : nullptr;
    }
    return tensor.types->variable < 0 ? nullptr : &types.variables[tensor.types->variable];
}

// Takes from one input the sizes that its dimensions bring. Of another rank than the specification's its shape is not
// known, or is refused by the kernel.
OrtStatus* readSizes(OrtApi const& api, OrtTensorTypeAndShapeInfo const* info, TensorSpec const& tensor,
    Extent* sizes) noexcept
{
    size_t rank = 0;
    int64_t values[nvinfer1::Dims::MAX_DIMS]{};
    char const* names[nvinfer1::Dims::MAX_DIMS]{};
    if (OrtStatus* const status = api.GetDimensionsCount(info, &rank))
    {
        return status;
    }
    if (rank != static_cast<size_t>(tensor.rank))
    {
        return nullptr;
    }
    if (OrtStatus* const status = api.GetDimensions(info, values, rank))
    {
        return status;
    }
    if (OrtStatus* const status = api.GetSymbolicDimensions(info, names, rank))
    {
        return status;
    }
    for (size_t axis = 0; axis < rank; ++axis)
    {
        int32_t const size = tensor.shape[axis].size;
        bool const isNamed = names[axis] != nullptr && names[axis][0] != '\0';
        Extent const found{isNamed ? -1 : values[axis], isNamed ? names[axis] : ""};
        if (size >= 0 && found.saysMoreThan(sizes[size]))
        {
            sizes[size] = found;
        }
    }
    return nullptr;
}

// Whether the node has all attributes, in their ranges; where it has not, the kernel says what is wrong.
bool readAttributes(
    OrtApi const& api, OpSpec const& spec, OrtShapeInferContext const* context, AttributeValue* values) noexcept
{
    for (int32_t i = 0; i < spec.attributeCount; ++i)
    {
        bool const isInt = spec.attributes[i].type == AttributeType::kInt;
        OrtOpAttr const* attribute = nullptr; // the node's
        int64_t integer = 0;
        size_t needed = 0;
        OrtStatus* status = api.ShapeInferContext_GetAttribute(context, spec.attributes[i].name, &attribute);
        if (status == nullptr)
        {
            status = isInt ? api.ReadOpAttr(attribute, ORT_OP_ATTR_INT, &integer, sizeof(integer), &needed)
                           : api.ReadOpAttr(attribute, ORT_OP_ATTR_FLOAT, &values[i].real, sizeof(float), &needed);
        }
        if (status != nullptr)
        {
            api.ReleaseStatus(status);
            return false;
        }
        if (isInt)
        {
            values[i].integer = static_cast<int32_t>(integer);
        }
    }
    Message ignored;
    return checkValues(spec, values, ignored);
}

// Leaves the shape out where an extent is neither a number nor has a name: this interface would make it the number -1,
// equal to every other such extent when ONNX Runtime plans which tensors can share memory.
OrtStatus* setOutput(OrtApi const& api, OrtShapeInferContext* context, int32_t output, ONNXTensorElementDataType type,
    Extent const* extents, int32_t rank) noexcept
{
    int64_t values[nvinfer1::Dims::MAX_DIMS]{};
    char const* names[nvinfer1::Dims::MAX_DIMS]{};
    for (int32_t axis = 0; axis < rank; ++axis)
    {
        if (!extents[axis].isKnown())
        {
            return nullptr;
        }
        values[axis] = extents[axis].value;
        names[axis] = extents[axis].name;
    }
    OrtTensorTypeAndShapeInfo* info = nullptr;
    if (OrtStatus* const status = api.CreateTensorTypeAndShapeInfo(&info))
    {
        return status;
    }
    Owned<OrtTensorTypeAndShapeInfo> const owned(info, api.ReleaseTensorTypeAndShapeInfo);
    if (OrtStatus* const status = api.SetTensorElementType(info, type))
    {
        return status;
    }
    if (OrtStatus* const status = api.SetDimensions(info, values, static_cast<size_t>(rank)))
    {
        return status;
    }
    if (OrtStatus* const status = api.SetSymbolicDimensions(info, names, static_cast<size_t>(rank)))
    {
        return status;
    }
    return api.ShapeInferContext_SetOutputTypeShape(context, static_cast<size_t>(output), info);
}

} // namespace

OrtStatus* inferOutputShapes(OrtApi const& api, OpSpec const& spec, OrtShapeInferContext* context) noexcept
{
    AttributeValue attributes[kMaxAttributes]{};
    if (!readAttributes(api, spec, context, attributes))
    {
        return nullptr;
    }
    Extent sizes[kMaxSizes];
    Types types;
    size_t count = 0;
    if (OrtStatus* const status = api.ShapeInferContext_GetInputCount(context, &count))
    {
        return status;
    }
    for (int32_t i = 0; i < spec.inputCount && static_cast<size_t>(i) < count; ++i)
    {
        OrtTensorTypeAndShapeInfo* info = nullptr; // the context's
        if (OrtStatus* const status
            = api.ShapeInferContext_GetInputTypeShape(context, static_cast<size_t>(i), &info))
        {
            return status;
        }
        if (info == nullptr)
        {
            continue; // left out
        }
        ONNXTensorElementDataType* const type = typeOf(spec, spec.inputs[i], types);
        bool const isFirst = type != nullptr && *type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        if (OrtStatus* const status = isFirst ? api.GetTensorElementType(info, type) : nullptr)
        {
            return status;
        }
        if (OrtStatus* const status = readSizes(api, info, spec.inputs[i], sizes))
        {
            return status;
        }
    }
    for (int32_t i = 0; i < spec.outputCount; ++i)
    {
        TensorSpec const& output = spec.outputs[i];
        ONNXTensorElementDataType const* const type = typeOf(spec, output, types);
        Extent extents[nvinfer1::Dims::MAX_DIMS];
        for (int32_t axis = 0; axis < output.rank; ++axis)
        {
            DimensionSpec const& dimension = output.shape[axis];
            if (dimension.size >= 0)
            {
                extents[axis] = sizes[dimension.size];
            }
            else
            {
                extents[axis].value = dimension.expression(attributes);
            }
        }
        if (OrtStatus* const status = setOutput(api, context, i,
                type == nullptr ? elementTypeOf(output.types->type) : *type, extents, output.rank))
        {
            return status;
        }
    }
    return nullptr;
}

} // namespace qwenforge
