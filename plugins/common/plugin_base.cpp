#include "common/plugin_base.h"

namespace qwenforge
{

StateText::StateText(OpSpec const& spec, AttributeValue const* values, int32_t kernelVersion) noexcept
{
    size_t used = static_cast<size_t>(
        std::snprintf(mText, sizeof(mText), "%s:%s;kernels=%" PRId32, spec.name, spec.version, kernelVersion));
    for (int32_t i = 0; i < spec.attributeCount && used < sizeof(mText); ++i)
    {
        AttributeSpec const& attribute = spec.attributes[i];
        // %a is exact: two scales that differ in their last bit are two states.
        int const written = attribute.type == AttributeType::kInt
            ? std::snprintf(mText + used, sizeof(mText) - used, ";%s=%" PRId32, attribute.name, values[i].integer)
            : std::snprintf(mText + used, sizeof(mText) - used, ";%s=%a", attribute.name,
                static_cast<double>(values[i].real));
        used += static_cast<size_t>(written);
    }
}

} // namespace qwenforge
