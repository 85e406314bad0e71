#include "common/fields.h"

#include <cmath>
#include <cstring>

namespace qwenforge
{
namespace
{

char const* typeName(nvinfer1::PluginFieldType type) noexcept
{
    constexpr char const* kNames[]{"FLOAT16", "FLOAT32", "FLOAT64", "INT8", "INT16", "INT32", "CHAR", "DIMS", "UNKNOWN",
        "BF16", "INT64", "FP8", "INT4", "FP4"};
    auto const index = static_cast<size_t>(type);
    return index < sizeof(kNames) / sizeof(kNames[0]) ? kNames[index] : "an unknown type";
}

int32_t indexOfAttribute(OpSpec const& spec, char const* name) noexcept
{
    for (int32_t i = 0; i < spec.attributeCount; ++i)
    {
        if (std::strcmp(spec.attributes[i].name, name) == 0)
        {
            return i;
        }
    }
    return -1;
}

bool readField(
    AttributeSpec const& attribute, nvinfer1::PluginField const& field, AttributeValue& value, Message& problem) noexcept
{
    nvinfer1::PluginFieldType const expected = fieldType(attribute.type);
    if (field.type != expected)
    {
        return problem.set("field %s is of type %s, not %s", attribute.name, typeName(field.type), typeName(expected));
    }
    if (field.length != 1)
    {
        return problem.set("field %s holds %d values, not one", attribute.name, field.length);
    }
    if (field.data == nullptr)
    {
        return problem.set("field %s has no data", attribute.name);
    }
    // The data need not be aligned.
    std::memcpy(&value, field.data, sizeof(value));
    return true;
}

bool checkRange(AttributeSpec const& attribute, AttributeValue value, Message& problem) noexcept
{
    bool const isInt = attribute.type == AttributeType::kInt;
    double const number = isInt ? static_cast<double>(value.integer) : static_cast<double>(value.real);
    if (!std::isfinite(number))
    {
        return problem.set("%s is %g, not a number that can be computed with", attribute.name, number);
    }
    if (number < attribute.minimum)
    {
        return problem.set("%s is %g, below %g (%s)", attribute.name, number, attribute.minimum, attribute.meaning);
    }
    if (number > attribute.maximum)
    {
        return problem.set("%s is %g, above %g (%s)", attribute.name, number, attribute.maximum, attribute.meaning);
    }
    if (isInt && value.integer % attribute.multipleOf != 0)
    {
        return problem.set("%s is %d, no multiple of %d (%s)", attribute.name, value.integer,
            static_cast<int>(attribute.multipleOf), attribute.meaning);
    }
    return true;
}

} // namespace

nvinfer1::PluginFieldType fieldType(AttributeType type) noexcept
{
    return type == AttributeType::kInt ? nvinfer1::PluginFieldType::kINT32 : nvinfer1::PluginFieldType::kFLOAT32;
}

bool parseFields(OpSpec const& spec, nvinfer1::PluginFieldCollection const* fields, AttributeValue* values,
    Message& problem) noexcept
{
    if (fields == nullptr || (fields->nbFields > 0 && fields->fields == nullptr))
    {
        return problem.set("no fields were given");
    }
    bool seen[kMaxAttributes]{};
    for (int32_t i = 0; i < fields->nbFields; ++i)
    {
        nvinfer1::PluginField const& field = fields->fields[i];
        int32_t const index = field.name == nullptr ? -1 : indexOfAttribute(spec, field.name);
        if (index < 0)
        {
            return problem.set("field %s is unknown", field.name == nullptr ? "without a name" : field.name);
        }
        if (seen[index])
        {
            return problem.set("field %s is given twice", field.name);
        }
        seen[index] = true;
        if (!readField(spec.attributes[index], field, values[index], problem))
        {
            return false;
        }
    }
    for (int32_t i = 0; i < spec.attributeCount; ++i)
    {
        if (!seen[i])
        {
            return problem.set("field %s is missing", spec.attributes[i].name);
        }
    }
    return checkValues(spec, values, problem);
}

bool checkValues(OpSpec const& spec, AttributeValue const* values, Message& problem) noexcept
{
    for (int32_t i = 0; i < spec.attributeCount; ++i)
    {
        if (!checkRange(spec.attributes[i], values[i], problem))
        {
            return false;
        }
    }
    for (int32_t i = 0; i < spec.requirementCount; ++i)
    {
        if (!spec.requirements[i].holds(values))
        {
            return problem.set("%s", spec.requirements[i].message);
        }
    }
    return true;
}

void describeFields(OpSpec const& spec, AttributeValue const* values, nvinfer1::PluginField* fields) noexcept
{
    for (int32_t i = 0; i < spec.attributeCount; ++i)
    {
        AttributeSpec const& attribute = spec.attributes[i];
        void const* const data = values == nullptr ? nullptr : &values[i];
        fields[i] = nvinfer1::PluginField(attribute.name, data, fieldType(attribute.type), 1);
    }
}

} // namespace qwenforge
