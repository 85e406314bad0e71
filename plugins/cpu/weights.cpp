#include "cpu/weights.h"

namespace qwenforge::cpu
{
namespace
{

void requireElements(std::string const& name, Shape const& shape, size_t elements)
{
    if (shape.elements() != static_cast<int64_t>(elements))
    {
        throw Refusal(name + " is " + shape.text() + ", but " + std::to_string(elements) + " elements are needed");
    }
}

// Matrices [count] of [rows, depth], one behind the other in the inputs.
std::vector<StoredMatrix> storedAt(Node const& node, size_t first, std::string const& name, size_t count, size_t rows,
    size_t depth, WeightFormat const& format)
{
    size_t const groups = (depth + format.groupSize - 1) / format.groupSize;
    size_t const bits = static_cast<size_t>(format.bits);
    size_t const rowBytes = groups * format.groupSize * bits / 8;
    size_t const zeroBytes = (groups * bits + 7) / 8;
    auto const codes = node.constant<uint8_t>(first, name.c_str());
    auto const scales = node.constant<float>(first + 1, (name + "_scales").c_str());
    auto const zeroPoints = node.constant<uint8_t>(first + 2, (name + "_zero_points").c_str());
    if (!codes || !scales)
    {
        throw Refusal(name + " and its scales have to be there");
    }
    requireElements(name, codes.shape, count * rows * rowBytes);
    requireElements(name + "_scales", scales.shape, count * rows * groups);
    if (zeroPoints)
    {
        requireElements(name + "_zero_points", zeroPoints.shape, count * rows * zeroBytes);
    }
    std::vector<StoredMatrix> matrices;
    for (size_t i = 0; i < count; ++i)
    {
        matrices.push_back({codes.data + i * rows * rowBytes, scales.data + i * rows * groups,
            zeroPoints ? zeroPoints.data + i * rows * zeroBytes : nullptr, rows, depth, format.groupSize, format.bits});
    }
    return matrices;
}

GatedMatrices interleaved(StoredMatrix const& gate, StoredMatrix const& up)
{
    auto [first, second] = QuantizedMatrix::interleaved(gate, up);
    return {std::move(first), std::move(second)};
}

} // namespace

size_t positive(Node const& node, char const* attribute)
{
    int64_t const value = node.integer(attribute);
    if (value < 1)
    {
        throw Refusal(std::string(attribute) + " is " + std::to_string(value) + ", but has to be at least 1");
    }
    return static_cast<size_t>(value);
}

WeightFormat WeightFormat::of(Node const& node, char const* bits, char const* groupSize)
{
    WeightFormat const format{static_cast<int32_t>(positive(node, bits)), positive(node, groupSize)};
    if (format.bits != 4 && format.bits != 8)
    {
        throw Refusal(std::string(bits) + " is " + std::to_string(format.bits) + ", but has to be 4 or 8");
    }
    if (format.groupSize % 16 != 0 || format.groupSize > 4096)
    {
        throw Refusal(std::string(groupSize) + " is " + std::to_string(format.groupSize)
            + ", but has to be a multiple of 16, at most 4096");
    }
    return format;
}

std::vector<QuantizedMatrix> matricesAt(Node const& node, size_t first, std::string const& name, size_t count,
    size_t columns, size_t depth, WeightFormat const& format)
{
    std::vector<QuantizedMatrix> matrices;
    matrices.reserve(count);
    for (StoredMatrix const& stored : storedAt(node, first, name, count, columns, depth, format))
    {
        matrices.emplace_back(stored);
    }
    return matrices;
}

QuantizedMatrix matrixAt(
    Node const& node, size_t first, std::string const& name, size_t columns, size_t depth, WeightFormat const& format)
{
    return QuantizedMatrix(storedAt(node, first, name, 1, columns, depth, format).front());
}

GatedMatrices GatedMatrices::at(Node const& node, size_t gate, size_t up, std::string const& prefix, size_t inner,
    size_t depth, WeightFormat const& format)
{
    return interleaved(storedAt(node, gate, prefix + "gate", 1, inner, depth, format).front(),
        storedAt(node, up, prefix + "up", 1, inner, depth, format).front());
}

std::vector<GatedMatrices> GatedMatrices::at(Node const& node, size_t both, std::string const& name, size_t count,
    size_t inner, size_t depth, WeightFormat const& format)
{
    std::vector<GatedMatrices> matrices;
    matrices.reserve(count);
    for (StoredMatrix const& stored : storedAt(node, both, name, count, 2 * inner, depth, format))
    {
        StoredMatrix gate = stored;
        gate.columns = inner;
        gate.rowStride = 2;
        StoredMatrix up = gate;
        up.firstRow = 1;
        matrices.push_back(interleaved(gate, up));
    }
    return matrices;
}

View<float> vectorAt(Node const& node, size_t input, char const* name, size_t elements)
{
    auto const vector = node.constant<float>(input, name);
    if (vector)
    {
        requireElements(name, vector.shape, elements);
    }
    return vector;
}

QuantizedRows takeRows(Scratch& scratch, size_t rows, QuantizedMatrix const& matrix)
{
    size_t const groups = matrix.groups();
    return {scratch.take<int8_t>(rows * groups * matrix.groupSize()), scratch.take<float>(rows * groups),
        scratch.take<int32_t>(rows * groups), groups, matrix.groupSize()};
}

QuantizedRows rowsFrom(QuantizedRows const& rows, size_t first) noexcept
{
    return {rows.codes + first * rows.groups * rows.groupSize, rows.scales + first * rows.groups,
        rows.sums + first * rows.groups, rows.groups, rows.groupSize};
}

size_t panelBytes(QuantizedMatrix const& matrix) noexcept
{
    return matrix.groups() * matrix.groupSize() * kTileColumns;
}

Prologue Prologue::of(Call const& call, size_t values, size_t residual, View<float> const& weight, float epsilon,
    size_t sum, size_t depth)
{
    Prologue prologue{call.input<float>(values), call.input<float>(residual), weight, epsilon, nullptr, 0, depth};
    Shape const& shape = prologue.values.shape;
    if (shape.rank() == 0 || shape[shape.rank() - 1] != static_cast<int64_t>(depth))
    {
        throw Refusal("the input is " + shape.text() + ", but its last extent has to be " + std::to_string(depth));
    }
    if (prologue.residual && prologue.residual.shape.extents != shape.extents)
    {
        throw Refusal("the residual is " + prologue.residual.shape.text() + ", but the input is " + shape.text());
    }
    prologue.rows = static_cast<size_t>(shape.elements()) / depth;
    prologue.sum = call.output<float>(sum, shape);
    return prologue;
}

float const* Prologue::row(Products const& products, size_t row, float* memory) const noexcept
{
    float const* const source = values.data + row * depth;
    if (!residual && !weight && sum == nullptr)
    {
        return source;
    }
    products.normalize(source, residual ? residual.data + row * depth : nullptr, weight.data, epsilon, depth,
        sum == nullptr ? nullptr : sum + row * depth, memory);
    return memory;
}

void multiplyGateUp(Products const& products, GatedMatrices const& matrices, size_t tile, QuantizedRows const& rows,
    size_t count, float* inner, float* memory, uint8_t* panel) noexcept
{
    size_t const width = matrices.width();
    float* const gated = inner + tile * kTileColumns;
    products.byTile(tileOf(matrices.gate, tile), rows, count, gated, width, panel);
    products.byTile(tileOf(matrices.up, tile), rows, count, memory, kTileColumns, panel);
    for (size_t row = 0; row < count; ++row)
    {
        products.gateBy(gated + row * width, memory + row * kTileColumns, kTileColumns);
    }
}

} // namespace qwenforge::cpu
