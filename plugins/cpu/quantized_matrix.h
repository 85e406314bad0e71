// A matrix of 4- or 8-bit weights in the order in which the kernels read it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

namespace qwenforge::cpu
{

inline constexpr size_t kTileColumns = 32;
inline constexpr size_t kStepDepth = 4; // of one 8-bit dot product of the instruction sets

// Where weights come from: codes and scales as MatMulNBits has them. Output n is row `firstRow + n * rowStride` of
//   codes [rows, groups, groupSize * bits / 8], the earlier weight in the lower bits;
//   scales [rows, groups]; zeroPoints [rows, ceil(groups * bits / 8)] or null: 8 and 128.
struct StoredMatrix
{
    uint8_t const* codes;
    float const* scales;
    uint8_t const* zeroPoints;
    size_t columns; // N
    size_t depth;   // K
    size_t groupSize;
    int32_t bits; // 4 or 8
    size_t firstRow{0};
    size_t rowStride{1};
};

// W [N, K], weight = scale * (code - zero point), in tiles of 32 outputs. A tile is, for one group of K after the other,
//   codes  for each 4 steps of K: [32, 4] bytes; with 4 bits [16, 4] bytes, outputs 16 to 31 in the upper halves;
//   scales [32], float16 where that holds every scale of the matrix exactly, else float32;
//   offsets float32 [32], scale * (zero point - middle), where there are zero points.
// Where each output has the same scale in all groups, and no zero points, its scales stand once, behind the last group.
// Outputs beyond N and steps beyond K are zero.
class QuantizedMatrix
{
public:
    explicit QuantizedMatrix(StoredMatrix const& stored);

    // Two matrices of as many columns whose tiles take turns in memory: whoever reads tile i of both reads one stretch.
    static std::pair<QuantizedMatrix, QuantizedMatrix> interleaved(StoredMatrix const& first, StoredMatrix const& second);

    size_t columns() const noexcept
    {
        return mColumns;
    }
    size_t depth() const noexcept
    {
        return mDepth;
    }
    size_t groupSize() const noexcept
    {
        return mGroupSize;
    }
    size_t groups() const noexcept
    {
        return mGroups;
    }
    int32_t bits() const noexcept
    {
        return mBits;
    }
    bool hasHalfScales() const noexcept
    {
        return mHasHalfScales;
    }
    bool hasOffsets() const noexcept
    {
        return mHasOffsets;
    }
    size_t tiles() const noexcept
    {
        return (mColumns + kTileColumns - 1) / kTileColumns;
    }
    size_t codeBytes() const noexcept // of a tile's group
    {
        return mGroupSize * kTileColumns * static_cast<size_t>(mBits) / 8;
    }
    size_t scaleBytes() const noexcept
    {
        return kTileColumns * (mHasHalfScales ? sizeof(uint16_t) : sizeof(float));
    }
    size_t groupBytes() const noexcept // of a tile's group with the scales that are its own
    {
        return codeBytes() + (mHasOneScale ? 0 : scaleBytes()) + (mHasOffsets ? kTileColumns * sizeof(float) : 0);
    }
    size_t tileBytes() const noexcept
    {
        return mGroups * groupBytes() + (mHasOneScale ? scaleBytes() : 0);
    }
    uint8_t const* tile(size_t index) const noexcept
    {
        return mFirstTile + index * mTileStride;
    }
    uint8_t const* scales(size_t index) const noexcept // of a tile's first group
    {
        return tile(index) + (mHasOneScale ? mGroups * groupBytes() : codeBytes());
    }
    size_t scaleStride() const noexcept // to those of the next group
    {
        return mHasOneScale ? 0 : groupBytes();
    }

private:
    struct Geometry // nothing is packed yet
    {
        StoredMatrix const& stored;
    };

    explicit QuantizedMatrix(Geometry const& geometry);

    // Packs the tiles into `memory`, which they share, from `offset` on and `stride` bytes apart.
    void pack(StoredMatrix const& stored, std::shared_ptr<uint8_t> memory, size_t offset, size_t stride);
    void packTile(StoredMatrix const& stored, size_t tile, uint8_t* target) const noexcept;

    size_t mColumns;
    size_t mDepth;
    size_t mGroupSize;
    size_t mGroups;
    int32_t mBits;
    bool mHasHalfScales;
    bool mHasOneScale;
    bool mHasOffsets;
    std::shared_ptr<uint8_t> mMemory;
    uint8_t const* mFirstTile{nullptr};
    size_t mTileStride{0};
};

} // namespace qwenforge::cpu
