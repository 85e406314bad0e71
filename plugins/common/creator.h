// A plugin's creator, from its specification.

#pragma once

#include "common/fields.h"
#include "common/logging.h"

#include <new>

namespace qwenforge
{

template <typename Plugin>
class Creator final : public nvinfer1::IPluginCreatorV3One
{
public:
    Creator() noexcept
    {
        describeFields(Plugin::spec(), nullptr, mFields);
        mFieldCollection.nbFields = Plugin::spec().attributeCount;
        mFieldCollection.fields = mFields;
    }

    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fc,
        nvinfer1::TensorRTPhase /*phase*/) noexcept override
    {
        AttributeValue values[kMaxAttributes]{};
        Message problem;
        nvinfer1::IPluginV3* plugin = nullptr;
        if (parseFields(Plugin::spec(), fc, values, problem))
        {
            plugin = new (std::nothrow) Plugin(name, values);
            if (plugin == nullptr)
            {
                problem.set("no memory for the plugin");
            }
        }
        if (plugin == nullptr)
        {
            reportError({Plugin::spec().name, name}, problem);
        }
        return plugin;
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mFieldCollection;
    }

    char const* getPluginName() const noexcept override
    {
        return Plugin::spec().name;
    }

    char const* getPluginVersion() const noexcept override
    {
        return Plugin::spec().version;
    }

    char const* getPluginNamespace() const noexcept override
    {
        return Plugin::spec().pluginNamespace;
    }

private:
    nvinfer1::PluginField mFields[kMaxAttributes];
    nvinfer1::PluginFieldCollection mFieldCollection;
};

} // namespace qwenforge
