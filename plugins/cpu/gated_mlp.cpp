// QuantizedGatedMlp: y = (silu(h G^T) * (h U^T)) D^T with h = norm(x + residual).

#include "cpu/weights.h"

#include <algorithm>

namespace qwenforge::cpu
{
namespace
{

enum Input
{
    kValues,
    kGate, // each with its scales and zero points
    kUp = 4,
    kDown = 7,
    kResidual = 10,
    kNorm,
};

enum Output
{
    kResult,
    kSum,
};

class GatedMlpKernel : public Kernel
{
public:
    explicit GatedMlpKernel(Node const& node)
        : mDepth(positive(node, "hidden_size"))
        , mInner(positive(node, "intermediate_size"))
        , mGated(GatedMatrices::at(node, kGate, kUp, "", mInner, mDepth, WeightFormat::of(node, "bits", "block_size")))
        , mDown(matrixAt(node, kDown, "down", mDepth, mInner, WeightFormat::of(node, "down_bits", "down_block_size")))
        , mNorm(vectorAt(node, kNorm, "norm_weight", mDepth))
        , mEpsilon(node.number("epsilon"))
        , mProducts(products())
    {
    }

    void compute(Call const& call) const override
    {
        Prologue const prologue = Prologue::of(call, kValues, kResidual, mNorm, mEpsilon, kSum, mDepth);
        float* const result = call.output<float>(kResult, prologue.values.shape);
        size_t const count = prologue.rows;
        if (count == 0)
        {
            return;
        }

        Scratch scratch;
        Stages stages(workerCount());
        size_t const workers = stages.workers();
        QuantizedRows const rows = takeRows(scratch, count, mGated.gate);
        size_t const innerWidth = mGated.width();
        float* const inner = scratch.take<float>(count * innerWidth);
        size_t const width = std::max(mDepth, count * kTileColumns);
        float* const memory = scratch.take<float>(workers * width);
        size_t const panelSize = std::max(panelBytes(mGated.gate), panelBytes(mDown));
        uint8_t* const panels = scratch.take<uint8_t>(workers * panelSize);

        auto const prepare = [&](size_t row, size_t worker)
        { mProducts.quantize(prologue.row(mProducts, row, memory + worker * width), mDepth, row, rows); };
        if (count <= kFewRows)
        {
            for (size_t row = 0; row < count; ++row)
            {
                prepare(row, 0);
            }
        }
        else
        {
            stages.add(count, prepare);
        }
        stages.add(mGated.gate.tiles(),
            [&](size_t tile, size_t worker)
            {
                multiplyGateUp(mProducts, mGated, tile, rows, count, inner, memory + worker * width,
                    panels + worker * panelSize);
            });

        // Few rows are quantized by each worker for itself, which is sooner done than waited for.
        bool const few = count <= kFewRows;
        std::vector<QuantizedRows> innerRows;
        for (size_t i = 0; i < (few ? workers : 1); ++i)
        {
            innerRows.push_back(takeRows(scratch, count, mDown));
        }
        auto const quantizeInner = [&](size_t row, QuantizedRows const& target)
        { mProducts.quantize(inner + row * innerWidth, mInner, row, target); };
        Stages::Preparation prepareInner;
        if (few)
        {
            prepareInner = [&](size_t worker)
            {
                for (size_t row = 0; row < count; ++row)
                {
                    quantizeInner(row, innerRows[worker]);
                }
            };
        }
        else
        {
            stages.add(count, [&](size_t row, size_t) { quantizeInner(row, innerRows[0]); });
        }
        stages.add(
            mDown.tiles(),
            [&](size_t tile, size_t worker)
            {
                size_t const column = tile * kTileColumns;
                size_t const columns = std::min(kTileColumns, mDepth - column);
                bool const whole = columns == kTileColumns;
                float* const target = whole ? result + column : memory + worker * width;
                mProducts.byTile(tileOf(mDown, tile), innerRows[few ? worker : 0], count, target,
                    whole ? mDepth : kTileColumns, panels + worker * panelSize);
                for (size_t row = 0; !whole && row < count; ++row)
                {
                    std::copy_n(target + row * kTileColumns, columns, result + row * mDepth + column);
                }
            },
            prepareInner);
        call.run(stages);
    }

private:
    size_t mDepth;
    size_t mInner;
    GatedMatrices mGated;
    QuantizedMatrix mDown;
    View<float> mNorm;
    float mEpsilon;
    Products const& mProducts;
};

} // namespace

OpDefinition quantizedGatedMlp()
{
    return {"QuantizedGatedMlp",
        {kFloat, kCodes, kFloat, kOptionalCodes, kCodes, kFloat, kOptionalCodes, kCodes, kFloat, kOptionalCodes,
            kOptionalFloat, kOptionalFloat},
        {kFloat, kOptionalFloat}, [](Node const& node) -> std::unique_ptr<Kernel>
        { return std::make_unique<GatedMlpKernel>(node); }};
}

} // namespace qwenforge::cpu
