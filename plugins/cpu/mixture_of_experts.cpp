// QuantizedMixtureOfExperts: y = sum over the chosen experts e of w_e E_e(h) + sigmoid(h s) S(h), h = norm(x + residual),
// E and S gated MLPs, w = softmax(h R) at the chosen ones.

#include "cpu/routing.h"
#include "cpu/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

namespace qwenforge::cpu
{
namespace
{

enum Input
{
    kValues,
    kRouter,
    kGateUp, // each matrix with its scales and zero points
    kDown = 5,
    kSharedGate = 8,
    kSharedUp = 11,
    kSharedDown = 14,
    kSharedWeight = 17,
    kResidual,
    kNorm,
};

enum Output
{
    kResult,
    kSum,
};

constexpr size_t kRouterColumns = 8; // of one item where there are few rows
// Items of the down projections for each worker. One reads a stretch of every expert, where each begins anew: with few
// rows, when reading is what takes the time, the stretches are long.
constexpr size_t kDownItems = 8;
constexpr size_t kDownItemsOfFewRows = 2;

struct TileRange
{
    size_t first;
    size_t count;
};

struct SharedExpert
{
    GatedMatrices gated;
    QuantizedMatrix down;
};

// [rows, columns] as its transpose.
std::vector<float> transposed(View<float> const& matrix, size_t rows, size_t columns)
{
    std::vector<float> result(rows * columns);
    for (size_t row = 0; row < rows; ++row)
    {
        for (size_t column = 0; column < columns; ++column)
        {
            result[column * rows + row] = matrix.data[row * columns + column];
        }
    }
    return result;
}

void copyRow(QuantizedRows const& from, size_t row, QuantizedRows const& to, size_t target) noexcept
{
    size_t const groups = from.groups;
    size_t const depth = groups * from.groupSize;
    std::memcpy(to.codes + target * depth, from.codes + row * depth, depth);
    std::memcpy(to.scales + target * groups, from.scales + row * groups, groups * sizeof(float));
    std::memcpy(to.sums + target * groups, from.sums + row * groups, groups * sizeof(int32_t));
}

class MixtureOfExpertsKernel : public Kernel
{
public:
    explicit MixtureOfExpertsKernel(Node const& node)
        : mDepth(positive(node, "hidden_size"))
        , mInner(positive(node, "intermediate_size"))
        , mExperts(positive(node, "num_experts"))
        , mChosen(positive(node, "k"))
        , mNormalize(node.integer("normalize_routing_weights") != 0)
        , mNorm(vectorAt(node, kNorm, "norm_weight", mDepth))
        , mEpsilon(node.number("epsilon"))
        , mProducts(products())
    {
        if (mChosen > mExperts)
        {
            throw Refusal("k is " + std::to_string(mChosen) + ", but there are " + std::to_string(mExperts) + " experts");
        }
        mRouter = transposed(required(node, kRouter, "router", mDepth * mExperts), mDepth, mExperts);
        WeightFormat const format = WeightFormat::of(node, "bits", "block_size");
        mGated = GatedMatrices::at(node, kGateUp, "gate_up", mExperts, mInner, mDepth, format);
        mDown = matricesAt(node, kDown, "down", mExperts, mDepth, mInner,
            WeightFormat::of(node, "down_bits", "down_block_size"));
        if (node.has(kSharedGate))
        {
            size_t const inner = positive(node, "shared_intermediate_size");
            WeightFormat const shared = WeightFormat::of(node, "shared_bits", "shared_block_size");
            WeightFormat const down = WeightFormat::of(node, "shared_down_bits", "shared_down_block_size");
            mShared.emplace(SharedExpert{
                GatedMatrices::at(node, kSharedGate, kSharedUp, "shared_", inner, mDepth, shared),
                matrixAt(node, kSharedDown, "shared_down", mDepth, inner, down)});
            mSharedWeight = required(node, kSharedWeight, "shared_weight", mDepth);
        }
    }

    void compute(Call const& call) const override
    {
        Prologue const prologue = Prologue::of(call, kValues, kResidual, mNorm, mEpsilon, kSum, mDepth);
        float* const result = call.output<float>(kResult, prologue.values.shape);
        if (prologue.rows == 0)
        {
            return;
        }
        Scratch scratch;
        Stages stages(workerCount());
        Work work = takeWork(scratch, prologue.rows, stages.workers());
        addTokens(stages, work, prologue);
        addRouting(stages, work);
        addGateUp(stages, work);
        addInner(stages, work);
        addDown(stages, work, result);
        call.run(stages);
    }

private:
    // Memory of a call.
    struct Work
    {
        size_t count;    // tokens
        bool few;        // tokens
        float* hidden;   // [tokens, depth]
        float* logits;   // [tokens, experts]
        float* sharedBy; // [tokens], sigmoid
        Routing routing;
        QuantizedRows tokens;                 // of the routed experts' format
        QuantizedRows pairs;                  // the same by pair
        QuantizedRows sharedTokens;           // of the shared expert's format
        float* inner;                         // [pairs, inner]
        float* sharedInner;                   // [tokens, shared inner]
        std::vector<QuantizedRows> innerRows; // by worker where there are few tokens, else one for all
        std::vector<QuantizedRows> sharedRows;
        std::vector<float*> floats; // by worker
        std::vector<uint8_t*> panels;
    };

    static View<float> required(Node const& node, size_t input, char const* name, size_t elements)
    {
        View<float> const vector = vectorAt(node, input, name, elements);
        if (!vector)
        {
            throw Refusal(std::string(name) + " has to be there");
        }
        return vector;
    }

    Work takeWork(Scratch& scratch, size_t count, size_t workers) const
    {
        size_t const pairs = count * mChosen;
        bool const few = count <= kFewRows;
        Work work{count, few, scratch.take<float>(count * mDepth), scratch.take<float>(count * mExperts),
            scratch.take<float>(count), Routing::of(scratch, count, mExperts, mChosen),
            takeRows(scratch, count, mGated[0].gate), takeRows(scratch, pairs, mGated[0].gate), {},
            scratch.take<float>(pairs * mGated[0].width()), nullptr, {}, {}, {}, {}};
        size_t panel = std::max(panelBytes(mGated[0].gate), panelBytes(mDown[0]));
        if (mShared)
        {
            work.sharedTokens = takeRows(scratch, count, mShared->gated.gate);
            work.sharedInner = scratch.take<float>(count * mShared->gated.width());
            panel = std::max({panel, panelBytes(mShared->gated.gate), panelBytes(mShared->down)});
        }
        for (size_t i = 0; i < workers; ++i)
        {
            work.floats.push_back(scratch.take<float>(count * kTileColumns));
            work.panels.push_back(scratch.take<uint8_t>(panel));
            if (few || i == 0)
            {
                work.innerRows.push_back(takeRows(scratch, pairs, mDown[0]));
                if (mShared)
                {
                    work.sharedRows.push_back(takeRows(scratch, count, mShared->down));
                }
            }
        }
        return work;
    }

    void addTokens(Stages& stages, Work& work, Prologue const& prologue) const
    {
        auto const prepare = [this, &work, prologue](size_t token, size_t)
        {
            float* const memory = work.hidden + token * mDepth;
            float const* const hidden = prologue.row(mProducts, token, memory);
            if (hidden != memory)
            {
                std::copy_n(hidden, mDepth, memory);
            }
            mProducts.quantize(memory, mDepth, token, work.tokens);
            if (mShared)
            {
                mProducts.quantize(memory, mDepth, token, work.sharedTokens);
            }
        };
        if (!work.few)
        {
            stages.add(work.count, prepare);
            return;
        }
        for (size_t token = 0; token < work.count; ++token)
        {
            prepare(token, 0);
        }
    }

    // The router's products, beside the shared expert's, which need not wait for it; then who goes where.
    void addRouting(Stages& stages, Work& work) const
    {
        size_t const columns = work.few ? kRouterColumns : mExperts;
        size_t const parts = (mExperts + columns - 1) / columns;
        size_t const sharedTiles = mShared ? mShared->gated.gate.tiles() : 0;
        stages.add(work.count * parts + sharedTiles,
            [this, &work, columns, parts](size_t item, size_t worker)
            {
                if (item >= work.count * parts)
                {
                    multiplyGateUp(mProducts, mShared->gated, item - work.count * parts, work.sharedTokens, work.count,
                        work.sharedInner, work.floats[worker], work.panels[worker]);
                    return;
                }
                size_t const token = item / parts;
                size_t const first = item % parts * columns;
                mProducts.dot(work.hidden + token * mDepth, mRouter.data() + first * mDepth,
                    std::min(columns, mExperts - first), mDepth, work.logits + token * mExperts + first);
                if (parts == 1)
                {
                    choose(token, work);
                }
            });
        stages.add(1,
            [this, &work, parts](size_t, size_t)
            {
                for (size_t token = 0; parts > 1 && token < work.count; ++token)
                {
                    choose(token, work);
                }
                groupPairs(mExperts, mChosen, work.routing);
                for (size_t pair = 0; work.few && pair < work.routing.pairs; ++pair)
                {
                    copyRow(work.tokens, work.routing.tokens[pair], work.pairs, pair);
                }
            });
        if (!work.few)
        {
            stages.add(work.routing.pairs,
                [&work](size_t pair, size_t) { copyRow(work.tokens, work.routing.tokens[pair], work.pairs, pair); });
        }
    }

    // The token's experts, and how much it takes of the shared one.
    void choose(size_t token, Work const& work) const noexcept
    {
        chooseExperts(work.logits + token * mExperts, token, mExperts, mChosen, mNormalize, work.routing);
        if (mShared)
        {
            float by = 0;
            mProducts.dot(work.hidden + token * mDepth, mSharedWeight.data, 1, mDepth, &by);
            work.sharedBy[token] = 1.0f / (1.0f + std::exp(-by));
        }
    }

    void addGateUp(Stages& stages, Work& work) const
    {
        size_t const active = std::min(mExperts, work.routing.pairs); // at most
        size_t const tiles = mGated[0].gate.tiles();
        stages.add(active * tiles,
            [this, &work, tiles](size_t item, size_t worker)
            {
                if (item / tiles >= work.routing.active)
                {
                    return;
                }
                Routing::Expert const expert = work.routing.experts[item / tiles];
                GatedMatrices const& gated = mGated[expert.index];
                multiplyGateUp(mProducts, gated, item % tiles, rowsFrom(work.pairs, expert.firstPair), expert.pairs,
                    work.inner + expert.firstPair * gated.width(), work.floats[worker], work.panels[worker]);
            });
    }

    // Few rows are quantized by each worker for itself, which is sooner done than waited for.
    void addInner(Stages& stages, Work& work) const
    {
        if (!work.few)
        {
            stages.add(work.routing.pairs + (mShared ? work.count : 0),
                [this, &work](size_t row, size_t) { quantizeInner(row, work, 0); });
        }
    }

    void quantizeInner(size_t row, Work const& work, size_t worker) const noexcept
    {
        size_t const pairs = work.routing.pairs;
        if (row < pairs)
        {
            mProducts.quantize(work.inner + row * mGated[0].width(), mInner, row, work.innerRows[worker]);
        }
        else
        {
            mProducts.quantize(work.sharedInner + (row - pairs) * mShared->gated.width(), mShared->gated.gate.columns(),
                row - pairs, work.sharedRows[worker]);
        }
    }

    void addDown(Stages& stages, Work& work, float* result) const
    {
        Stages::Preparation prepare;
        if (work.few)
        {
            prepare = [this, &work](size_t worker)
            {
                size_t const rows = work.routing.pairs + (mShared ? work.count : 0);
                for (size_t row = 0; row < rows; ++row)
                {
                    quantizeInner(row, work, worker);
                }
            };
        }
        size_t const tiles = mDown[0].tiles();
        size_t const items = (work.few ? kDownItemsOfFewRows : kDownItems) * stages.workers();
        size_t const chunk = std::max<size_t>(1, tiles / items);
        stages.add(
            (tiles + chunk - 1) / chunk,
            [this, &work, result, tiles, chunk](size_t item, size_t worker)
            { multiplyDown({item * chunk, std::min(chunk, tiles - item * chunk)}, work, worker, result); },
            prepare);
    }

    // The columns of `tiles` in every token's result: the shared expert's part, then each routed expert's.
    void multiplyDown(TileRange tiles, Work const& work, size_t worker, float* result) const noexcept
    {
        size_t const rowsOf = work.few ? worker : 0;
        size_t const column = tiles.first * kTileColumns;
        size_t const columns = std::min(tiles.count * kTileColumns, mDepth - column);
        for (size_t token = 0; token < work.count; ++token)
        {
            std::fill_n(result + token * mDepth + column, columns, 0.0f);
        }
        Routing const& routing = work.routing;
        // By expert and not by tile: each one's tiles lie one behind the other in memory.
        if (mShared)
        {
            addProducts(mShared->down, tiles, work.sharedRows[rowsOf], work.count, work, worker, result,
                [&work](size_t row) { return std::make_pair(row, work.sharedBy[row]); });
        }
        for (size_t slot = 0; slot < routing.active; ++slot)
        {
            Routing::Expert const expert = routing.experts[slot];
            addProducts(mDown[expert.index], tiles, rowsFrom(work.innerRows[rowsOf], expert.firstPair), expert.pairs,
                work, worker, result,
                [&routing, expert](size_t row)
                {
                    size_t const pair = expert.firstPair + row;
                    return std::make_pair(static_cast<size_t>(routing.tokens[pair]), routing.weights[pair]);
                });
        }
    }

    // result[token] += weight * (row by the tiles of `down`) for each row, whose token and weight `of` tells.
    template <typename Of>
    void addProducts(QuantizedMatrix const& down, TileRange tiles, QuantizedRows const& rows, size_t count,
        Work const& work, size_t worker, float* result, Of const& of) const noexcept
    {
        float* const products = work.floats[worker];
        for (size_t i = 0; i < tiles.count; ++i)
        {
            size_t const tile = tiles.first + i;
            size_t const column = tile * kTileColumns;
            size_t const columns = std::min(kTileColumns, mDepth - column);
            mProducts.byTile(tileOf(down, tile), rows, count, products, kTileColumns, work.panels[worker]);
            for (size_t row = 0; row < count; ++row)
            {
                auto const [token, by] = of(row);
                float* const target = result + token * mDepth + column;
                for (size_t k = 0; k < columns; ++k)
                {
                    target[k] += by * products[row * kTileColumns + k];
                }
            }
        }
    }

    size_t mDepth;
    size_t mInner;
    size_t mExperts;
    size_t mChosen;
    bool mNormalize;
    View<float> mNorm;
    float mEpsilon;
    Products const& mProducts;
    std::vector<float> mRouter; // [experts, depth]
    std::vector<GatedMatrices> mGated;
    std::vector<QuantizedMatrix> mDown;
    std::optional<SharedExpert> mShared;
    View<float> mSharedWeight;
};

} // namespace

OpDefinition quantizedMixtureOfExperts()
{
    return {"QuantizedMixtureOfExperts",
        {kFloat, kFloat, kCodes, kFloat, kOptionalCodes, kCodes, kFloat, kOptionalCodes, kOptionalCodes, kOptionalFloat,
            kOptionalCodes, kOptionalCodes, kOptionalFloat, kOptionalCodes, kOptionalCodes, kOptionalFloat,
            kOptionalCodes, kOptionalFloat, kOptionalFloat, kOptionalFloat},
        {kFloat, kOptionalFloat}, [](Node const& node) -> std::unique_ptr<Kernel>
        { return std::make_unique<MixtureOfExpertsKernel>(node); }};
}

} // namespace qwenforge::cpu
