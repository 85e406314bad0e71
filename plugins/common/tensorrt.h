// TensorRT's plugin interface: from the official headers where CMake found them, else from our own declaration of it.

#pragma once

#ifdef QWENFORGE_OFFICIAL_TENSORRT_HEADERS
#include <NvInferRuntime.h>
#else
#include "common/nvinfer_plugin_abi.h"
#endif
