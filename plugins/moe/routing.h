// Which token goes to which expert, and what comes back from there.
//
// T tokens of one chunk, E experts of which El are *local* (their weights are here), Es shared ones, K routed experts a
// token, S = K + Es *slots* a token. *Stored* experts are the local ones and then the shared ones. A *pair* is a token and
// one of its slots, numbered t * S + slot; the slots of the shared experts are the last. Pairs of stored experts are sorted
// by expert, those of one expert in order of their numbers; a pair's place in that order is its *position*. Each expert's
// positions are cut into *tiles* of at most tileTokens.

#pragma once

#include <cstdint>

namespace qwenforge
{
namespace moe
{

// Positions `first` .. `first + pairs - 1` of one stored expert; `pairs` is at least 1.
struct Tile
{
    int32_t expert;
    int32_t first;
    int32_t pairs;
};

struct Routing
{
    int32_t tokens;
    int32_t experts;       // E
    int32_t firstLocal;    // the first of the local ones
    int32_t localExperts;  // El
    int32_t sharedExperts; // Es
    int32_t topK;          // K
    int32_t slots;         // S
    int32_t tileTokens;
    bool normalize;
    int32_t* stored;     // [T, S] stored expert of a pair, -1 where it is not local
    float* weights;      // [T, S]
    int32_t* counts;     // [El + Es] pairs of a stored expert
    int32_t* pairAt;     // [T * S] pair by position
    int32_t* positionOf; // [T * S] position by pair, -1 where its expert is not local
    Tile* tiles;         // of expert 0, then of expert 1, ...
    int32_t* tileCount;  // [1]
};

} // namespace moe
} // namespace qwenforge
