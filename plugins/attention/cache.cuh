// What the caches hold and where a token lies in them.
//
// An 8-bit cache holds value / scale, rounded to the nearest, half to even, and saturated. Its products with the queries
// are computed in fp16, which holds every E4M3 and INT8 number, whatever the type of the tokens is: scales never meet the
// elements. A key channel's scale is multiplied into the query's channel before the queries are rounded to fp16, and a
// value head's scale into the sum.

#pragma once

#include "attention/attention.h"
#include "common/device.cuh"

namespace qwenforge
{
namespace attention
{

// T is the type of the tokens. A format has
//     Element   what a cache holds
//     Operand   what queries, weights and, once loaded, the cache's elements are in the products
template <CacheType kType, typename T>
struct CacheFormat;

template <typename T>
struct CacheFormat<CacheType::kFloat, T>
{
    using Element = T;
    using Operand = T;
};

template <typename T>
struct CacheFormat<CacheType::kFloat8, T>
{
    using Element = __nv_fp8_e4m3;
    using Operand = __half;
};

template <typename T>
struct CacheFormat<CacheType::kInt8, T>
{
    using Element = int8_t;
    using Operand = __half;
};

// `value` as a cache's element, in units of `scale`.
template <typename Element>
__device__ __forceinline__ Element quantize(float value, float scale)
{
    return fromFloat<Element>(value / scale);
}

template <>
__device__ __forceinline__ __half quantize<__half>(float value, float)
{
    return fromFloat<__half>(value);
}

template <>
__device__ __forceinline__ __nv_bfloat16 quantize<__nv_bfloat16>(float value, float)
{
    return fromFloat<__nv_bfloat16>(value);
}

template <>
__device__ __forceinline__ int8_t quantize<int8_t>(float value, float scale)
{
    float const units = rintf(value / scale);
    float const bounded = fminf(fmaxf(units, -128.0f), 127.0f);
    return static_cast<int8_t>(units == units ? bounded : 0.0f);
}

__device__ __forceinline__ float toFloat(int8_t value)
{
    return static_cast<float>(value);
}

__device__ __forceinline__ float toFloat(__nv_fp8_e4m3 value)
{
    return static_cast<float>(value);
}

using qwenforge::toFloat;

// Two elements, read or written in one access.
template <typename T>
struct alignas(2 * sizeof(T)) Two
{
    T values[2];
};

// Where tokens lie. A linear cache is one page a row of the batch; `shift` then is such that every place is in page 0.
struct Places
{
    int32_t const* pageTable; // [B, rowPages]; null: row b has page b alone
    int64_t pages;            // of the cache
    int64_t rowPages;
    int64_t pageTokens; // slots of a page
    int32_t shift;      // place >> shift is the number of the page within the row
    int64_t capacity;   // places of a row

    // The page of a place of row b, within 0 and capacity; -1 where the table names a page that does not exist.
    __device__ __forceinline__ int64_t page(int64_t row, int64_t place) const
    {
        if (pageTable == nullptr)
        {
            return row;
        }
        int64_t const page = pageTable[row * rowPages + (place >> shift)];
        return page < pages ? page : -1; // a negative one stays negative
    }

    // The vector of a place in its page: its number among the vectors of the cache.
    __device__ __forceinline__ int64_t vector(int64_t page, int32_t head, int32_t heads, int64_t place) const
    {
        int64_t const slot = pageTable == nullptr ? place : place & (pageTokens - 1);
        return (page * heads + head) * pageTokens + slot;
    }
};

// What the kernels of one type T and CacheType are called with. Those that attend to an 8-bit cache are compiled for T =
// Operand alone and write either type.
template <CacheType kType, typename T>
struct Call
{
    using Element = typename CacheFormat<kType, T>::Element;
    using Operand = typename CacheFormat<kType, T>::Operand;

    int64_t batch;    // B
    int64_t sequence; // S
    int64_t positions;
    int32_t heads;         // Hq
    int32_t keyValueHeads; // Hk
    int32_t group;         // Hq / Hk
    int32_t headSize;      // D
    int32_t window;
    float scale;
    float epsilon;
    T const* query; // [B, S, query heads and, when packed, key and value heads, D]
    T const* key;   // the first key head of the first token
    T const* value;
    int64_t queryStride; // elements from a token to the next
    int64_t keyValueStride;
    T const* cos; // [P, D / 2]
    T const* sin;
    int32_t const* positionIds;   // [B, S]
    int32_t const* cachePosition; // [B]
    T const* queryNorm;           // [D], or null
    T const* keyNorm;
    float const* keyScales;   // [Hk, D], or null
    float const* valueScales; // [Hk], or null
    Places places;
    Element* keyCache;
    Element* valueCache;
    Operand* rotated; // [B, S, Hq, D]: queries, turned, times the scales of their key channels
    void* output;     // [B, S, Hq, D]
    ElementType outputType;

    // Writes two elements of the output that follow each other, from an even number on.
    __device__ __forceinline__ void write(int64_t element, float first, float second) const
    {
        if (kType == CacheType::kFloat)
        {
            writeAs<T>(element, first, second);
        }
        else if (outputType == ElementType::kFloat16)
        {
            writeAs<__half>(element, first, second);
        }
        else
        {
            writeAs<__nv_bfloat16>(element, first, second);
        }
    }

    // The place of token b * S + j, -1 where the cache has none.
    __device__ __forceinline__ int64_t place(int64_t token) const
    {
        int64_t const place = cachePosition[token / sequence] + token % sequence;
        return place >= 0 && place < places.capacity ? place : -1;
    }

    // The first key that a query at `place` sees.
    __device__ __forceinline__ int64_t firstSeen(int64_t place) const
    {
        return window > 0 && place >= window ? place - window + 1 : 0;
    }

private:
    template <typename Output>
    __device__ __forceinline__ void writeAs(int64_t element, float first, float second) const
    {
        *reinterpret_cast<Two<Output>*>(static_cast<Output*>(output) + element)
            = Two<Output>{{fromFloat<Output>(first), fromFloat<Output>(second)}};
    }
};

} // namespace attention
} // namespace qwenforge
