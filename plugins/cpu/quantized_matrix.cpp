#include "cpu/quantized_matrix.h"

#include "cpu/half.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace qwenforge::cpu
{
namespace
{

constexpr size_t kAlignment = 64;

// Four 4-bit weights, the first in the lowest bits, to a byte each.
uint32_t spread(uint32_t four) noexcept
{
    return (four & 0xF) | (four & 0xF0) << 4 | (four & 0xF00) << 8 | (four & 0xF000) << 12;
}

uint32_t fourCodes(uint8_t const* row, size_t step, int32_t bits) noexcept
{
    if (bits == 4)
    {
        return spread(static_cast<uint32_t>(row[2 * step]) | static_cast<uint32_t>(row[2 * step + 1]) << 8);
    }
    uint32_t codes = 0;
    std::memcpy(&codes, row + kStepDepth * step, sizeof(codes));
    return codes;
}

float zeroPoint(uint8_t const* row, size_t group, int32_t bits) noexcept
{
    uint8_t const byte = bits == 4 ? static_cast<uint8_t>(row[group / 2] >> (group % 2 * 4) & 0xF) : row[group];
    return static_cast<float>(byte);
}

// Whether `holds(scale, first scale of its row)` for every scale.
template <typename Holds>
bool holdsForAll(StoredMatrix const& stored, size_t groups, Holds const& holds) noexcept
{
    for (size_t column = 0; column < stored.columns; ++column)
    {
        float const* const scales = stored.scales + (stored.firstRow + column * stored.rowStride) * groups;
        for (size_t group = 0; group < groups; ++group)
        {
            if (!holds(scales[group], scales[0]))
            {
                return false;
            }
        }
    }
    return true;
}

bool areHalves(StoredMatrix const& stored, size_t groups) noexcept
{
    return holdsForAll(stored, groups, [](float scale, float) { return halfOf(scale).has_value(); });
}

bool areOneOfEachRow(StoredMatrix const& stored, size_t groups) noexcept
{
    return holdsForAll(stored, groups, [](float scale, float first) { return scale == first; });
}

std::shared_ptr<uint8_t> zeroes(size_t bytes)
{
    std::shared_ptr<uint8_t> memory(static_cast<uint8_t*>(std::aligned_alloc(kAlignment, bytes)), std::free);
    if (memory == nullptr)
    {
        throw std::bad_alloc();
    }
    std::memset(memory.get(), 0, bytes);
    return memory;
}

} // namespace

QuantizedMatrix::QuantizedMatrix(StoredMatrix const& stored)
    : QuantizedMatrix(Geometry{stored})
{
    pack(stored, zeroes(tiles() * tileBytes()), 0, tileBytes());
}

std::pair<QuantizedMatrix, QuantizedMatrix> QuantizedMatrix::interleaved(
    StoredMatrix const& first, StoredMatrix const& second)
{
    QuantizedMatrix one{Geometry{first}};
    QuantizedMatrix other{Geometry{second}};
    size_t const stride = one.tileBytes() + other.tileBytes();
    auto const memory = zeroes(one.tiles() * stride);
    one.pack(first, memory, 0, stride);
    other.pack(second, memory, one.tileBytes(), stride);
    return {std::move(one), std::move(other)};
}

QuantizedMatrix::QuantizedMatrix(Geometry const& geometry)
    : mColumns(geometry.stored.columns)
    , mDepth(geometry.stored.depth)
    , mGroupSize(geometry.stored.groupSize)
    , mGroups((mDepth + mGroupSize - 1) / mGroupSize)
    , mBits(geometry.stored.bits)
    , mHasHalfScales(areHalves(geometry.stored, mGroups))
    , mHasOneScale(geometry.stored.zeroPoints == nullptr && areOneOfEachRow(geometry.stored, mGroups))
    , mHasOffsets(geometry.stored.zeroPoints != nullptr)
{
}

void QuantizedMatrix::pack(StoredMatrix const& stored, std::shared_ptr<uint8_t> memory, size_t offset, size_t stride)
{
    for (size_t tile = 0; tile < tiles(); ++tile)
    {
        packTile(stored, tile, memory.get() + offset + tile * stride);
    }
    mFirstTile = memory.get() + offset;
    mTileStride = stride;
    mMemory = std::move(memory);
}

void QuantizedMatrix::packTile(StoredMatrix const& stored, size_t tile, uint8_t* target) const noexcept
{
    size_t const bits = static_cast<size_t>(mBits);
    size_t const groupStride = mGroupSize * bits / 8;
    size_t const zeroStride = (mGroups * bits + 7) / 8;
    float const middle = mBits == 4 ? 8.0f : 128.0f;
    size_t const scalesAt = mHasOneScale ? mGroups * groupBytes() : codeBytes();
    for (size_t group = 0; group < mGroups; ++group)
    {
        uint32_t* const codes = reinterpret_cast<uint32_t*>(target + group * groupBytes());
        uint8_t* const scaleStart = target + scalesAt + group * scaleStride();
        float* const floats = reinterpret_cast<float*>(scaleStart);
        uint16_t* const halves = reinterpret_cast<uint16_t*>(scaleStart);
        float* const offsets = reinterpret_cast<float*>(scaleStart + scaleBytes());
        for (size_t i = 0; i < kTileColumns && tile * kTileColumns + i < mColumns; ++i)
        {
            size_t const row = stored.firstRow + (tile * kTileColumns + i) * stored.rowStride;
            uint8_t const* const source = stored.codes + (row * mGroups + group) * groupStride;
            for (size_t step = 0; step < mGroupSize / kStepDepth; ++step)
            {
                uint32_t const four = fourCodes(source, step, mBits);
                if (mBits == 4)
                {
                    codes[step * 16 + i % 16] |= four << (i / 16 * 4);
                }
                else
                {
                    codes[step * kTileColumns + i] = four;
                }
            }
            float const scale = stored.scales[row * mGroups + group];
            if (mHasHalfScales)
            {
                halves[i] = *halfOf(scale);
            }
            else
            {
                floats[i] = scale;
            }
            if (mHasOffsets)
            {
                offsets[i] = scale * (zeroPoint(stored.zeroPoints + row * zeroStride, group, mBits) - middle);
            }
        }
    }
}

} // namespace qwenforge::cpu
