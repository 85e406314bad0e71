// Which tiles are fastest for how many tokens, by GPU: one sm<NN>.inc a GPU. README.md says how they are made.

#pragma once

#include "moe/moe.h"

namespace qwenforge
{
namespace moe
{

struct Tactic
{
    int32_t sm;
    WeightType weightType;
    int32_t eightUpTo;   // tokens: up to so many, kEight
    int32_t sixteenUpTo; // then, up to so many pairs a stored expert on average, kSixteen; above, kWide
    int32_t groupedFrom; // tokens: from so many on, kGrouped; 0 for never
};

constexpr Tactic kTactics[]{
#include "moe/tactics/sm80.inc"
#include "moe/tactics/sm86.inc"
#include "moe/tactics/sm87.inc"
#include "moe/tactics/sm89.inc"
#include "moe/tactics/sm90.inc"
#include "moe/tactics/sm100.inc"
#include "moe/tactics/sm110.inc"
#include "moe/tactics/sm120.inc"
};

// The one of the newest GPU of the table that is not newer than `sm`, or else of the oldest.
inline Tactic const& tacticFor(int32_t sm, WeightType weightType)
{
    Tactic const* found = nullptr;
    for (Tactic const& tactic : kTactics)
    {
        if (tactic.weightType == weightType && (found == nullptr || tactic.sm <= sm))
        {
            found = &tactic;
        }
    }
    return *found;
}

} // namespace moe
} // namespace qwenforge
