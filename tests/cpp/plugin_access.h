// How the checks reach a plugin: its creator, its interfaces, its fields.

#pragma once

#include "plugin_calls.h"

#include <functional>

using namespace nvinfer1;
using namespace qwenforge;

using PluginPointer = std::unique_ptr<IPluginV3>;

constexpr char const* kNamespace = "qwenforge";

// Where creators come from, and what can be seen there.
struct Source
{
    std::function<IPluginCreatorV3One*(char const* name)> find;
    bool computes;
    std::string* logged; // the last message that TensorRT's logger was given; null where none is seen
};

template <typename Interface>
Interface* capability(IPluginV3& plugin, PluginCapabilityType type)
{
    return static_cast<Interface*>(plugin.getCapabilityInterface(type));
}

inline IPluginV3OneBuild* buildOf(IPluginV3& plugin)
{
    return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

inline IPluginV3OneRuntime* runtimeOf(IPluginV3& plugin)
{
    return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

inline PluginPointer create(IPluginCreatorV3One& creator, Fields const& fields, TensorRTPhase phase = TensorRTPhase::kBUILD)
{
    PluginFieldCollection const collection = fields.collection();
    return PluginPointer(creator.createPlugin("node", &collection, phase));
}

inline std::string serialized(IPluginV3& plugin)
{
    PluginFieldCollection const* const fields = runtimeOf(plugin)->getFieldsToSerialize();
    std::string text;
    for (int32_t i = 0; i < fields->nbFields; ++i)
    {
        text += std::string(fields->fields[i].name) + "=";
        text += std::string(static_cast<char const*>(fields->fields[i].data), 4) + ";";
    }
    return text;
}
