// What the programs that run against the stand-in for ONNX Runtime check: prints what is wrong and counts it.

#pragma once

#include "ort_runtime.h"

#include <cstdio>
#include <string>

inline int gWrong = 0;

inline void expect(bool holds, char const* what, int call = -1)
{
    if (!holds)
    {
        std::printf("%s (call %d)\n", what, call);
        ++gWrong;
    }
}

// The error's text, which is given back.
inline std::string textOf(OrtApi const& api, OrtStatus* status)
{
    std::string const text = status == nullptr ? "" : status->text;
    if (status != nullptr)
    {
        api.ReleaseStatus(status);
    }
    return text;
}

inline void expectNothingLeft(int call)
{
    fake::State const& state = fake::state;
    expect(state.statuses == 0 && state.infos == 0 && state.allocators == 0 && state.buffers == 0,
        "everything is given back", call);
}
