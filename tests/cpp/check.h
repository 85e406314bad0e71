// A check prints one line, "ok WHAT" or "FAILED WHAT"; the tests in Python read the lines.

#pragma once

#include <cstdarg>
#include <cstdio>

inline int& failures()
{
    static int count = 0;
    return count;
}

__attribute__((format(printf, 2, 3))) inline bool check(bool good, char const* format, ...)
{
    std::printf("%s ", good ? "ok" : "FAILED");
    va_list arguments;
    va_start(arguments, format);
    std::vprintf(format, arguments);
    va_end(arguments);
    std::printf("\n");
    std::fflush(stdout);
    failures() += good ? 0 : 1;
    return good;
}
