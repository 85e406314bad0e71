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

// Matrices [count] of which each has the outputs firstRow, firstRow + rowStride, ... of `rows` stored ones.
std::vector<QuantizedMatrix> matricesAt(Node const& node, size_t first, std::string const& name, size_t count,
    size_t rows, size_t firstRow, size_t rowStride, size_t depth, WeightFormat const& format);

// An initializer of so many elements; empty where the input is left out.
View<float> vectorAt(Node const& node, size_t input, char const* name, size_t elements);

size_t positive(Node const& node, char const* attribute);

inline constexpr size_t kItemsOfAWorker = 8;

// Tile number `index`; the thread will read `next` then, by default the tile behind it.
inline Tile tileOf(QuantizedMatrix const& matrix, size_t index, uint8_t const* next = nullptr) noexcept
{
    return {matrix.tile(index), matrix.groupBytes(), matrix.codeBytes(), matrix.scales(index), matrix.scaleStride(),
        matrix.scaleBytes(), matrix.bits(), matrix.hasHalfScales(), matrix.hasOffsets(),
        next != nullptr ? next : matrix.tile(index + 1)};
}

// How many of `tiles` make an item: threads read long stretches of a matrix, and still end together.
inline size_t tilesOfAnItem(size_t tiles, size_t workers) noexcept
{
    return std::max<size_t>(1, tiles / (kItemsOfAWorker * workers));
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

struct TileRange
{
    size_t first;
    size_t count; // as far as there are so many
};

// inner [count, width], columns of the tiles = silu(rows gate^T) * (rows up^T). `memory` [count, 32] and `panel` are the
// worker's.
void multiplyGateUp(Products const& products, QuantizedMatrix const& gate, QuantizedMatrix const& up, TileRange tiles,
    QuantizedRows const& rows, size_t count, float* inner, size_t width, float* memory, uint8_t* panel) noexcept;

// So few rows are made ready by the thread that calls: the others would have to wait for it either way.
inline constexpr size_t kFewRows = 4;

} // namespace qwenforge::cpu
