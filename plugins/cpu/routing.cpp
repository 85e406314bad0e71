#include "cpu/routing.h"

#include <algorithm>
#include <cmath>

namespace qwenforge::cpu
{
Routing Routing::of(Scratch& scratch, size_t tokens, size_t experts, size_t chosen)
{
    size_t const pairs = tokens * chosen;
    return {pairs, 0, scratch.take<Expert>(std::min(experts, pairs)), scratch.take<uint32_t>(pairs),
        scratch.take<float>(pairs), scratch.take<uint32_t>(pairs), scratch.take<float>(pairs),
        scratch.take<size_t>(experts + 1)};
}

void chooseExperts(
    float const* logits, size_t token, size_t experts, size_t chosen, bool normalize, Routing const& routing) noexcept
{
    uint32_t* const indices = routing.expertOf + token * chosen;
    float* const weights = routing.weightOf + token * chosen;
    float greatest = logits[0];
    for (size_t i = 1; i < experts; ++i)
    {
        greatest = std::max(greatest, logits[i]);
    }
    float total = 0;
    for (size_t i = 0; i < experts; ++i)
    {
        total += std::exp(logits[i] - greatest);
    }
    float sum = 0;
    for (size_t slot = 0; slot < chosen; ++slot)
    {
        size_t best = experts;
        for (size_t i = 0; i < experts; ++i)
        {
            bool const isTaken = std::find(indices, indices + slot, i) != indices + slot;
            if (!isTaken && (best == experts || logits[i] > logits[best]))
            {
                best = i;
            }
        }
        indices[slot] = static_cast<uint32_t>(best);
        weights[slot] = std::exp(logits[best] - greatest) / total;
        sum += weights[slot];
    }
    for (size_t slot = 0; normalize && slot < chosen; ++slot)
    {
        weights[slot] /= sum;
    }
}

void groupPairs(size_t experts, size_t chosen, Routing& routing) noexcept
{
    std::fill_n(routing.counts, experts + 1, 0);
    for (size_t pair = 0; pair < routing.pairs; ++pair)
    {
        ++routing.counts[routing.expertOf[pair] + 1];
    }
    routing.active = 0;
    for (size_t expert = 0; expert < experts; ++expert)
    {
        size_t const pairs = routing.counts[expert + 1];
        if (pairs > 0)
        {
            routing.experts[routing.active++] = {expert, routing.counts[expert], pairs};
        }
        routing.counts[expert + 1] += routing.counts[expert];
    }
    for (size_t pair = 0; pair < routing.pairs; ++pair)
    {
        size_t const place = routing.counts[routing.expertOf[pair]]++;
        routing.tokens[place] = static_cast<uint32_t>(pair / chosen);
        routing.weights[place] = routing.weightOf[pair];
    }
}

} // namespace qwenforge::cpu
