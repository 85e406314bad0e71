// ONNX Runtime's C interface: from the official header where CMake found it, else from our own declaration of it.

#pragma once

#ifdef QWENFORGE_OFFICIAL_ONNXRUNTIME_HEADERS
#include <onnxruntime_c_api.h>
#else
#include "onnxruntime/ort_abi.h"
#endif

#include <cstdint>

namespace qwenforge
{

// The version of the interface that is asked for, ONNX Runtime 1.18's: the first with KernelContext_GetScratchBuffer.
// Later runtimes serve it too, and read nothing of an OrtCustomOp that it does not have.
constexpr uint32_t kOrtVersion = 18;

} // namespace qwenforge
