// Memory of one call, kept by its thread for the next one.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace qwenforge::cpu
{

// Hands out memory until it is destroyed. What a thread once needed is kept for as long as the thread lives.
class Scratch
{
public:
    Scratch() noexcept
        : mStart(blocks().used)
    {
    }
    Scratch(Scratch const&) = delete;
    Scratch& operator=(Scratch const&) = delete;
    ~Scratch()
    {
        blocks().used = mStart;
    }

    // Of undefined content, aligned to 64 bytes.
    template <typename T>
    T* take(size_t count)
    {
        return static_cast<T*>(blocks().take(count * sizeof(T)));
    }

private:
    struct Free
    {
        void operator()(void* memory) const noexcept
        {
            std::free(memory);
        }
    };

    struct Block
    {
        std::unique_ptr<void, Free> memory;
        size_t bytes;
    };

    // One block for each `take` of a call, which is the same the next time.
    struct Blocks
    {
        std::vector<Block> all;
        size_t used{0};

        void* take(size_t bytes)
        {
            if (used == all.size())
            {
                all.push_back({nullptr, 0});
            }
            Block& block = all[used];
            if (block.bytes < bytes)
            {
                size_t const rounded = (bytes + 63) / 64 * 64;
                block.memory.reset(std::aligned_alloc(64, rounded));
                if (block.memory == nullptr)
                {
                    block.bytes = 0;
                    throw std::bad_alloc();
                }
                block.bytes = rounded;
            }
            ++used;
            return block.memory.get();
        }
    };

    static Blocks& blocks() noexcept
    {
        static thread_local Blocks mine;
        return mine;
    }

    size_t mStart;
};

} // namespace qwenforge::cpu
