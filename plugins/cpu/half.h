// float16, as bits.

#pragma once

#include <cstdint>
#include <cstring>
#include <optional>

namespace qwenforge::cpu
{
namespace
{

// Of a normal number of float16 that has `value` exactly; nothing where there is none.
inline std::optional<uint16_t> halfOf(float value) noexcept
{
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    int32_t const exponent = static_cast<int32_t>(bits >> 23 & 0xFF) - 127 + 15;
    if (exponent < 1 || exponent > 30 || (bits & 0x1FFF) != 0)
    {
        return std::nullopt;
    }
    return static_cast<uint16_t>(
        (bits >> 16 & 0x8000) | static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 0x3FF));
}

// Zero or a normal number of float16.
inline float fromHalf(uint16_t half) noexcept
{
    uint32_t const exponent = (half >> 10 & 0x1Fu) - 15 + 127;
    uint32_t const bits = (half & 0x8000u) << 16 | exponent << 23 | (half & 0x3FFu) << 13;
    float value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    return (half & 0x7FFFu) == 0 ? 0.0f : value;
}

} // namespace
} // namespace qwenforge::cpu
