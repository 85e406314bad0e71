// Stacks to switch between, for the fibers of simt.h.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

// simtSwitch(save, load) goes on where the stack `load` was left, and leaves the current one in `save`. The C library's
// swapcontext does the same with two system calls a time, which is most of an emulated kernel's time.
#if defined(__x86_64__)
extern "C" void simtSwitch(void** save, void* load);
asm(R"(
.text
.weak simtSwitch
.type simtSwitch, @function
simtSwitch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simtSwitch, .-simtSwitch
.section .note.GNU-stack, "", @progbits
.text
)");
#else
#include <ucontext.h>
#endif

namespace simt
{

// A stack that was left, and what goes on with it.
#if defined(__x86_64__)
using Context = void*;

inline void startContext(Context& context, char* stack, size_t bytes, void (*function)())
{
    // What simtSwitch pops: six registers, and the address it returns to; then the stack is as after a call.
    auto const top = reinterpret_cast<uintptr_t>(stack + bytes) / 16 * 16;
    auto* const slots = reinterpret_cast<void**>(top) - 8;
    std::fill(slots, slots + 8, nullptr);
    slots[6] = reinterpret_cast<void*>(function);
    context = slots;
}

inline void switchContext(Context& save, Context& load)
{
    simtSwitch(&save, load);
}
#else
using Context = ucontext_t;

inline void startContext(Context& context, char* stack, size_t bytes, void (*function)())
{
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, function, 0);
}

inline void switchContext(Context& save, Context& load)
{
    swapcontext(&save, &load);
}
#endif

} // namespace simt
