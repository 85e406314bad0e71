// The arithmetic of CachedAttention, in the instruction set of the machine.
//
// Queries and scores are in units of log2: a query carries scale * log2(e), and a probability is 2^(score - maximum).

#pragma once

#include <cstddef>
#include <cstdint>

namespace qwenforge::cpu
{

inline constexpr size_t kKeysPerTile = 64;
inline constexpr size_t kKeysPerPass = 512;
inline constexpr size_t kWidestVector = 16; // of floats
inline constexpr size_t kMostRowsAtOnce = 6;
inline constexpr size_t kFewRows = 12; // up to here the keys are not worth transposing

// A transposed tile of keys, a padded one of values, and scores.
constexpr size_t attentionScratch(size_t headSize) noexcept
{
    return kKeysPerTile * (2 * headSize + kWidestVector + kMostRowsAtOnce) + kFewRows * kKeysPerPass;
}

// Tables of cosines and sines [P, half]: dimensions i and half + i of a head turn together, those behind 2 * half stay.
struct Rotation
{
    float const* cosines; // [half], of one position
    float const* sines;
    size_t half; // 0: none
};

// Attention of some queries over some keys, before the division by the sum: what several of these give for other keys of
// the same queries is merged by AttentionKernels::merge.
struct PartialAttention
{
    float* sums;    // [rows, paddedHeadSize]: of probabilities times values
    float* maxima;  // [rows]: of the scores, -inf where a row sees none of the keys
    float* weights; // [rows, kWidestVector]: of which the sum is that of the probabilities
};

// Row number `row` of the queries sees the keys up to `firstPosition + row / group`, of those the last `window`.
struct AttentionItem
{
    float const* queries; // [rows, headSize]
    float const* keys;    // [capacity, headSize], of one head
    float const* values;
    size_t headSize;
    size_t rows;
    size_t group; // query heads that share the keys
    size_t firstPosition;
    size_t window;
    size_t keyBegin; // the item's share of the keys
    size_t keyEnd;
};

struct AttentionKernels
{
    // turned = factor * the rotated head, both [headSize].
    void (*rotate)(float const* head, Rotation const& rotation, size_t headSize, float factor, float* turned);

    // `scratch` is the caller's own, of attentionScratch(headSize) floats.
    void (*attend)(AttentionItem const& item, PartialAttention const& result, float* scratch);

    // output [headSize] = row number `row` of `count` parts; the parts may change.
    void (*merge)(PartialAttention const* parts, size_t count, size_t row, size_t headSize, float* output);
};

extern AttentionKernels const kBaselineAttention;
#if defined(__x86_64__)
extern AttentionKernels const kAvx2Attention;
extern AttentionKernels const kAvx512Attention;
#endif

} // namespace qwenforge::cpu
