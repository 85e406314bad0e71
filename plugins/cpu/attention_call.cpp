#include "cpu/attention.h"
#include "cpu/attention_kernels.h"

#include <algorithm>

namespace qwenforge::cpu
{
namespace
{

// Query rows of an item: enough to pay for the transposition of the keys, few enough for the level-1 and level-2 caches.
constexpr size_t kRowsPerItem = 96;

// A share of the keys takes longer than its merging from here on.
constexpr size_t kFewestKeysPerShare = 256;

// Per thread: one that begins late then does less.
constexpr size_t kSharesPerWorker = 2;

enum Input : size_t
{
    kPackedInput = 0,
    kKeyInput = 1,
    kValueInput = 2,
    kPastKeyInput = 3,
    kPastValueInput = 4,
    kLastKeysInput = 5,
    kCosinesInput = 7,
    kSinesInput = 8,
    kPositionIdsInput = 9,
};

size_t countOf(Node const& node, char const* attribute)
{
    int64_t const value = node.integer(attribute);
    if (value <= 0)
    {
        throw Refusal(std::string(attribute) + " is " + std::to_string(value) + " and has to be positive");
    }
    return static_cast<size_t>(value);
}

template <typename T>
View<T> tensor(Call const& call, size_t index, char const* name, size_t rank)
{
    View<T> view = call.input<T>(index);
    if (view.shape.rank() != rank)
    {
        throw Refusal(std::string(name) + " has shape " + view.shape.text() + " and has to have " + std::to_string(rank)
            + " dimensions");
    }
    return view;
}

[[noreturn]] void refuseShape(char const* name, Shape const& found, std::string const& wanted)
{
    throw Refusal(std::string(name) + " has shape " + found.text() + " and has to have " + wanted);
}

} // namespace

AttentionAttributes::AttentionAttributes(Node const& node)
    : heads(countOf(node, "num_heads"))
    , kvHeads(countOf(node, "kv_num_heads"))
    , scale(node.number("scale", 0))
    , window(0)
    , rotates(node.integer("do_rotary", 0) != 0)
{
    if (heads % kvHeads != 0)
    {
        throw Refusal("num_heads is " + std::to_string(heads) + ", no multiple of kv_num_heads, which is "
            + std::to_string(kvHeads));
    }
    int64_t const asked = node.integer("local_window_size", -1);
    if (asked == 0 || asked < -1)
    {
        throw Refusal("local_window_size is " + std::to_string(asked) + " and has to be positive, or -1 for none");
    }
    window = asked < 0 ? 0 : static_cast<size_t>(asked);
    if (node.has(kKeyInput) || node.has(kValueInput))
    {
        throw Refusal("key and value are connected: they have to be packed into the first input, behind the queries");
    }
    if (rotates && !(node.has(kCosinesInput) && node.has(kSinesInput)))
    {
        throw Refusal("do_rotary is 1 but cos_cache or sin_cache is left out");
    }
    // What GroupQueryAttention has and this op does not.
    if (node.integer("rotary_interleaved", 0) != 0 || node.number("softcap", 0) != 0
        || node.integer("smooth_softmax", 0) > 0)
    {
        throw Refusal("rotary_interleaved, softcap and smooth_softmax are not supported; leave them out");
    }
}

AttentionCall::AttentionCall(AttentionAttributes const& attributes, Call const& call)
    : cosines(nullptr)
    , sines(nullptr)
    , positionIds(nullptr)
    , halfRotated(0)
{
    auto const queries = tensor<float>(call, kPackedInput, "query", 3);
    auto const keys = tensor<void>(call, kPastKeyInput, "past_key", 4);
    auto const values = tensor<void>(call, kPastValueInput, "past_value", 4);
    auto const last = tensor<int32_t>(call, kLastKeysInput, "seqlens_k", 1);
    batch = static_cast<size_t>(queries.shape[0]);
    newTokens = static_cast<size_t>(queries.shape[1]);
    capacity = static_cast<size_t>(keys.shape[2]);
    headSize = static_cast<size_t>(keys.shape[3]);
    size_t const width = (attributes.heads + 2 * attributes.kvHeads) * headSize;
    if (headSize == 0 || headSize % 2 != 0)
    {
        throw Refusal("the head size, the last extent of past_key, is " + std::to_string(headSize)
            + " and has to be a positive multiple of 2");
    }
    if (static_cast<size_t>(queries.shape[2]) != width)
    {
        refuseShape("query", queries.shape, "a last extent of (num_heads + 2 kv_num_heads) head sizes, "
            + std::to_string(width));
    }
    presentShape = Shape{{queries.shape[0], static_cast<int64_t>(attributes.kvHeads), keys.shape[2], keys.shape[3]}};
    if (keys.shape.extents != presentShape.extents)
    {
        refuseShape("past_key", keys.shape, presentShape.text() + ", [batch, kv_num_heads, capacity, head size]");
    }
    if (values.shape.extents != presentShape.extents)
    {
        refuseShape("past_value", values.shape, "that of past_key, " + presentShape.text());
    }
    if (last.shape[0] != queries.shape[0])
    {
        refuseShape("seqlens_k", last.shape, "one element for each of the " + std::to_string(batch) + " rows of query");
    }
    for (size_t row = 0; row < batch; ++row)
    {
        int64_t const key = last.data[row];
        if (key >= keys.shape[2] || key + 1 < queries.shape[1])
        {
            throw Refusal("seqlens_k is " + std::to_string(key) + " for row " + std::to_string(row) + ": the last of "
                + std::to_string(newTokens) + " new tokens has to be inside of the cache, whose capacity is "
                + std::to_string(capacity));
        }
    }
    packed = queries.data;
    pastKeys = keys.data;
    pastValues = values.data;
    lastKeys = last.data;
    outputShape = Shape{
        {queries.shape[0], queries.shape[1], static_cast<int64_t>(attributes.heads * headSize)}};
    if (attributes.rotates)
    {
        auto const cos = tensor<float>(call, kCosinesInput, "cos_cache", 2);
        auto const sin = tensor<float>(call, kSinesInput, "sin_cache", 2);
        halfRotated = static_cast<size_t>(cos.shape[1]);
        if (2 * halfRotated > headSize)
        {
            refuseShape("cos_cache", cos.shape, "at most half of the head size, " + std::to_string(headSize / 2)
                + ", as its last extent");
        }
        if (sin.shape.extents != cos.shape.extents)
        {
            refuseShape("sin_cache", sin.shape, "that of cos_cache, " + cos.shape.text());
        }
        cosines = cos.data;
        sines = sin.data;
        auto const ids = call.input<int64_t>(kPositionIdsInput);
        if (ids && ids.shape.extents != std::vector<int64_t>{queries.shape[0], queries.shape[1]})
        {
            refuseShape("position_ids", ids.shape, "that of query without its last extent");
        }
        positionIds = ids.data;
        for (size_t row = 0; row < batch; ++row)
        {
            for (size_t token = 0; token < newTokens; ++token)
            {
                size_t const position = rotaryPosition(row, token); // a negative one wraps to far outside
                if (position >= static_cast<size_t>(cos.shape[0]))
                {
                    throw Refusal("the position of token " + std::to_string(token) + " of row " + std::to_string(row)
                        + " is " + std::to_string(static_cast<int64_t>(position)) + ", and cos_cache has "
                        + std::to_string(cos.shape[0]) + " positions");
                }
            }
        }
    }
}

AttentionPlan::AttentionPlan(
    AttentionAttributes const& attributes, AttentionCall const& call, size_t workers) noexcept
{
    size_t const most = std::max<size_t>(1, kRowsPerItem / attributes.group());
    tiles = (call.newTokens + most - 1) / most;
    tokensPerTile = tiles == 0 ? 1 : (call.newTokens + tiles - 1) / tiles;
    tiles = (call.newTokens + tokensPerTile - 1) / tokensPerTile;
    shares = 1;
    if (tiles == 1)
    {
        size_t longest = 0;
        for (size_t row = 0; row < call.batch; ++row)
        {
            longest = std::max(longest, static_cast<size_t>(call.lastKeys[row]) + 1);
        }
        if (attributes.window != 0)
        {
            longest = std::min(longest, attributes.window + call.newTokens - 1);
        }
        size_t const heads = std::max<size_t>(1, call.batch * attributes.kvHeads);
        size_t const wanted = (kSharesPerWorker * workers + heads - 1) / heads;
        shares = std::clamp<size_t>(longest / kFewestKeysPerShare, 1, wanted);
    }
}

} // namespace qwenforge::cpu
