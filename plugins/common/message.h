// One sentence for the user, in a buffer of fixed size: reporting a failure neither allocates nor throws.

#pragma once

#include <cstdarg>
#include <cstdio>

namespace qwenforge
{

class Message
{
public:
    // Always false, so that a check can end with `return problem.set(...)`.
    __attribute__((format(printf, 2, 3))) bool set(char const* format, ...) noexcept
    {
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(mText, sizeof(mText), format, arguments);
        va_end(arguments);
        return false;
    }

    char const* text() const noexcept
    {
        return mText;
    }

private:
    char mText[512]{};
};

} // namespace qwenforge
