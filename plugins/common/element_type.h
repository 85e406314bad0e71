// The element types that the kernels compute with.

#pragma once

#include <cstdint>

namespace qwenforge
{

enum class ElementType : int32_t
{
    kFloat16 = 0,
    kBFloat16 = 1,
};

} // namespace qwenforge
