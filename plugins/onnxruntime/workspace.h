// Memory of one call. What comes from KernelContext_GetScratchBuffer belongs to the call's stream: given back when the
// kernels are launched, it is used again only behind them. Without a stream, on the CPU or on CUDA's default stream,
// everything is in order anyway.

#pragma once

#include "onnxruntime/ort.h"

#include <cstddef>

namespace qwenforge
{

class Workspace
{
public:
    Workspace(OrtApi const& api, OrtAllocator* allocator) noexcept
        : mApi(api)
        , mAllocator(allocator)
    {
    }
    Workspace(Workspace const&) = delete;
    Workspace& operator=(Workspace const&) = delete;
    ~Workspace()
    {
        if (mAddress != nullptr)
        {
            if (OrtStatus* const status = mApi.AllocatorFree(mAllocator, mAddress))
            {
                mApi.ReleaseStatus(status);
            }
        }
    }

    OrtStatus* take(OrtKernelContext const* context, OrtMemoryInfo const* memory, size_t bytes, void* stream) noexcept
    {
        return bytes == 0        ? nullptr
            : stream == nullptr ? mApi.AllocatorAlloc(mAllocator, bytes, &mAddress)
                                : mApi.KernelContext_GetScratchBuffer(context, memory, bytes, &mAddress);
    }

    void* address() const noexcept
    {
        return mAddress;
    }

private:
    OrtApi const& mApi;
    OrtAllocator* mAllocator;
    void* mAddress{nullptr};
};

} // namespace qwenforge
