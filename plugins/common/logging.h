// Where failures are told: TensorRT's logger and the error recorder of the execution context.

#pragma once

#include "common/message.h"
#include "common/tensorrt.h"

namespace qwenforge
{

// Who is speaking, for the start of a message: a plugin's name and the name of its node (may be empty).
struct Speaker
{
    char const* plugin;
    char const* node;
};

// To the logger of TensorRT that loaded this library; to stderr where there is none. `recorder` may be null.
void reportError(Speaker const& speaker, Message const& problem, nvinfer1::IErrorRecorder* recorder = nullptr,
    nvinfer1::ErrorCode code = nvinfer1::ErrorCode::kINVALID_ARGUMENT) noexcept;

// The finder stays TensorRT's. May be null.
void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

// A counted reference to an error recorder, or to none.
class RecorderReference
{
public:
    RecorderReference() noexcept = default;
    explicit RecorderReference(nvinfer1::IErrorRecorder* recorder) noexcept
        : mRecorder(recorder)
    {
        if (mRecorder != nullptr)
        {
            mRecorder->incRefCount();
        }
    }
    RecorderReference(RecorderReference const& other) noexcept
        : RecorderReference(other.mRecorder)
    {
    }
    RecorderReference& operator=(RecorderReference const& other) noexcept
    {
        RecorderReference copy(other);
        nvinfer1::IErrorRecorder* const old = mRecorder;
        mRecorder = copy.mRecorder;
        copy.mRecorder = old;
        return *this;
    }
    ~RecorderReference()
    {
        if (mRecorder != nullptr)
        {
            mRecorder->decRefCount();
        }
    }
    nvinfer1::IErrorRecorder* get() const noexcept
    {
        return mRecorder;
    }

private:
    nvinfer1::IErrorRecorder* mRecorder{};
};

} // namespace qwenforge
