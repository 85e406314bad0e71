// The C++ form of an op.yaml. The build generates one constant of type OpSpec for each, in <op>_spec.h.

#pragma once

#include "common/tensorrt.h"

#include <cstdint>

namespace qwenforge
{

// Bounds of the fixed arrays below; the generated headers assert that they hold.
constexpr int32_t kMaxAttributes = 16;
constexpr int32_t kMaxTensors = 20;
constexpr int32_t kMaxSizes = 8;
constexpr int32_t kMaxTypeVariables = 2;

enum class AttributeType : int32_t
{
    kInt,
    kFloat,
};

// Which member counts is said by the attribute's type.
union AttributeValue
{
    int32_t integer;
    float real;
};

using IntegerExpression = int64_t (*)(AttributeValue const* attributes) noexcept;
using BooleanExpression = bool (*)(AttributeValue const* attributes) noexcept;

struct AttributeSpec
{
    char const* name;
    char const* meaning;
    AttributeType type;
    double minimum;
    double maximum;
    int64_t multipleOf; // 1 where any value will do
};

// Either a size that the tensors bring at run time (batch, sequence...), or an expression over the attributes.
struct DimensionSpec
{
    char const* text;
    int32_t size; // index among OpSpec::sizes, -1 for an expression
    IntegerExpression expression;
};

struct TypeVariableSpec
{
    char const* name;
    nvinfer1::DataType const* types;
    int32_t typeCount;
};

struct TypeSpec
{
    int32_t variable;        // -1 where the type is fixed
    nvinfer1::DataType type; // where it is fixed
};

struct TensorSpec
{
    char const* name;
    TypeSpec const* types; // one, or one for each value of an attribute
    int32_t typeAttribute; // that attribute, -1 for none
    DimensionSpec const* shape;
    int32_t rank;
    BooleanExpression presentIf; // null for a tensor that is always there
    int32_t aliases;             // input whose memory an output shares, -1 for none

    TypeSpec const& type(AttributeValue const* attributes) const noexcept
    {
        return types[typeAttribute < 0 ? 0 : attributes[typeAttribute].integer];
    }
};

struct RequirementSpec
{
    BooleanExpression holds;
    char const* message;
};

struct OpSpec
{
    char const* name;
    char const* version;
    char const* pluginNamespace;
    AttributeSpec const* attributes;
    int32_t attributeCount;
    char const* const* sizes;
    int32_t sizeCount;
    TypeVariableSpec const* typeVariables;
    int32_t typeVariableCount;
    TensorSpec const* inputs;
    int32_t inputCount;
    TensorSpec const* outputs;
    int32_t outputCount;
    RequirementSpec const* requirements;
    int32_t requirementCount;
};

// The attribute that chooses the types of outputs, -1 where none does.
constexpr int32_t typeChoosingAttribute(OpSpec const& spec) noexcept
{
    for (int32_t i = 0; i < spec.outputCount; ++i)
    {
        if (spec.outputs[i].typeAttribute >= 0)
        {
            return spec.outputs[i].typeAttribute;
        }
    }
    return -1;
}

} // namespace qwenforge
