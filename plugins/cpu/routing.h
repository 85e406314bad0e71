// Which experts a step's tokens go to, and the tokens of each expert.

#pragma once

#include "cpu/scratch.h"

#include <cstddef>
#include <cstdint>

namespace qwenforge::cpu
{

// Pairs of a token and one of its experts, those of one expert one behind the other, tokens in their order.
struct Routing
{
    struct Expert
    {
        size_t index;
        size_t firstPair;
        size_t pairs;
    };

    size_t pairs;       // tokens * k
    size_t active;      // experts with at least one token
    Expert* experts;    // [active], by index
    uint32_t* tokens;   // [pairs]
    float* weights;     // [pairs]
    uint32_t* expertOf; // [pairs], by token: what was chosen
    float* weightOf;    // [pairs], by token
    size_t* counts;     // [experts + 1]

    static Routing of(Scratch& scratch, size_t tokens, size_t experts, size_t chosen);
};

// The `chosen` experts of the greatest of the token's `logits` [experts], of equal ones the first; weights are the softmax
// over all experts, divided by the chosen ones' sum if `normalize`. A token with a NaN has NaN for weights.
void chooseExperts(
    float const* logits, size_t token, size_t experts, size_t chosen, bool normalize, Routing const& routing) noexcept;

// Pairs by expert, of what was chosen for every token.
void groupPairs(size_t experts, size_t chosen, Routing& routing) noexcept;

} // namespace qwenforge::cpu
