// Products in plain C++, for machines of any kind.

#include "cpu/half.h"
#include "cpu/products_plain.h"

namespace qwenforge::cpu
{
namespace
{

constexpr size_t kColumns = 32;

// Of column `column` in the step that begins at `codes`, times those of `activations`.
template <int Bits>
int32_t multiply(uint8_t const* codes, size_t column, int8_t const* activations) noexcept
{
    int32_t sum = 0;
    for (size_t i = 0; i < 4; ++i)
    {
        int32_t const code = Bits == 4 ? codes[column % 16 * 4 + i] >> (column / 16 * 4) & 0xF : codes[column * 4 + i];
        sum += code * activations[i];
    }
    return sum;
}

template <int Bits>
void multiplyRow(Tile const& tile, QuantizedRows const& rows, size_t row, float* out) noexcept
{
    constexpr size_t kStepBytes = kColumns * 4 * Bits / 8;
    constexpr int32_t kMiddle = Bits == 4 ? 8 : 128;
    float totals[kColumns]{};
    for (size_t group = 0; group < rows.groups; ++group)
    {
        uint8_t const* const codes = tile.codes + group * tile.codeStride;
        int8_t const* const activations = rows.codes + (row * rows.groups + group) * rows.groupSize;
        int32_t const sum = rows.sums[row * rows.groups + group];
        float const scale = rows.scales[row * rows.groups + group];
        int32_t sums[kColumns];
        for (int32_t& each : sums)
        {
            each = -kMiddle * sum;
        }
        for (size_t step = 0; step < rows.groupSize / 4; ++step)
        {
            for (size_t column = 0; column < kColumns; ++column)
            {
                sums[column] += multiply<Bits>(codes + step * kStepBytes, column, activations + 4 * step);
            }
        }
        float const* const scales = reinterpret_cast<float const*>(tile.scales + group * tile.scaleStride);
        uint16_t const* const halves = reinterpret_cast<uint16_t const*>(tile.scales + group * tile.scaleStride);
        float const* const offsets = reinterpret_cast<float const*>(tile.scales + group * tile.scaleStride + tile.scaleBytes);
        for (size_t column = 0; column < kColumns; ++column)
        {
            float const by = tile.hasHalfScales ? fromHalf(halves[column]) : scales[column];
            totals[column] += static_cast<float>(sums[column]) * (scale * by);
            if (tile.hasOffsets)
            {
                totals[column] -= scale * static_cast<float>(sum) * offsets[column];
            }
        }
    }
    std::memcpy(out, totals, sizeof(totals));
}

void byTile(Tile const& tile, QuantizedRows const& rows, size_t count, float* out, size_t stride, uint8_t*) noexcept
{
    for (size_t row = 0; row < count; ++row)
    {
        if (tile.bits == 4)
        {
            multiplyRow<4>(tile, rows, row, out + row * stride);
        }
        else
        {
            multiplyRow<8>(tile, rows, row, out + row * stride);
        }
    }
}

} // namespace

Products const kBaselineProducts{byTile, quantize, normalize, gateBy, dot};

} // namespace qwenforge::cpu
