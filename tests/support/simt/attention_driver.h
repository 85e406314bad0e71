// Of driver.cpp: one call of the attention kernels. Numbers and tensors, those in brackets where the numbers ask for them:
//
//   B S M P Hq Hk D window scale  cacheRows cacheType pageSize packed norm epsilon path
//   query [key value] cos sin positions starts [queryNorm keyNorm] [keyScales valueScales] [pageTable] keys values
//       -> output keys values

#pragma once

cudaError_t runAttention(std::vector<double> const& n, qwenforge::ElementType type)
{
    using qwenforge::CacheType;
    qwenforge::AttentionShape shape{};
    shape.batch = static_cast<int64_t>(n[0]);
    shape.sequence = static_cast<int64_t>(n[1]);
    shape.capacity = static_cast<int64_t>(n[2]);
    shape.positions = static_cast<int64_t>(n[3]);
    shape.numHeads = static_cast<int32_t>(n[4]);
    shape.numKeyValueHeads = static_cast<int32_t>(n[5]);
    shape.headSize = static_cast<int32_t>(n[6]);
    shape.slidingWindow = static_cast<int32_t>(n[7]);
    shape.scale = static_cast<float>(n[8]);
    shape.cacheRows = static_cast<int64_t>(n[9]);
    shape.cacheType = static_cast<CacheType>(static_cast<int32_t>(n[10]));
    shape.pageSize = static_cast<int32_t>(n[11]);
    shape.packedQkv = static_cast<int32_t>(n[12]);
    shape.qkNorm = static_cast<int32_t>(n[13]);
    shape.epsilon = static_cast<float>(n[14]);
    auto const path = static_cast<qwenforge::AttentionPath>(static_cast<int32_t>(n[15]));
    bool const packed = shape.packedQkv != 0;
    bool const isQuantized = shape.cacheType != CacheType::kFloat;
    bool const isPaged = shape.pageSize != 0;
    int64_t const tokens = shape.batch * shape.sequence;
    int64_t const queries = kElement * tokens * shape.numHeads * shape.headSize;
    int64_t const keys = kElement * tokens * shape.numKeyValueHeads * shape.headSize;
    int64_t const slots = isPaged ? shape.pageSize : shape.capacity;
    int64_t const cache
        = (isQuantized ? 1 : kElement) * shape.cacheRows * shape.numKeyValueHeads * slots * shape.headSize;
    int64_t const table = kElement * shape.positions * shape.headSize / 2;
    int64_t const norm = shape.qkNorm != 0 ? kElement * shape.headSize : 0;
    Buffer const query = read(packed ? queries + 2 * keys : queries);
    Buffer const key = read(packed ? 0 : keys);
    Buffer const value = read(packed ? 0 : keys);
    Buffer const cos = read(table);
    Buffer const sin = read(table);
    Buffer const positions = read(4 * tokens);
    Buffer const starts = read(4 * shape.batch);
    Buffer const queryNorm = read(norm);
    Buffer const keyNorm = read(norm);
    Buffer const keyScales = read(isQuantized ? 4 * shape.numKeyValueHeads * shape.headSize : 0);
    Buffer const valueScales = read(isQuantized ? 4 * shape.numKeyValueHeads : 0);
    Buffer const pageTable = read(isPaged ? 4 * shape.batch * (shape.capacity / shape.pageSize) : 0);
    Buffer const keyCache = read(cache);
    Buffer const valueCache = read(cache);
    Buffer const output = filled(static_cast<size_t>(queries));
    size_t const bytes = qwenforge::attentionWorkspaceBytes(shape);
    Buffer const workspace = filled(bytes);
    qwenforge::AttentionTensors tensors{};
    tensors.query = query.get();
    tensors.key = packed ? nullptr : key.get();
    tensors.value = packed ? nullptr : value.get();
    tensors.cos = cos.get();
    tensors.sin = sin.get();
    tensors.positionIds = static_cast<int32_t const*>(positions.get());
    tensors.cachePosition = static_cast<int32_t const*>(starts.get());
    tensors.queryNorm = shape.qkNorm != 0 ? queryNorm.get() : nullptr;
    tensors.keyNorm = shape.qkNorm != 0 ? keyNorm.get() : nullptr;
    tensors.keyScales = isQuantized ? static_cast<float const*>(keyScales.get()) : nullptr;
    tensors.valueScales = isQuantized ? static_cast<float const*>(valueScales.get()) : nullptr;
    tensors.pageTable = isPaged ? static_cast<int32_t const*>(pageTable.get()) : nullptr;
    tensors.keyCache = keyCache.get();
    tensors.valueCache = valueCache.get();
    tensors.output = output.get();
    qwenforge::Message problem;
    if (!qwenforge::checkAttention(shape, qwenforge::currentSm(), problem))
    {
        std::fprintf(stderr, "%s\n", problem.text());
    }
    cudaError_t const error
        = completed(qwenforge::launchAttention(shape, type, tensors, workspace.get(), bytes, nullptr, path));
    write(output, queries);
    write(keyCache, cache);
    write(valueCache, cache);
    return error;
}
