// Plugin fields: what a creator is given, and what a plugin hands back to be written into the engine.

#pragma once

#include "common/message.h"
#include "common/op_spec.h"

namespace qwenforge
{

nvinfer1::PluginFieldType fieldType(AttributeType type) noexcept;

// Reads `fields` into `values` [spec.attributeCount]. False with a sentence in `problem` when one is missing, unknown,
// given twice, of another type or length, or out of its range, or when a requirement of the spec does not hold.
bool parseFields(OpSpec const& spec, nvinfer1::PluginFieldCollection const* fields, AttributeValue* values,
    Message& problem) noexcept;

// Whether each value is in its range and the requirements of the spec hold; else with a sentence in `problem`.
bool checkValues(OpSpec const& spec, AttributeValue const* values, Message& problem) noexcept;

// Writes one field for each attribute; they point into `values`, or at nothing when that is null.
void describeFields(OpSpec const& spec, AttributeValue const* values, nvinfer1::PluginField* fields) noexcept;

} // namespace qwenforge
