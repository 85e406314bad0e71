// The arithmetic of the ops, in the instruction set of the machine.

#pragma once

#include <cstddef>
#include <cstdint>

namespace qwenforge::cpu
{

// Quantized rows of activations: a = scale * code by groups of K, a code in -127 to 127.
struct QuantizedRows
{
    int8_t* codes;   // [rows, groups * groupSize], zero beyond K
    float* scales;   // [rows, groups]; NaN where an activation of the group is
    int32_t* sums;   // [rows, groups], of the codes
    size_t groups;
    size_t groupSize;
};

// One tile of a QuantizedMatrix and how to read it (quantized_matrix.h).
struct Tile
{
    uint8_t const* codes;
    size_t codeStride; // from group to group
    size_t codeBytes;  // of a group
    uint8_t const* scales;
    size_t scaleStride;
    size_t scaleBytes;
    int32_t bits;
    bool hasHalfScales;
    bool hasOffsets; // behind the scales of each group
};

struct Products
{
    // out [count, 32] (rows `stride` apart) = the first `count` rows of `activations` by a tile. `scratch`: groups *
    // groupSize * 32 bytes, 64-byte aligned, of the caller's thread.
    void (*byTile)(Tile const& tile, QuantizedRows const& activations, size_t count, float* out, size_t stride,
        uint8_t* scratch) noexcept;

    // Row number `row` of `out` from `row` [depth].
    void (*quantize)(float const* values, size_t depth, size_t row, QuantizedRows const& out) noexcept;

    // out = norm(values + residual) * weight, norm(x) = x / sqrt(mean(x^2) + epsilon); sum = values + residual. `residual`,
    // `weight` (then out = the sum) and `sum` may be null.
    void (*normalize)(float const* values, float const* residual, float const* weight, float epsilon, size_t depth,
        float* sum, float* out) noexcept;

    // gate = silu(gate) * up, of `count` values.
    void (*gateBy)(float* gate, float const* up, size_t count) noexcept;

    // out[n] = values [depth] . matrix[n, :], in float32.
    void (*dot)(float const* values, float const* matrix, size_t columns, size_t depth, float* out) noexcept;
};

extern Products const kBaselineProducts;
#if defined(__x86_64__)
extern Products const kAvx2Products;
extern Products const kAvx512Products;
#endif

// For the machine, or as QWENFORGE_CPU_ISA asks.
Products const& products();

} // namespace qwenforge::cpu
