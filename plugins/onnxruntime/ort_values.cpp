#include "onnxruntime/ort_values.h"

#include "common/fields.h"

#include <cinttypes>
#include <limits>

namespace qwenforge
{
namespace
{

using nvinfer1::DataType;

struct TypePair
{
    DataType ours;
    ONNXTensorElementDataType theirs;
};

constexpr TypePair kTypes[]{
    {DataType::kFLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {DataType::kHALF, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
    {DataType::kBF16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16},
    {DataType::kINT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8},
    {DataType::kINT32, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
    {DataType::kINT64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
    {DataType::kBOOL, ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL},
    {DataType::kUINT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
    {DataType::kFP8, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN},
    {DataType::kINT4, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4},
};

bool readInteger(OrtApi const& api, OrtKernelInfo const* info, AttributeSpec const& attribute, AttributeValue& value,
    Message& problem) noexcept
{
    int64_t number = 0;
    if (OrtStatus* const status = api.KernelInfoGetAttribute_int64(info, attribute.name, &number))
    {
        api.ReleaseStatus(status);
        return problem.set("attribute %s is missing, or is no integer (%s)", attribute.name, attribute.meaning);
    }
    value.integer = static_cast<int32_t>(number);
    return number == value.integer
        || problem.set("%s is %" PRId64 ", which is no number of 32 bits (%s)", attribute.name, number,
            attribute.meaning);
}

bool readFloat(OrtApi const& api, OrtKernelInfo const* info, AttributeSpec const& attribute, AttributeValue& value,
    Message& problem) noexcept
{
    if (OrtStatus* const status = api.KernelInfoGetAttribute_float(info, attribute.name, &value.real))
    {
        api.ReleaseStatus(status);
        return problem.set("attribute %s is missing, or is no float (%s)", attribute.name, attribute.meaning);
    }
    return true;
}

// Of the node's own text in an error; longer names end early.
constexpr size_t kNameBytes = 128;

} // namespace

ONNXTensorElementDataType elementTypeOf(DataType type) noexcept
{
    for (TypePair const& pair : kTypes)
    {
        if (pair.ours == type)
        {
            return pair.theirs;
        }
    }
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

DataType dataTypeOf(ONNXTensorElementDataType type) noexcept
{
    for (TypePair const& pair : kTypes)
    {
        if (pair.theirs == type)
        {
            return pair.ours;
        }
    }
    return static_cast<DataType>(std::numeric_limits<int32_t>::max()); // none that a specification allows
}

bool readAttributes(OrtApi const& api, OpSpec const& spec, OrtKernelInfo const* info, AttributeValue* values,
    Message& problem) noexcept
{
    for (int32_t i = 0; i < spec.attributeCount; ++i)
    {
        AttributeSpec const& attribute = spec.attributes[i];
        auto const read = attribute.type == AttributeType::kInt ? readInteger : readFloat;
        if (!read(api, info, attribute, values[i], problem))
        {
            return false;
        }
    }
    return checkValues(spec, values, problem);
}

OrtStatus* describe(
    OrtApi const& api, OrtTensorTypeAndShapeInfo const* info, nvinfer1::PluginTensorDesc& description) noexcept
{
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    size_t rank = 0;
    description = {};
    description.format = nvinfer1::TensorFormat::kLINEAR;
    if (OrtStatus* const status = api.GetTensorElementType(info, &type))
    {
        return status;
    }
    if (OrtStatus* const status = api.GetDimensionsCount(info, &rank))
    {
        return status;
    }
    description.type = dataTypeOf(type);
    description.dims.nbDims = static_cast<int32_t>(rank);
    // A rank that is too large is refused for being another than the specification's.
    return rank > nvinfer1::Dims::MAX_DIMS ? nullptr : api.GetDimensions(info, description.dims.d, rank);
}

OrtStatus* describe(OrtApi const& api, OrtValue const* value, nvinfer1::PluginTensorDesc& description) noexcept
{
    OrtTensorTypeAndShapeInfo* info = nullptr;
    if (OrtStatus* const status = api.GetTensorTypeAndShape(value, &info))
    {
        return status;
    }
    Owned<OrtTensorTypeAndShapeInfo> const owned(info, api.ReleaseTensorTypeAndShapeInfo);
    return describe(api, info, description);
}

OrtStatus* addressOf(OrtApi const& api, OrtValue const* value, void*& address) noexcept
{
    // The interface has no function for a tensor that is only read; the kernels' pointers to inputs are const.
    return api.GetTensorMutableData(const_cast<OrtValue*>(value), &address);
}

OrtStatus* refuseNode(
    OrtApi const& api, OpSpec const& spec, OrtKernelInfo const* info, Message const& problem) noexcept
{
    char name[kNameBytes]{};
    size_t bytes = sizeof(name);
    if (OrtStatus* const status = api.KernelInfo_GetNodeName(info, name, &bytes))
    {
        api.ReleaseStatus(status); // too long a name is left out
        name[0] = '\0';
    }
    Message text;
    text.set("%s '%s': %s", spec.name, name, problem.text());
    return refusal(api, text);
}

} // namespace qwenforge
