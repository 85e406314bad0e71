// Products for AVX2; compiled with its flags, so nothing here is shared with other files.

#include "cpu/products_plain.h"

#include <immintrin.h>

namespace qwenforge::cpu
{
namespace
{

constexpr size_t kVectors = 4; // of 8 outputs each

int32_t fourCodes(int8_t const* codes) noexcept
{
    int32_t four;
    std::memcpy(&four, codes, sizeof(four));
    return four;
}

// Codes of 8 outputs in one step, a byte each.
template <int Bits>
__m256i codesOf(uint8_t const* codes, size_t vector) noexcept
{
    if constexpr (Bits == 8)
    {
        return _mm256_load_si256(reinterpret_cast<__m256i const*>(codes) + vector);
    }
    else
    {
        __m256i const both = _mm256_load_si256(reinterpret_cast<__m256i const*>(codes) + vector % 2);
        return _mm256_and_si256(vector < 2 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(0xF));
    }
}

__m256 scalesOf(uint8_t const* scales, size_t vector, bool areHalves) noexcept
{
    return areHalves ? _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(scales) + vector))
                     : _mm256_loadu_ps(reinterpret_cast<float const*>(scales) + 8 * vector);
}

template <int Count, int Bits>
void multiplyBlock(Tile const& tile, QuantizedRows const& rows, size_t first, float* out, size_t stride) noexcept
{
    constexpr size_t kStepBytes = Bits == 4 ? 64 : 128;
    constexpr int32_t kMiddle = Bits == 4 ? 8 : 128;
    __m256i const evenBytes = _mm256_set1_epi16(0xFF);
    __m256 totals[Count][kVectors]{};
    for (size_t group = 0; group < rows.groups; ++group)
    {
        uint8_t const* const codes = tile.codes + group * tile.codeStride;
        int8_t const* activations[Count];
        __m256i sums[Count][kVectors];
        for (size_t r = 0; r < Count; ++r)
        {
            activations[r] = rows.codes + ((first + r) * rows.groups + group) * rows.groupSize;
            for (__m256i& sum : sums[r])
            {
                // The codes' middle is taken from the sums before they start, exactly.
                sum = _mm256_set1_epi32(-kMiddle * rows.sums[(first + r) * rows.groups + group]);
            }
        }
        for (size_t step = 0; step < rows.groupSize / 4; ++step)
        {
            uint8_t const* const source = codes + step * kStepBytes;
            __m256i even[Count];
            __m256i odd[Count];
            for (size_t r = 0; r < Count; ++r)
            {
                // Sums of bytes by bytes would be cut off at 16 bits: even and odd steps apart, 16 bits by 16 bits.
                __m256i const four = _mm256_set1_epi32(fourCodes(activations[r] + 4 * step));
                even[r] = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
                odd[r] = _mm256_srai_epi16(four, 8);
            }
            for (size_t vector = 0; vector < kVectors; ++vector)
            {
                __m256i const bytes = codesOf<Bits>(source, vector);
                __m256i const evenCodes = _mm256_and_si256(bytes, evenBytes);
                __m256i const oddCodes = _mm256_srli_epi16(bytes, 8);
                for (size_t r = 0; r < Count; ++r)
                {
                    sums[r][vector] = _mm256_add_epi32(sums[r][vector],
                        _mm256_add_epi32(
                            _mm256_madd_epi16(evenCodes, even[r]), _mm256_madd_epi16(oddCodes, odd[r])));
                }
            }
        }
        uint8_t const* const scales = tile.scales + group * tile.scaleStride;
        float const* const offsets = reinterpret_cast<float const*>(scales + tile.scaleBytes);
        for (size_t r = 0; r < Count; ++r)
        {
            float const scale = rows.scales[(first + r) * rows.groups + group];
            float const sum = static_cast<float>(rows.sums[(first + r) * rows.groups + group]);
            for (size_t vector = 0; vector < kVectors; ++vector)
            {
                __m256 const by = _mm256_mul_ps(_mm256_set1_ps(scale), scalesOf(scales, vector, tile.hasHalfScales));
                totals[r][vector] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r][vector]), by, totals[r][vector]);
                if (tile.hasOffsets)
                {
                    totals[r][vector] = _mm256_fnmadd_ps(
                        _mm256_set1_ps(scale * sum), _mm256_loadu_ps(offsets + 8 * vector), totals[r][vector]);
                }
            }
        }
    }
    for (size_t r = 0; r < Count; ++r)
    {
        for (size_t vector = 0; vector < kVectors; ++vector)
        {
            _mm256_storeu_ps(out + r * stride + 8 * vector, totals[r][vector]);
        }
    }
}

template <int Bits>
void multiplyRows(Tile const& tile, QuantizedRows const& rows, size_t count, float* out, size_t stride) noexcept
{
    size_t row = 0;
    for (; row + 2 <= count; row += 2)
    {
        multiplyBlock<2, Bits>(tile, rows, row, out + row * stride, stride);
    }
    if (row < count)
    {
        multiplyBlock<1, Bits>(tile, rows, row, out + row * stride, stride);
    }
}

void byTile(Tile const& tile, QuantizedRows const& rows, size_t count, float* out, size_t stride, uint8_t*) noexcept
{
    if (tile.bits == 4)
    {
        multiplyRows<4>(tile, rows, count, out, stride);
    }
    else
    {
        multiplyRows<8>(tile, rows, count, out, stride);
    }
}

} // namespace

Products const kAvx2Products{byTile, quantize, normalize, gateBy, dot};

} // namespace qwenforge::cpu
