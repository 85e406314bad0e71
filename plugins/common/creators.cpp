// What the library exports: the two functions that TensorRT's plugin registry looks for, and the library's version.

#include "attention/attention_plugin.h"
#include "common/creator.h"
#include "moe/moe_plugin.h"

#define QWENFORGE_EXPORT extern "C" __attribute__((visibility("default")))

QWENFORGE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static qwenforge::Creator<qwenforge::AttentionPlugin> attention;
    static qwenforge::Creator<qwenforge::MoePlugin> moe;
    static nvinfer1::IPluginCreatorInterface* const creators[]{&attention, &moe};
    nbCreators = static_cast<int32_t>(sizeof(creators) / sizeof(creators[0]));
    return creators;
}

QWENFORGE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    qwenforge::setLoggerFinder(finder);
}

// As in the file VERSION, "1.2.3".
QWENFORGE_EXPORT char const* qwenforgePluginsVersion()
{
    return QWENFORGE_VERSION;
}
