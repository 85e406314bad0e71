// The shapes of a node's outputs before it runs, as far as the graph knows them: nodes behind it are planned with them.

#pragma once

#include "common/op_spec.h"
#include "onnxruntime/ort.h"

namespace qwenforge
{

// Sets every output's shape: an extent is a number, the graph's name for one, or unknown.
OrtStatus* inferOutputShapes(OrtApi const& api, OpSpec const& spec, OrtShapeInferContext* context) noexcept;

} // namespace qwenforge
