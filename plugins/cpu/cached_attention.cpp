// CachedAttention: rotates queries and keys, appends keys and values to the cache and attends, in one op.

#include "cpu/attention.h"
#include "cpu/attention_kernels.h"
#include "cpu/instruction_set.h"
#include "cpu/scratch.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace qwenforge::cpu
{
namespace
{

AttentionKernels const& kernelsOf(InstructionSet set) noexcept
{
#if defined(__x86_64__)
    switch (set)
    {
    case InstructionSet::kAvx512Vnni: return kAvx512Attention;
    case InstructionSet::kAvx2: return kAvx2Attention;
    case InstructionSet::kBaseline: break;
    }
#else
    (void)set;
#endif
    return kBaselineAttention;
}

CacheKernels<float> const& cacheKernels(AttentionKernels const& kernels, float const*) noexcept
{
    return kernels.float32;
}

CacheKernels<Half> const& cacheKernels(AttentionKernels const& kernels, Half const*) noexcept
{
    return kernels.float16;
}

size_t inWholeVectors(size_t floats) noexcept
{
    return (floats + kWidestVector - 1) / kWidestVector * kWidestVector;
}

size_t partialFloats(size_t rows, size_t headSize) noexcept
{
    return rows * (inWholeVectors(headSize) + kWidestVector) + inWholeVectors(rows);
}

PartialAttention partialAt(float* memory, size_t rows, size_t headSize) noexcept
{
    float* const weights = memory + rows * inWholeVectors(headSize);
    return {memory, weights + rows * kWidestVector, weights};
}

constexpr Rotation kNoRotation{nullptr, nullptr, 0};

// One call, while its stages run. Element is that of the caches.
template <typename Element>
class Run
{
public:
    Run(AttentionAttributes const& attributes, AttentionKernels const& kernels, AttentionCall const& call,
        AttentionPlan const& plan, float* output, Element* keys, Element* values)
        : mAttributes(attributes)
        , mKernels(kernels)
        , mCaches(cacheKernels(kernels, keys))
        , mCall(call)
        , mPlan(plan)
        , mOutput(output)
        , mKeys(keys)
        , mValues(values)
        , mScale((attributes.scale != 0 ? attributes.scale : 1 / std::sqrt(static_cast<float>(call.headSize)))
              * 1.44269504F) // log2(e)
        , mInPlace(keys == call.pastKeys && values == call.pastValues)
    {
    }

    void addStages(Stages& stages)
    {
        size_t const heads = mCall.batch * mAttributes.kvHeads;
        // Tokens of other tiles have to be in the cache first; those of one tile are put there by whoever reads them.
        bool const appendsFirst = !mInPlace || mPlan.tiles > 1;
        if (appendsFirst)
        {
            stages.add(heads,
                [this](size_t head, size_t)
                {
                    copyPast(head);
                    append(head, 0, mCall.capacity);
                });
        }
        takeMemory(heads, stages.workers());
        stages.add(heads * mPlan.tiles * mPlan.shares,
            [this, appendsFirst](size_t item, size_t worker)
            {
                size_t const share = item % mPlan.shares;
                size_t const tile = item / mPlan.shares % mPlan.tiles;
                attend(item / mPlan.shares / mPlan.tiles, tile, share, !appendsFirst, mWorkers[worker]);
            });
        if (mPlan.shares > 1)
        {
            stages.add(heads,
                [this](size_t head, size_t) { write(head, 0, mCall.newTokens, mParts + head * mPlan.shares); });
        }
    }

private:
    // A worker's own, for one item at a time.
    struct Workspace
    {
        float* queries; // [rows, headSize]
        float* scratch;
        PartialAttention whole; // where there are no shares
    };

    // All of it before the first stage: items must not throw.
    void takeMemory(size_t heads, size_t workers)
    {
        size_t const rows = mPlan.tokensPerTile * mAttributes.group();
        size_t const floats = partialFloats(rows, mCall.headSize);
        auto const take = [&](size_t count) { return mMemory.take<float>(count); };
        float* const queries = take(workers * rows * mCall.headSize);
        float* const scratch = take(workers * attentionScratch(mCall.headSize));
        float* const whole = take(workers * floats);
        mWorkers = mMemory.take<Workspace>(workers);
        for (size_t i = 0; i < workers; ++i)
        {
            mWorkers[i] = {queries + i * rows * mCall.headSize, scratch + i * attentionScratch(mCall.headSize),
                partialAt(whole + i * floats, rows, mCall.headSize)};
        }
        if (mPlan.shares > 1)
        {
            float* const partials = take(heads * mPlan.shares * floats);
            mParts = mMemory.take<PartialAttention>(heads * mPlan.shares);
            for (size_t i = 0; i < heads * mPlan.shares; ++i)
            {
                mParts[i] = partialAt(partials + i * floats, rows, mCall.headSize);
            }
        }
    }

    size_t cacheStride() const noexcept
    {
        return mCall.capacity * mCall.headSize;
    }

    // Of head number `head` of a token: queries first, then keys, then values.
    float const* packed(size_t row, size_t token, size_t head) const noexcept
    {
        size_t const heads = mAttributes.heads + 2 * mAttributes.kvHeads;
        return mCall.packed + ((row * mCall.newTokens + token) * heads + head) * mCall.headSize;
    }

    float* output(size_t row, size_t token, size_t head) const noexcept
    {
        return mOutput + ((row * mCall.newTokens + token) * mAttributes.heads + head) * mCall.headSize;
    }

    Rotation rotation(size_t row, size_t token) const noexcept
    {
        if (mCall.halfRotated == 0)
        {
            return kNoRotation;
        }
        size_t const offset = mCall.rotaryPosition(row, token) * mCall.halfRotated;
        return {mCall.cosines + offset, mCall.sines + offset, mCall.halfRotated};
    }

    void copyPast(size_t head) const noexcept
    {
        size_t const offset = head * cacheStride();
        auto const copy = [&](Element* present, void const* past)
        {
            if (present != past)
            {
                std::memcpy(
                    present + offset, static_cast<Element const*>(past) + offset, cacheStride() * sizeof(Element));
            }
        };
        copy(mKeys, mCall.pastKeys);
        copy(mValues, mCall.pastValues);
    }

    // Puts the new tokens whose indices are from `begin` to `end` into the cache.
    void append(size_t head, size_t begin, size_t end) const noexcept
    {
        size_t const row = head / mAttributes.kvHeads;
        size_t const kvHead = head % mAttributes.kvHeads;
        size_t const first = mCall.firstPosition(row);
        for (size_t token = 0; token < mCall.newTokens; ++token)
        {
            size_t const index = first + token;
            if (index < begin || index >= end)
            {
                continue;
            }
            size_t const offset = head * cacheStride() + index * mCall.headSize;
            mCaches.rotate(packed(row, token, mAttributes.heads + kvHead), rotation(row, token), mCall.headSize, 1,
                mKeys + offset);
            mCaches.rotate(packed(row, token, mAttributes.heads + mAttributes.kvHeads + kvHead), kNoRotation,
                mCall.headSize, 1, mValues + offset);
        }
    }

    void attend(size_t head, size_t tile, size_t share, bool appends, Workspace const& workspace) const noexcept
    {
        size_t const row = head / mAttributes.kvHeads;
        size_t const group = mAttributes.group();
        size_t const headSize = mCall.headSize;
        size_t const firstToken = tile * mPlan.tokensPerTile;
        size_t const tokens = std::min(mPlan.tokensPerTile, mCall.newTokens - firstToken);

        AttentionItem<Element> item{};
        item.headSize = headSize;
        item.rows = tokens * group;
        item.group = group;
        item.keys = mKeys + head * cacheStride();
        item.values = mValues + head * cacheStride();
        item.firstPosition = mCall.firstPosition(row) + firstToken;
        item.window = mAttributes.window == 0 ? mCall.capacity : mAttributes.window;
        // Keys that some query of the tile sees, in equal shares of whole tiles.
        size_t const end = item.firstPosition + tokens;
        size_t const begin = item.firstPosition + 1 > item.window ? item.firstPosition + 1 - item.window : 0;
        size_t const tilesOfKeys = (end - begin + kKeysPerTile - 1) / kKeysPerTile;
        size_t const keysPerShare = (tilesOfKeys + mPlan.shares - 1) / mPlan.shares * kKeysPerTile;
        item.keyBegin = std::min(end, begin + share * keysPerShare);
        item.keyEnd = std::min(end, item.keyBegin + keysPerShare);
        if (appends)
        {
            append(head, item.keyBegin, item.keyEnd);
        }

        for (size_t token = 0; token < tokens; ++token)
        {
            Rotation const turn = rotation(row, firstToken + token);
            for (size_t i = 0; i < group; ++i)
            {
                size_t const queryHead = head % mAttributes.kvHeads * group + i;
                mKernels.float32.rotate(packed(row, firstToken + token, queryHead), turn, headSize, mScale,
                    workspace.queries + (token * group + i) * headSize);
            }
        }
        item.queries = workspace.queries;
        if (mPlan.shares > 1)
        {
            mCaches.attend(item, mParts[head * mPlan.shares + share], workspace.scratch);
            return;
        }
        mCaches.attend(item, workspace.whole, workspace.scratch);
        write(head, firstToken, tokens, &workspace.whole);
    }

    // The output of some tokens, from their `mPlan.shares` parts.
    void write(size_t head, size_t firstToken, size_t tokens, PartialAttention const* parts) const noexcept
    {
        size_t const row = head / mAttributes.kvHeads;
        size_t const group = mAttributes.group();
        for (size_t token = 0; token < tokens; ++token)
        {
            for (size_t i = 0; i < group; ++i)
            {
                mKernels.merge(parts, mPlan.shares, token * group + i, mCall.headSize,
                    output(row, firstToken + token, head % mAttributes.kvHeads * group + i));
            }
        }
    }

    AttentionAttributes const& mAttributes;
    AttentionKernels const& mKernels;
    CacheKernels<Element> const& mCaches;
    AttentionCall const& mCall;
    AttentionPlan const& mPlan;
    float* mOutput;
    Element* mKeys; // the present ones
    Element* mValues;
    float mScale;
    bool mInPlace;
    Scratch mMemory;
    Workspace* mWorkers{nullptr};
    PartialAttention* mParts{nullptr}; // [batch, kvHeads, shares]
};

template <typename Element>
class CachedAttention : public Kernel
{
public:
    explicit CachedAttention(Node const& node)
        : mAttributes(node)
        , mKernels(kernelsOf(instructionSet()))
    {
    }

    void compute(Call const& context) const override
    {
        AttentionCall const call(mAttributes, context);
        float* const output = context.output<float>(0, call.outputShape);
        auto* const keys = context.output<Element>(1, call.presentShape);
        auto* const values = context.output<Element>(2, call.presentShape);
        AttentionPlan const plan(mAttributes, call, workerCount());
        Run<Element> run(mAttributes, mKernels, call, plan, output, keys, values);
        size_t const items = call.batch * mAttributes.kvHeads * plan.tiles * plan.shares;
        Stages stages(std::clamp<size_t>(items, 1, workerCount()));
        run.addStages(stages);
        context.run(stages);
    }

private:
    AttentionAttributes mAttributes;
    AttentionKernels const& mKernels;
};

template <typename Element>
OpDefinition define(Port cache)
{
    return {"CachedAttention",
        {kFloat, kOptionalFloat, kOptionalFloat, cache, cache, kInt32, kInt32, kOptionalFloat, kOptionalFloat,
            kOptionalInt64},
        {kFloat, cache, cache},
        [](Node const& node) -> std::unique_ptr<Kernel> { return std::make_unique<CachedAttention<Element>>(node); }};
}

} // namespace

OpDefinition cachedAttention()
{
    return define<float>(kFloat);
}

OpDefinition cachedAttentionOfHalves()
{
    return define<Half>(kHalf);
}

} // namespace qwenforge::cpu
