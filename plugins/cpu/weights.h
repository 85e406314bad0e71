// Quantized weights and vectors among a node's initializers, checked, and products by them.

#pragma once

#include "cpu/node.h"
#include "cpu/products.h"
#include "cpu/quantized_matrix.h"
#include "cpu/scratch.h"

#include <algorithm>
#include <string>

namespace qwenforge::cpu
{

// How one of a node's matrices is stored, from its attributes.
struct WeightFormat
{
    int32_t bits;
    size_t groupSize;

    // Throws Refusal where no kernel reads it.
    static WeightFormat of(Node const& node, char const* bits, char const* groupSize);
};

// The matrix [columns, depth] whose codes are input `first`, its scales the next one and its zero points, if any, the one
// after that.
QuantizedMatrix matrixAt(
    Node const& node, size_t first, std::string const& name, size_t columns, size_t depth, WeightFormat const& format);

// As many as `count` of them, one behind the other in those inputs.
std::vector<QuantizedMatrix> matricesAt(Node const& node, size_t first, std::string const& name, size_t count,
    size_t columns, size_t depth, WeightFormat const& format);

// What silu(rows gate^T) * (rows up^T) takes. Their tiles take turns in memory.
struct GatedMatrices
{
    QuantizedMatrix gate;
    QuantizedMatrix up;

    // From inputs of their own, `gate` and `up` the first of each; both are [inner, depth].
    static GatedMatrices at(Node const& node, size_t gate, size_t up, std::string const& prefix, size_t inner,
        size_t depth, WeightFormat const& format);

    // From inputs that they share, `count` times [2 * inner, depth], in which rows of gate and up take turns.
    static std::vector<GatedMatrices> at(Node const& node, size_t both, std::string const& name, size_t count,
        size_t inner, size_t depth, WeightFormat const& format);

    size_t width() const noexcept // of the result's rows: the tiles' columns
    {
        return gate.tiles() * kTileColumns;
    }
};

// An initializer of so many elements; empty where the input is left out.
View<float> vectorAt(Node const& node, size_t input, char const* name, size_t elements);

size_t positive(Node const& node, char const* attribute);

inline Tile tileOf(QuantizedMatrix const& matrix, size_t index) noexcept
{
    return {matrix.tile(index), matrix.groupBytes(), matrix.codeBytes(), matrix.scales(index), matrix.scaleStride(),
        matrix.scaleBytes(), matrix.bits(), matrix.hasHalfScales(), matrix.hasOffsets()};
}

// Rows of activations for products by matrices of this depth and group size, of undefined content.
QuantizedRows takeRows(Scratch& scratch, size_t rows, QuantizedMatrix const& matrix);

// Row `first` and those behind it.
QuantizedRows rowsFrom(QuantizedRows const& rows, size_t first) noexcept;

// A worker's memory for products by `matrix`.
size_t panelBytes(QuantizedMatrix const& matrix) noexcept;

// The rows that products take: norm(values + residual), where there are a residual and a norm.
struct Prologue
{
    View<float> values; // [.., depth]
    View<float> residual;
    View<float> weight;
    float epsilon;
    float* sum; // null where nobody wants it
    size_t rows;
    size_t depth;

    // Reads the inputs of the call and makes sure that they fit together; output `sum` is values + residual.
    static Prologue of(Call const& call, size_t values, size_t residual, View<float> const& weight, float epsilon,
        size_t sum, size_t depth);

    // Row `row` of what the products take; `memory` [depth] is for a row that is not there yet.
    float const* row(Products const& products, size_t row, float* memory) const noexcept;
};

// inner [count, matrices.width()], the tile's columns = silu(rows gate^T) * (rows up^T). `memory` [count, 32] and `panel`
// are the worker's.
void multiplyGateUp(Products const& products, GatedMatrices const& matrices, size_t tile, QuantizedRows const& rows,
    size_t count, float* inner, float* memory, uint8_t* panel) noexcept;

// So few rows are made ready by the thread that calls: the others would have to wait for it either way.
inline constexpr size_t kFewRows = 4;

} // namespace qwenforge::cpu
