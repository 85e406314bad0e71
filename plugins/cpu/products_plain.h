// What products need beside products, in vectors of 16 that the compiler maps to the instruction set of the file that
// includes this. Everything is local to that file: two of them must not share a function.

#pragma once

#include "cpu/products.h"

#include <cstring>

namespace qwenforge::cpu
{
namespace
{

constexpr size_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t IntegerLanes __attribute__((vector_size(64)));

inline size_t fewer(size_t a, size_t b) noexcept
{
    return a < b ? a : b;
}

// `count` values, zero behind them.
inline void load(float const* values, size_t count, Lanes& lanes) noexcept
{
    lanes = Lanes{};
    std::memcpy(&lanes, values, fewer(count, kLanes) * sizeof(float));
}

inline void store(Lanes const& lanes, float* values, size_t count) noexcept
{
    std::memcpy(values, &lanes, fewer(count, kLanes) * sizeof(float));
}

inline float sumOf(Lanes const& lanes) noexcept
{
    float sum = 0;
    for (size_t i = 0; i < kLanes; ++i)
    {
        sum += lanes[i];
    }
    return sum;
}

inline void quantize(float const* values, size_t depth, size_t row, QuantizedRows const& out) noexcept
{
    // Adding it leaves the nearest integer, halves to even, in the lowest bits of the sum.
    constexpr float kRounding = 12582912.0f; // 1.5 * 2^23
    int8_t* const codes = out.codes + row * out.groups * out.groupSize;
    for (size_t group = 0; group < out.groups; ++group)
    {
        size_t const start = group * out.groupSize;
        size_t const end = start + out.groupSize;
        Lanes largest{};
        IntegerLanes unordered{};
        for (size_t at = start; at < end; at += kLanes)
        {
            Lanes value;
            load(values + fewer(at, depth), depth - fewer(at, depth), value);
            unordered |= value != value;
            value = value < 0.0f ? -value : value;
            largest = value > largest ? value : largest;
        }
        float magnitude = 0;
        bool isNan = false;
        for (size_t i = 0; i < kLanes; ++i)
        {
            magnitude = largest[i] > magnitude ? largest[i] : magnitude;
            isNan = isNan || unordered[i] != 0;
        }
        float const inverse = magnitude > 0 ? 127.0f / magnitude : 0.0f;
        IntegerLanes sum{};
        for (size_t at = start; at < end; at += kLanes)
        {
            Lanes value;
            load(values + fewer(at, depth), depth - fewer(at, depth), value);
            value = value * inverse + kRounding;
            IntegerLanes code;
            std::memcpy(&code, &value, sizeof(code));
            code = (code << 24) >> 24;
            sum += code;
            for (size_t i = 0; i < kLanes && at + i < end; ++i)
            {
                codes[at + i] = static_cast<int8_t>(code[i]);
            }
        }
        int32_t total = 0;
        for (size_t i = 0; i < kLanes; ++i)
        {
            total += sum[i];
        }
        out.scales[row * out.groups + group] = isNan ? __builtin_nanf("") : magnitude / 127.0f;
        out.sums[row * out.groups + group] = total;
    }
}

inline void normalize(float const* values, float const* residual, float const* weight, float epsilon, size_t depth,
    float* sum, float* out) noexcept
{
    Lanes squares{};
    for (size_t at = 0; at < depth; at += kLanes)
    {
        Lanes value;
        load(values + at, depth - at, value);
        if (residual != nullptr)
        {
            Lanes other;
            load(residual + at, depth - at, other);
            value += other;
        }
        squares += value * value;
        if (sum != nullptr)
        {
            store(value, sum + at, depth - at);
        }
        store(value, out + at, depth - at);
    }
    if (weight == nullptr)
    {
        return;
    }
    float const by = 1.0f / __builtin_sqrtf(sumOf(squares) / static_cast<float>(depth) + epsilon);
    for (size_t at = 0; at < depth; at += kLanes)
    {
        Lanes value;
        Lanes factor;
        load(out + at, depth - at, value);
        load(weight + at, depth - at, factor);
        store(value * by * factor, out + at, depth - at);
    }
}

// exp(x) for x in [-87.3, 88]: 2^n times a polynomial of the rest, which lies within ln(2) / 2 of 0 (Cephes' expf).
inline void exponential(Lanes& x) noexcept
{
    constexpr float kRounding = 12582912.0f;
    x = x < -87.3f ? Lanes{} - 87.3f : x;
    x = x > 88.0f ? Lanes{} + 88.0f : x;
    Lanes const shifted = x * 1.44269504f + kRounding;
    Lanes const n = shifted - kRounding;
    Lanes const r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    IntegerLanes power;
    std::memcpy(&power, &shifted, sizeof(power));
    power = (power + 127) << 23; // whose exponent is n: the lowest bits of the sum
    Lanes scale;
    std::memcpy(&scale, &power, sizeof(scale));
    x = p * scale;
}

inline void gateBy(float* gate, float const* up, size_t count) noexcept
{
    for (size_t at = 0; at < count; at += kLanes)
    {
        Lanes value;
        Lanes factor;
        load(gate + at, count - at, value);
        load(up + at, count - at, factor);
        Lanes below = -value;
        exponential(below);
        store(value / (below + 1.0f) * factor, gate + at, count - at);
    }
}

inline void dot(float const* values, float const* matrix, size_t columns, size_t depth, float* out) noexcept
{
    for (size_t n = 0; n < columns; ++n)
    {
        Lanes sums{};
        for (size_t at = 0; at < depth; at += kLanes)
        {
            Lanes value;
            Lanes factor;
            load(values + at, depth - at, value);
            load(matrix + n * depth + at, depth - at, factor);
            sums += value * factor;
        }
        out[n] = sumOf(sums);
    }
}

} // namespace
} // namespace qwenforge::cpu
