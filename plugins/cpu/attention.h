// The numbers of one call of CachedAttention, checked, and how its work is divided.

#pragma once

#include "cpu/node.h"

namespace qwenforge::cpu
{

struct AttentionAttributes
{
    size_t heads;
    size_t kvHeads;
    float scale;   // 0: 1 / sqrt(headSize)
    size_t window; // keys that a query sees; 0: all up to its own
    bool rotates;

    explicit AttentionAttributes(Node const& node);

    size_t group() const noexcept
    {
        return heads / kvHeads;
    }
};

struct AttentionCall
{
    float const* packed; // [batch, newTokens, (heads + 2 kvHeads) headSize]: queries, keys, values
    void const* pastKeys; // [batch, kvHeads, capacity, headSize], of float32 or of float16
    void const* pastValues;
    int32_t const* lastKeys;    // [batch]
    float const* cosines;       // [positions, rotated / 2]; null: nothing turns
    float const* sines;
    int64_t const* positionIds; // [batch, newTokens]; null: a token's index in its row
    size_t batch;
    size_t newTokens;
    size_t capacity;
    size_t headSize;
    size_t halfRotated;
    Shape outputShape;
    Shape presentShape;

    // Throws Refusal for whatever would make the kernels read or write outside of a buffer.
    AttentionCall(AttentionAttributes const& attributes, Call const& call);

    // The index in its row of a row's first new token.
    size_t firstPosition(size_t row) const noexcept
    {
        return static_cast<size_t>(lastKeys[row]) + 1 - newTokens;
    }

    size_t rotaryPosition(size_t row, size_t token) const noexcept
    {
        return positionIds == nullptr ? firstPosition(row) + token
                                      : static_cast<size_t>(positionIds[row * newTokens + token]);
    }
};

// Items of work are (row, kv head, tile of the new tokens, share of the keys), the last one fastest.
struct AttentionPlan
{
    size_t tokensPerTile;
    size_t tiles;
    size_t shares; // above 1 only where there is one tile

    AttentionPlan(AttentionAttributes const& attributes, AttentionCall const& call, size_t workers) noexcept;
};

} // namespace qwenforge::cpu
