// QuantizedLinear: y = norm(x + residual) W^T + bias.

#include "cpu/weights.h"

#include <algorithm>

namespace qwenforge::cpu
{
namespace
{

enum Input
{
    kValues,
    kWeight, // with its scales and zero points
    kBias = 4,
    kResidual,
    kNorm,
};

enum Output
{
    kResult,
    kSum,
};

// Rows of one item: enough to unpack a tile for, few enough to divide a long prompt among many threads.
constexpr size_t kRowsPerItem = 256;

class LinearKernel : public Kernel
{
public:
    explicit LinearKernel(Node const& node)
        : mColumns(positive(node, "N"))
        , mDepth(positive(node, "K"))
        , mMatrix(matrixAt(node, kWeight, "weight", mColumns, mDepth, WeightFormat::of(node, "bits", "block_size")))
        , mBias(vectorAt(node, kBias, "bias", mColumns))
        , mNorm(vectorAt(node, kNorm, "norm_weight", mDepth))
        , mEpsilon(node.number("epsilon"))
        , mProducts(products())
    {
    }

    void compute(Call const& call) const override
    {
        Prologue const prologue = Prologue::of(call, kValues, kResidual, mNorm, mEpsilon, kSum, mDepth);
        Shape shape = prologue.values.shape;
        shape.extents.back() = static_cast<int64_t>(mColumns);
        float* const result = call.output<float>(kResult, shape);
        size_t const count = prologue.rows;
        if (count == 0)
        {
            return;
        }

        Scratch scratch;
        Stages stages(workerCount());
        QuantizedRows const rows = takeRows(scratch, count, mMatrix);
        size_t const floats = stages.workers() * std::max(mDepth, kRowsPerItem * kTileColumns);
        float* const memory = scratch.take<float>(floats);
        uint8_t* const panels = scratch.take<uint8_t>(stages.workers() * panelBytes(mMatrix));
        auto const memoryOf = [&](size_t worker) { return memory + worker * (floats / stages.workers()); };
        auto const prepare = [&](size_t row, size_t worker)
        { mProducts.quantize(prologue.row(mProducts, row, memoryOf(worker)), mDepth, row, rows); };
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
        size_t const parts = (count + kRowsPerItem - 1) / kRowsPerItem;
        stages.add(mMatrix.tiles() * parts,
            [&](size_t item, size_t worker)
            {
                size_t const first = item % parts * kRowsPerItem;
                multiply(item / parts, rowsFrom(rows, first), std::min(kRowsPerItem, count - first),
                    result + first * mColumns, memoryOf(worker), panels + worker * panelBytes(mMatrix));
            });
        call.run(stages);
    }

private:
    void multiply(size_t tile, QuantizedRows const& rows, size_t count, float* result, float* memory,
        uint8_t* panel) const noexcept
    {
        size_t const column = tile * kTileColumns;
        size_t const columns = std::min(kTileColumns, mColumns - column);
        bool const whole = columns == kTileColumns;
        float* const target = whole ? result + column : memory;
        size_t const stride = whole ? mColumns : kTileColumns;
        mProducts.byTile(tileOf(mMatrix, tile), rows, count, target, stride, panel);
        if (whole && !mBias)
        {
            return;
        }
        for (size_t row = 0; row < count; ++row)
        {
            for (size_t i = 0; i < columns; ++i)
            {
                result[row * mColumns + column + i] = target[row * stride + i] + (mBias ? mBias.data[column + i] : 0.0f);
            }
        }
    }

    size_t mColumns;
    size_t mDepth;
    QuantizedMatrix mMatrix;
    View<float> mBias;
    View<float> mNorm;
    float mEpsilon;
    Products const& mProducts;
};

} // namespace

OpDefinition quantizedLinear()
{
    return {"QuantizedLinear",
        {kFloat, kCodes, kFloat, kOptionalCodes, kOptionalFloat, kOptionalFloat, kOptionalFloat},
        {kFloat, kOptionalFloat}, [](Node const& node) -> std::unique_ptr<Kernel>
        { return std::make_unique<LinearKernel>(node); }};
}

} // namespace qwenforge::cpu
