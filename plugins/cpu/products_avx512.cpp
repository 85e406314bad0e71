// Products for AVX-512 with VNNI; compiled with its flags, so nothing here is shared with other files.

#include "cpu/products.h"

#include <immintrin.h>

#include <type_traits>
#include <utility>

// Early enough for the compiler to see that accumulators need no memory.
#define QWENFORGE_INLINE __attribute__((always_inline))

namespace qwenforge::cpu
{
namespace
{

constexpr size_t kColumns = 32;
constexpr size_t kRowsUnpacked = 5;   // from so many rows on 4-bit codes are unpacked once for all of them

QWENFORGE_INLINE inline int32_t fourCodes(int8_t const* codes) noexcept
{
    int32_t four;
    __builtin_memcpy(&four, codes, sizeof(four));
    return four;
}

// sums += four products of bytes each, unsigned by signed. GCC 12 copies the sums around its own function for it, which takes
// as long as the products.
QWENFORGE_INLINE inline void accumulate(__m512i& sums, __m512i codes, __m512i activations) noexcept
{
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(activations));
}

// 32 outputs' codes of one step, a byte each.
struct Step
{
    __m512i low, high; // outputs 0 to 15, 16 to 31
};

template <int Bits>
QWENFORGE_INLINE inline Step stepOf(uint8_t const* codes) noexcept
{
    if constexpr (Bits == 4)
    {
        __m512i const mask = _mm512_set1_epi8(0xF);
        __m512i const both = _mm512_load_si512(codes);
        return {_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16(both, 4), mask)};
    }
    else
    {
        return {_mm512_load_si512(codes), _mm512_load_si512(codes + 64)};
    }
}

// 16 numbers of float16.
QWENFORGE_INLINE inline __m512 ofHalves(uint8_t const* halves) noexcept
{
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(halves)));
}

// Calls `each` with the constants 0 to Count - 1. A loop over an array of accumulators would keep them in memory.
template <int... Indices, typename Each>
QWENFORGE_INLINE inline void forAll(std::integer_sequence<int, Indices...>, Each const& each) noexcept
{
    (each(std::integral_constant<int, Indices>()), ...);
}

template <int Count, typename Each>
QWENFORGE_INLINE inline void forEach(Each const& each) noexcept
{
    forAll(std::make_integer_sequence<int, Count>(), each);
}

// Rows of activations, one behind the other.
struct Rows
{
    int8_t const* codes;
    float const* scales;
    int32_t const* sums;
    size_t groups;
    size_t groupSize;
};

// `Count` rows by a tile. The codes of one group are `codeStride` bytes behind those of the group before it.
template <int Count, int Bits>
void multiplyBlock(Tile const& tile, uint8_t const* codes, size_t codeStride, int32_t middle, Rows const& rows,
    float* out, size_t stride) noexcept
{
    constexpr size_t kStepBytes = Bits == 4 ? 64 : 128;
    constexpr int kChains = Count == 1 ? 2 : 1; // of sums: one row alone would wait for each product
    size_t const depth = rows.groups * rows.groupSize;
    __m512 totals[2 * Count];
    forEach<2 * Count>([&](auto i) QWENFORGE_INLINE { totals[i] = _mm512_setzero_ps(); });
    for (size_t group = 0; group < rows.groups; ++group)
    {
        __m512i low[Count * kChains];
        __m512i high[Count * kChains];
        forEach<Count>(
            [&](auto r) QWENFORGE_INLINE
            {
                // The codes' middle is taken from the sums before they start, exactly.
                low[r] = high[r] = _mm512_set1_epi32(-middle * rows.sums[r * rows.groups + group]);
                if constexpr (kChains == 2)
                {
                    low[1] = high[1] = _mm512_setzero_si512();
                }
            });
        uint8_t const* weights = codes + group * codeStride;
        // Three rows share a pointer: there are not as many registers as rows.
        int8_t const* const start = rows.codes + group * rows.groupSize;
        int8_t const* pointers[(Count + 2) / 3];
        forEach<(Count + 2) / 3>([&](auto i) QWENFORGE_INLINE { pointers[i] = start + 3 * i * depth; });
        int8_t const* const end = start + rows.groupSize;
        while (pointers[0] < end)
        {
            forEach<kChains>(
                [&](auto chain) QWENFORGE_INLINE
                {
                    Step const step = stepOf<Bits>(weights);
                    forEach<Count>(
                        [&](auto r) QWENFORGE_INLINE
                        {
                            constexpr int kSum = decltype(chain)::value * Count + decltype(r)::value;
                            __m512i const four = _mm512_set1_epi32(fourCodes(pointers[r / 3] + (r % 3) * depth));
                            accumulate(low[kSum], step.low, four);
                            accumulate(high[kSum], step.high, four);
                        });
                    weights += kStepBytes;
                    forEach<(Count + 2) / 3>([&](auto i) QWENFORGE_INLINE { pointers[i] += 4; });
                });
        }
        uint8_t const* const scales = tile.scales + group * tile.scaleStride;
        float const* const offsets = reinterpret_cast<float const*>(scales + tile.scaleBytes);
        __m512 const scaleLow = tile.hasHalfScales ? ofHalves(scales) : _mm512_loadu_ps(scales);
        __m512 const scaleHigh = tile.hasHalfScales ? ofHalves(scales + 32) : _mm512_loadu_ps(scales + 64);
        forEach<Count>(
            [&](auto r) QWENFORGE_INLINE
            {
                if constexpr (kChains == 2)
                {
                    low[0] = _mm512_add_epi32(low[0], low[1]);
                    high[0] = _mm512_add_epi32(high[0], high[1]);
                }
                float const scale = rows.scales[r * rows.groups + group];
                __m512 const by = _mm512_set1_ps(scale);
                totals[2 * r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low[r]), _mm512_mul_ps(by, scaleLow), totals[2 * r]);
                totals[2 * r + 1]
                    = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[r]), _mm512_mul_ps(by, scaleHigh), totals[2 * r + 1]);
                if (tile.hasOffsets)
                {
                    __m512 const sum = _mm512_set1_ps(scale * static_cast<float>(rows.sums[r * rows.groups + group]));
                    totals[2 * r] = _mm512_fnmadd_ps(sum, _mm512_loadu_ps(offsets), totals[2 * r]);
                    totals[2 * r + 1] = _mm512_fnmadd_ps(sum, _mm512_loadu_ps(offsets + 16), totals[2 * r + 1]);
                }
            });
    }
    forEach<Count>(
        [&](auto r) QWENFORGE_INLINE
        {
            _mm512_storeu_ps(out + r * stride, totals[2 * r]);
            _mm512_storeu_ps(out + r * stride + 16, totals[2 * r + 1]);
        });
}

// As many blocks of so many rows as there are from row `first` on; returns the row behind them.
template <int Count, int Bits>
size_t multiplyBlocks(Tile const& tile, uint8_t const* codes, size_t codeStride, int32_t middle,
    QuantizedRows const& all, size_t first, size_t count, float* out, size_t stride) noexcept
{
    for (; count - first >= static_cast<size_t>(Count); first += static_cast<size_t>(Count))
    {
        Rows const rows{all.codes + first * all.groups * all.groupSize, all.scales + first * all.groups,
            all.sums + first * all.groups, all.groups, all.groupSize};
        multiplyBlock<Count, Bits>(tile, codes, codeStride, middle, rows, out + first * stride, stride);
    }
    return first;
}

template <int Bits>
void multiplyRows(Tile const& tile, uint8_t const* codes, size_t codeStride, int32_t middle, QuantizedRows const& rows,
    size_t count, float* out, size_t stride) noexcept
{
    size_t first = 0;
    if constexpr (Bits == 8)
    {
        first = multiplyBlocks<12, Bits>(tile, codes, codeStride, middle, rows, first, count, out, stride);
        first = multiplyBlocks<8, Bits>(tile, codes, codeStride, middle, rows, first, count, out, stride);
    }
    first = multiplyBlocks<4, Bits>(tile, codes, codeStride, middle, rows, first, count, out, stride);
    first = multiplyBlocks<2, Bits>(tile, codes, codeStride, middle, rows, first, count, out, stride);
    multiplyBlocks<1, Bits>(tile, codes, codeStride, middle, rows, first, count, out, stride);
}

void byTile(Tile const& tile, QuantizedRows const& activations, size_t count, float* out, size_t stride,
    uint8_t* scratch) noexcept
{
    if (tile.bits == 8)
    {
        multiplyRows<8>(tile, tile.codes, tile.codeStride, 128, activations, count, out, stride);
        return;
    }
    if (count < kRowsUnpacked)
    {
        multiplyRows<4>(tile, tile.codes, tile.codeStride, 8, activations, count, out, stride);
        return;
    }
    __m512i const mask = _mm512_set1_epi8(0xF);
    size_t const unpackedBytes = activations.groupSize * kColumns;
    for (size_t group = 0; group < activations.groups; ++group)
    {
        uint8_t const* const source = tile.codes + group * tile.codeStride;
        uint8_t* const target = scratch + group * unpackedBytes;
        for (size_t at = 0; at < tile.codeBytes; at += 64)
        {
            __m512i const both = _mm512_load_si512(source + at);
            _mm512_store_si512(target + 2 * at, _mm512_and_si512(both, mask));
            _mm512_store_si512(target + 2 * at + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), mask));
        }
    }
    multiplyRows<8>(tile, scratch, unpackedBytes, 8, activations, count, out, stride);
}

__mmask16 firstLanes(size_t count) noexcept
{
    return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1u << count) - 1);
}

void quantize(float const* values, size_t depth, size_t row, QuantizedRows const& out) noexcept
{
    int8_t* const codes = out.codes + row * out.groups * out.groupSize;
    for (size_t group = 0; group < out.groups; ++group)
    {
        size_t const start = group * out.groupSize;
        size_t const end = start + out.groupSize;
        __m512 largest = _mm512_setzero_ps();
        __mmask16 unordered = 0;
        for (size_t at = start; at < end; at += 16)
        {
            __mmask16 const lanes = at >= depth ? 0 : firstLanes(depth - at);
            __m512 const value = _mm512_maskz_loadu_ps(lanes, values + at);
            unordered = static_cast<__mmask16>(unordered | _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q));
            largest = _mm512_max_ps(largest, _mm512_abs_ps(value));
        }
        float const magnitude = _mm512_reduce_max_ps(largest);
        float const scale = unordered != 0 ? __builtin_nanf("") : magnitude / 127.0f;
        __m512 const inverse = _mm512_set1_ps(magnitude > 0 ? 127.0f / magnitude : 0.0f);
        __m512i sum = _mm512_setzero_si512();
        for (size_t at = start; at < end; at += 16)
        {
            __mmask16 const lanes = at >= depth ? 0 : firstLanes(depth - at);
            __m512i const code
                = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, values + at), inverse));
            __m128i const bytes = _mm512_cvtsepi32_epi8(code);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + at), bytes);
            sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(bytes));
        }
        out.scales[row * out.groups + group] = scale;
        out.sums[row * out.groups + group] = _mm512_reduce_add_epi32(sum);
    }
}

void normalize(float const* values, float const* residual, float const* weight, float epsilon, size_t depth, float* sum,
    float* out) noexcept
{
    __m512 squares = _mm512_setzero_ps();
    for (size_t at = 0; at < depth; at += 16)
    {
        __mmask16 const lanes = firstLanes(depth - at);
        __m512 value = _mm512_maskz_loadu_ps(lanes, values + at);
        if (residual != nullptr)
        {
            value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, residual + at));
        }
        squares = _mm512_fmadd_ps(value, value, squares);
        if (sum != nullptr)
        {
            _mm512_mask_storeu_ps(sum + at, lanes, value);
        }
        _mm512_mask_storeu_ps(out + at, lanes, value);
    }
    if (weight == nullptr)
    {
        return;
    }
    float const mean = _mm512_reduce_add_ps(squares) / static_cast<float>(depth);
    __m512 const by = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + epsilon));
    for (size_t at = 0; at < depth; at += 16)
    {
        __mmask16 const lanes = firstLanes(depth - at);
        __m512 const value = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, out + at), by);
        _mm512_mask_storeu_ps(out + at, lanes, _mm512_mul_ps(value, _mm512_maskz_loadu_ps(lanes, weight + at)));
    }
}

// exp(x) for x in [-87.3, 88]: 2^n times a polynomial of the rest, which lies within ln(2) / 2 of 0 (Cephes' expf).
__m512 exponential(__m512 x) noexcept
{
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.0f));
    __m512 const n = _mm512_roundscale_ps(
        _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

void gateBy(float* gate, float const* up, size_t count) noexcept
{
    for (size_t at = 0; at < count; at += 16)
    {
        __mmask16 const lanes = firstLanes(count - at);
        __m512 const value = _mm512_maskz_loadu_ps(lanes, gate + at);
        __m512 const below = _mm512_add_ps(
            _mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), value)));
        // A NaN would be lost in the bounds of the exponential: it is in the value itself.
        __m512 const silu = _mm512_div_ps(value, below);
        _mm512_mask_storeu_ps(gate + at, lanes, _mm512_mul_ps(silu, _mm512_maskz_loadu_ps(lanes, up + at)));
    }
}

void dot(float const* values, float const* matrix, size_t columns, size_t depth, float* out) noexcept
{
    for (size_t n = 0; n < columns; ++n)
    {
        float const* const row = matrix + n * depth;
        __m512 sums[4]{_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        size_t at = 0;
        for (; at + 64 <= depth; at += 64)
        {
            for (size_t i = 0; i < 4; ++i)
            {
                sums[i] = _mm512_fmadd_ps(
                    _mm512_loadu_ps(values + at + 16 * i), _mm512_loadu_ps(row + at + 16 * i), sums[i]);
            }
        }
        for (; at < depth; at += 16)
        {
            __mmask16 const lanes = firstLanes(depth - at);
            sums[0] = _mm512_fmadd_ps(
                _mm512_maskz_loadu_ps(lanes, values + at), _mm512_maskz_loadu_ps(lanes, row + at), sums[0]);
        }
        out[n] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
    }
}

} // namespace

Products const kAvx512Products{byTile, quantize, normalize, gateBy, dot};

} // namespace qwenforge::cpu
