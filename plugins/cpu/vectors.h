// Vectors of floats as wide as the translation unit's instruction set has them, in GCC's and Clang's vector extensions.
//
// Included by sources that are compiled for one instruction set each. All of it is in an unnamed namespace: of an inline
// function with external linkage the linker keeps one copy for all, which may be one that this machine cannot run.

#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define QWENFORGE_UNROLL _Pragma("unroll")
#else
#define QWENFORGE_UNROLL _Pragma("GCC unroll 64")
#endif

namespace qwenforge::cpu
{
namespace
{

#if defined(__AVX512F__)
constexpr size_t kLanes = 16;
#define QWENFORGE_LOW_PAIRS 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define QWENFORGE_HIGH_PAIRS 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
constexpr size_t kLanes = 8;
#define QWENFORGE_LOW_PAIRS 0, 8, 1, 9, 2, 10, 3, 11
#define QWENFORGE_HIGH_PAIRS 4, 12, 5, 13, 6, 14, 7, 15
#else
constexpr size_t kLanes = 4;
#define QWENFORGE_LOW_PAIRS 0, 4, 1, 5
#define QWENFORGE_HIGH_PAIRS 2, 6, 3, 7
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef float FloatsInMemory __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

constexpr float kInfinity = __builtin_inff();

inline Floats load(float const* address) noexcept
{
    return *reinterpret_cast<FloatsInMemory const*>(address);
}

inline void store(float* address, Floats values) noexcept
{
    *reinterpret_cast<FloatsInMemory*>(address) = values;
}

inline Floats broadcast(float value) noexcept
{
    return value - Floats{}; // x - 0 is x, of either sign of zero
}

inline Integers lanes() noexcept
{
    Integers indices{};
    QWENFORGE_UNROLL
    for (size_t i = 0; i < kLanes; ++i)
    {
        indices[i] = static_cast<int32_t>(i);
    }
    return indices;
}

// a0 b0 a1 b1 ... of the lower halves, and of the upper ones.
inline Floats interleaveLow(Floats a, Floats b) noexcept
{
    return __builtin_shufflevector(a, b, QWENFORGE_LOW_PAIRS);
}

inline Floats interleaveHigh(Floats a, Floats b) noexcept
{
    return __builtin_shufflevector(a, b, QWENFORGE_HIGH_PAIRS);
}

// Each step rotates the bits of (row, column) by one, since it deals the upper half of the rows between the lower.
inline void transpose(Floats (&rows)[kLanes]) noexcept
{
    QWENFORGE_UNROLL
    for (size_t step = 1; step < kLanes; step *= 2)
    {
        Floats dealt[kLanes];
        QWENFORGE_UNROLL
        for (size_t i = 0; i < kLanes / 2; ++i)
        {
            dealt[2 * i] = interleaveLow(rows[i], rows[i + kLanes / 2]);
            dealt[2 * i + 1] = interleaveHigh(rows[i], rows[i + kLanes / 2]);
        }
        QWENFORGE_UNROLL
        for (size_t i = 0; i < kLanes; ++i)
        {
            rows[i] = dealt[i];
        }
    }
}

// Lane i of the result is the sum of vector i.
inline Floats sumsOf(Floats (&vectors)[kLanes]) noexcept
{
    QWENFORGE_UNROLL
    for (size_t half = kLanes / 2; half > 0; half /= 2)
    {
        QWENFORGE_UNROLL
        for (size_t i = 0; i < half; ++i)
        {
            vectors[i] = interleaveLow(vectors[i], vectors[i + half]) + interleaveHigh(vectors[i], vectors[i + half]);
        }
    }
    return vectors[0];
}

inline float sumOf(Floats values) noexcept
{
    QWENFORGE_UNROLL
    for (size_t step = 1; step < kLanes; step *= 2)
    {
        values = interleaveLow(values, values) + interleaveHigh(values, values);
    }
    return values[0];
}

// Of numbers; a NaN may be passed over.
inline Floats larger(Floats a, Floats b) noexcept
{
    return a > b ? a : b;
}

inline float largestOf(Floats values) noexcept
{
    QWENFORGE_UNROLL
    for (size_t step = 1; step < kLanes; step *= 2)
    {
        values = larger(interleaveLow(values, values), interleaveHigh(values, values));
    }
    return values[0];
}

// Whether a lane of `a` is larger than that of `b`.
inline bool anyLarger(Floats a, Floats b) noexcept
{
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#elif defined(__x86_64__)
    return _mm_movemask_ps(_mm_cmpgt_ps(a, b)) != 0;
#else
    Integers const isLarger = a > b;
    int32_t any = 0;
    for (size_t i = 0; i < kLanes; ++i)
    {
        any |= isLarger[i];
    }
    return any != 0;
#endif
}

// 2^x for x <= 0 or NaN, relative error below 2e-7; 0 below the smallest normal number.
//
// 2^x = 2^n * 2^f, n the nearest integer. The polynomial is the minimax one of degree 6 for 2^f on [-0.5, 0.5], 2e-9 off.
inline Floats exponential2(Floats x) noexcept
{
    constexpr float kToInteger = 12582912.0F; // 1.5 * 2^23: the sum's last bits are the integer
    Integers const isZero = x < -126.0F;
    Floats const shifted = x + kToInteger;
    Floats const fraction = x - (shifted - kToInteger);
    Floats power = fraction * 1.53458124e-4F + 1.33999309e-3F;
    power = power * fraction + 9.61848907e-3F;
    power = power * fraction + 5.55032864e-2F;
    power = power * fraction + 2.40226462e-1F;
    power = power * fraction + 6.93147182e-1F;
    power = power * fraction + 1.0F;
    // In the exponent; those of a NaN are zero.
    Integers const scaled = reinterpret_cast<Integers>(power) + (reinterpret_cast<Integers>(shifted) << 23);
    return isZero ? Floats{} : reinterpret_cast<Floats>(scaled);
}

inline float exponential2(float x) noexcept
{
    return exponential2(broadcast(x))[0];
}

} // namespace
} // namespace qwenforge::cpu
