// The arithmetic of the CPU ops on buffers of exactly the size that it may touch, for AddressSanitizer; each instruction
// set's answers beside the plain ones'. Buffers behind which a kernel only prefetches are no longer either.

#include "cpu/instruction_set.h"
#include "cpu/products.h"
#include "cpu/quantized_matrix.h"
#include "cpu/weights.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

using namespace qwenforge::cpu;

namespace
{

constexpr float kTolerance = 1e-5f; // of fp32 sums in another order

uint32_t nextRandom()
{
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

float randomFloat()
{
    return static_cast<float>(nextRandom()) / 8388608.0f - 1.0f;
}

struct Free
{
    void operator()(void* memory) const noexcept
    {
        std::free(memory);
    }
};

template <typename T>
using Buffer = std::unique_ptr<T, Free>;

// Aligned as the ops' memory is, with nothing behind its last element.
template <typename T>
Buffer<T> take(size_t count)
{
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, count * sizeof(T)) != 0)
    {
        std::abort();
    }
    return Buffer<T>(static_cast<T*>(memory));
}

std::vector<float> randomFloats(size_t count)
{
    std::vector<float> values(count);
    for (float& value : values)
    {
        value = randomFloat();
    }
    return values;
}

void compare(float const* found, float const* expected, size_t count, float size, char const* what)
{
    for (size_t i = 0; i < count; ++i)
    {
        if (!(std::fabs(found[i] - expected[i]) <= kTolerance * size))
        {
            std::fprintf(stderr, "%s: %g, not %g, at %zu\n", what, static_cast<double>(found[i]),
                static_cast<double>(expected[i]), i);
            std::exit(1);
        }
    }
}

struct Form
{
    int32_t bits;
    size_t group;
    size_t depth;
    size_t columns;
    size_t rows;
    bool halves;
    bool zeroPoints;
};

void checkProducts(Products const& products, Form const& form)
{
    size_t const groups = (form.depth + form.group - 1) / form.group;
    size_t const bits = static_cast<size_t>(form.bits);
    std::vector<uint8_t> codes(form.columns * groups * form.group * bits / 8);
    std::vector<uint8_t> points(form.columns * ((groups * bits + 7) / 8));
    std::vector<float> scales(form.columns * groups);
    for (uint8_t& code : codes)
    {
        code = static_cast<uint8_t>(nextRandom());
    }
    for (uint8_t& point : points)
    {
        point = static_cast<uint8_t>(nextRandom());
    }
    for (float& scale : scales)
    {
        scale = form.halves ? 0.03125f * static_cast<float>(1 + nextRandom() % 8) : 0.01f + 0.3f * std::fabs(randomFloat());
    }
    QuantizedMatrix const matrix(StoredMatrix{codes.data(), scales.data(), form.zeroPoints ? points.data() : nullptr,
        form.columns, form.depth, form.group, form.bits});
    size_t const cells = form.rows * groups;
    Buffer<int8_t> const rowCodes = take<int8_t>(cells * form.group);
    Buffer<uint8_t> const scratch = take<uint8_t>(groups * form.group * kTileColumns);
    std::vector<float> rowScales(cells);
    std::vector<int32_t> sums(cells);
    QuantizedRows const rows{rowCodes.get(), rowScales.data(), sums.data(), groups, form.group};
    for (size_t row = 0; row < form.rows; ++row)
    {
        std::vector<float> const values = randomFloats(form.depth);
        products.quantize(values.data(), form.depth, row, rows);
    }
    std::vector<float> found(form.rows * kTileColumns);
    std::vector<float> expected(form.rows * kTileColumns);
    for (size_t index = 0; index < matrix.tiles(); ++index)
    {
        Tile const tile = tileOf(matrix, index);
        products.byTile(tile, rows, form.rows, found.data(), kTileColumns, scratch.get());
        kBaselineProducts.byTile(tile, rows, form.rows, expected.data(), kTileColumns, scratch.get());
        float const size = static_cast<float>(form.depth) * static_cast<float>(1 << form.bits) * 0.3f;
        compare(found.data(), expected.data(), found.size(), size, "product");
    }
}

void checkVectors(Products const& products, size_t depth)
{
    std::vector<float> const values = randomFloats(depth);
    std::vector<float> const residual = randomFloats(depth);
    std::vector<float> const weight = randomFloats(depth);
    std::vector<float> sums[2]{std::vector<float>(depth), std::vector<float>(depth)};
    std::vector<float> results[2]{std::vector<float>(depth), std::vector<float>(depth)};
    Products const* const both[2]{&products, &kBaselineProducts};
    for (bool hasResidual : {false, true})
    {
        for (bool hasWeight : {false, true})
        {
            for (size_t i = 0; i < 2; ++i)
            {
                both[i]->normalize(values.data(), hasResidual ? residual.data() : nullptr,
                    hasWeight ? weight.data() : nullptr, 1e-5f, depth, sums[i].data(), results[i].data());
            }
            compare(results[0].data(), results[1].data(), depth, 10, "norm");
            compare(sums[0].data(), sums[1].data(), depth, 10, "sum");
        }
    }
    for (size_t i = 0; i < 2; ++i)
    {
        results[i] = values;
        for (float& gate : results[i])
        {
            gate *= 200; // beyond what exp takes
        }
        both[i]->gateBy(results[i].data(), residual.data(), depth);
    }
    compare(results[0].data(), results[1].data(), depth, 200, "silu");
    size_t const columns = 5;
    std::vector<float> const matrix = randomFloats(columns * depth);
    std::vector<float> dots[2]{std::vector<float>(columns), std::vector<float>(columns)};
    for (size_t i = 0; i < 2; ++i)
    {
        both[i]->dot(values.data(), matrix.data(), columns, depth, dots[i].data());
    }
    compare(dots[0].data(), dots[1].data(), columns, static_cast<float>(depth), "dot product");
}

void check(Products const& products)
{
    for (size_t depth : {1u, 15u, 16u, 17u, 63u, 64u, 65u, 100u, 130u})
    {
        checkVectors(products, depth);
    }
    size_t turn = 0;
    for (int32_t bits : {4, 8})
    {
        for (size_t group : {16u, 32u, 128u})
        {
            for (size_t rows : {1u, 2u, 3u, 4u, 5u, 8u, 12u, 13u, 23u, 27u})
            {
                size_t const depths[] = {1, 16, 100, 129, 256};
                size_t const columns[] = {1, 31, 32, 33};
                checkProducts(products,
                    {bits, group, depths[turn % 5], columns[turn % 4], rows, turn % 2 == 0, turn % 3 == 0});
                ++turn;
            }
        }
    }
}

} // namespace

int main()
{
    check(kBaselineProducts);
#if defined(__x86_64__)
    if (supportedInstructionSet() >= InstructionSet::kAvx2)
    {
        check(kAvx2Products);
    }
    if (supportedInstructionSet() >= InstructionSet::kAvx512Vnni)
    {
        check(kAvx512Products);
    }
#endif
    return 0;
}
