// Types and shapes of a node's outputs before it runs, as far as the graph knows them: nodes behind it are typed and
// planned with them.

#pragma once

#include "common/op_spec.h"
#include "onnxruntime/ort.h"

namespace qwenforge
{

// Sets type and shape of every output whose extents are numbers or have names in the graph. Where attributes are missing
// or out of their ranges it sets nothing, and leaves it to the kernel to say so.
OrtStatus* inferOutputShapes(OrtApi const& api, OpSpec const& spec, OrtShapeInferContext* context) noexcept;

} // namespace qwenforge
