// float16 in memory, float32 in vectors: what vectors.h has for floats, for halves as well.

#pragma once

#include "cpu/attention_kernels.h"
#include "cpu/vectors.h"

namespace qwenforge::cpu
{
namespace
{

typedef uint16_t HalvesInMemory __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

inline Floats load(Half const* address) noexcept
{
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(address)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(address)));
#else
    Integers const bits = __builtin_convertvector(*reinterpret_cast<HalvesInMemory const*>(address), Integers);
    // The product moves the bias of the exponents from 15 to 127; it is exact, of subnormal numbers too.
    Integers const magnitude = (bits & 0x7FFF) << 13;
    Integers const number = reinterpret_cast<Integers>(reinterpret_cast<Floats>(magnitude) * 0x1p112F);
    Integers const isNoNumber = magnitude >= 0x7C00 << 13; // an infinity or a NaN
    return reinterpret_cast<Floats>(number | (isNoNumber & 0x7F800000) | (bits & 0x8000) << 16);
#endif
}

// Of numbers beyond float16's largest this is the one that is nearest. Infinities stay.
inline Floats saturated(Floats values) noexcept
{
    constexpr float kLargest = 65504.0F;
    Floats const below = values > kLargest && values < kInfinity ? kLargest - Floats{} : values;
    return below < -kLargest && below > -kInfinity ? -kLargest - Floats{} : below;
}

// Rounds to nearest, ties to even; saturated.
inline void store(Half* address, Floats values) noexcept
{
    Floats const kept = saturated(values);
#if defined(__AVX512F__)
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(address), _mm512_cvtps_ph(kept, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(address), _mm256_cvtps_ph(kept, _MM_FROUND_TO_NEAREST_INT));
#else
    Integers const bits = reinterpret_cast<Integers>(kept);
    Integers const magnitude = bits & 0x7FFFFFFF;
    Integers const normal = ((magnitude + 0xFFF + (magnitude >> 13 & 1)) >> 13) - (112 << 10);
    // float32 has the numbers from 0.5 to 1 in float16's smallest steps, 2^-24: the sum is rounded to those.
    Integers const subnormal
        = reinterpret_cast<Integers>(reinterpret_cast<Floats>(magnitude) + 0.5F) - 0x3F000000;
    Integers const isSubnormal = magnitude < 113 << 23; // below 2^-14
    Integers const number = isSubnormal ? subnormal : normal;
    Integers const isInfinity = magnitude == 0x7F800000;
    Integers const isNan = magnitude > 0x7F800000;
    Integers const half = isNan ? 0x7E00 - Integers{} : isInfinity ? 0x7C00 - Integers{} : number;
    *reinterpret_cast<HalvesInMemory*>(address)
        = __builtin_convertvector(half | (bits >> 16 & 0x8000), HalvesInMemory);
#endif
}

// One element, where none or no whole vector follows.

inline float loadOne(float const* address) noexcept
{
    return *address;
}

inline float loadOne(Half const* address) noexcept
{
    Half const first[kLanes] = {*address};
    return load(first)[0];
}

inline void storeOne(float* address, float value) noexcept
{
    *address = value;
}

inline void storeOne(Half* address, float value) noexcept
{
    Half all[kLanes];
    store(all, broadcast(value));
    *address = all[0];
}

} // namespace
} // namespace qwenforge::cpu
