"""Attention to be timed: heads, caches and amounts of work, what bounds their time, and tensors made on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qwenforge.bench.attention_call import Attention

_ELEMENT_BYTES = 2
"""Of queries, keys, values and outputs: bf16."""
INT8_STEP = 1 / 24
"""Scale of an INT8 cache: 127 steps are more than five deviations."""
REFERENCE_QUERIES = 512
"""The reference takes so many queries at a time: scores [Hq, 512, L] in fp32, half a gigabyte at 8192 keys."""


@dataclass(frozen=True)
class Heads:
    """Hq, Hk and D of a model."""

    name: str
    heads: int
    kv_heads: int
    size: int


HEADS = (Heads("Qwen2-7B", 28, 4, 128), Heads("Qwen2-0.5B", 14, 2, 64), Heads("Qwen3-30B-A3B", 32, 4, 128))


@dataclass(frozen=True)
class Cache:
    """How keys and values are stored; a page_size of 0 is a linear cache."""

    name: str
    cache_type: str
    element_bytes: int
    page_size: int = 0


CACHES = (
    Cache("bf16", "float", 2),
    Cache("fp8", "fp8", 1),
    Cache("int8", "int8", 1),
    Cache("bf16-paged", "float", 2, page_size=64),
)


@dataclass(frozen=True)
class Work:
    """B rows with L keys behind them each, and S new tokens a row; the keys of a row are L + S then."""

    batch: int
    new: int
    past: int

    @property
    def kind(self) -> str:
        """``decode`` or ``prefill``."""
        return "decode" if self.new == 1 else "prefill"

    @property
    def length(self) -> int:
        """Keys of a row at the end."""
        return self.past + self.new

    @property
    def pairs(self) -> int:
        """Of a query and a key it sees, for one head."""
        return self.batch * (self.new * self.past + self.new * (self.new + 1) // 2)


def decode_works(batches: tuple[int, ...] = (1, 8, 32, 128), keys: tuple[int, ...] = (1024, 4096, 32768)) -> list[Work]:
    """One new token a row, itself the last of so many keys."""
    return [Work(batch, 1, count - 1) for count in keys for batch in batches]


PREFILL_WORKS = [Work(1, 512, 0), Work(1, 2048, 0), Work(1, 8192, 0), Work(1, 2048, 4096)]
"""Prompts into an empty cache, and one that continues behind 4096 tokens."""


@dataclass(frozen=True)
class Floor:
    """What bounds a call: bytes that have to move, operations, and the larger of both times in microseconds."""

    cache_bytes: float
    moved_bytes: float
    operations: float
    memory_us: float
    arithmetic_us: float

    @property
    def us(self) -> float:
        """The floor."""
        return max(self.memory_us, self.arithmetic_us)


def floor_of(heads: Heads, cache: Cache, work: Work, bandwidth: float, rate: float) -> Floor:
    """The floor on a machine of ``bandwidth`` bytes and ``rate`` bf16 operations a second.

    Bytes: keys and values of every row once, queries, new keys and values in, new keys and values and the output out.
    Operations: 4 D for every head and pair of a query and a key that it sees, those of products of matrices alone.
    """
    vector = heads.kv_heads * heads.size
    tokens = work.batch * work.new
    cached = 2.0 * work.batch * work.length * vector * cache.element_bytes
    appended = 2.0 * tokens * vector * (_ELEMENT_BYTES + cache.element_bytes)
    moved = cached + appended + 2.0 * tokens * heads.heads * heads.size * _ELEMENT_BYTES
    operations = 4.0 * heads.heads * heads.size * work.pairs
    return Floor(cached, moved, operations, 1e6 * moved / bandwidth, 1e6 * operations / rate)


@dataclass(frozen=True)
class AttentionCall:
    """A call's tensors on the device, as :class:`~qwenforge.bench.kernel_library.Kernels` takes them.

    query [B, S, Hq D], key and value [B, S, Hk D] in bf16, positions [B, S], starts [B], and the layer with its caches,
    which hold random numbers everywhere.
    """

    query: Any
    key: Any
    value: Any
    positions: Any
    starts: Any
    layer: Attention


def bytes_needed(heads: Heads, cache: Cache, work: Work) -> float:
    """Of GPU memory for a row: caches, tokens, what drawing and checking them takes for a moment."""
    vector = heads.kv_heads * heads.size
    caches = 2.0 * work.batch * work.length * vector * cache.element_bytes
    tokens = work.batch * work.new * (3 * heads.heads + 4 * heads.kv_heads) * heads.size * _ELEMENT_BYTES
    scores = 3.0 * heads.heads * min(work.new, REFERENCE_QUERIES) * work.length * 4
    return 1.1 * caches + tokens + scores + 8.0 * work.length * (vector + heads.heads * heads.size)


def make_call(torch: Any, heads: Heads, cache: Cache, work: Work) -> AttentionCall:
    """Random tokens, and caches full of random numbers whose deviation is about 1; pages lie in a random order."""
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    steps = 1e6 ** (-torch.arange(heads.size // 2, device="cuda").float() * 2 / heads.size)
    angles = torch.outer(torch.arange(work.length, device="cuda").float(), steps)
    slots, rows, table = work.length, work.batch, None
    if cache.page_size:
        slots, of_row = cache.page_size, math.ceil(work.length / cache.page_size)
        rows = work.batch * of_row
        table = torch.randperm(rows, device="cuda").to(torch.int32).view(work.batch, of_row)
    shape = (rows, heads.kv_heads, slots, heads.size)
    quantized: dict[str, Any] = {}
    if cache.cache_type != "float":
        step = {"fp8": 1.0, "int8": INT8_STEP}[cache.cache_type]
        quantized = {
            "key_scales": torch.full((heads.kv_heads, heads.size), step, dtype=torch.float32, device="cuda"),
            "value_scales": torch.full((heads.kv_heads,), step, dtype=torch.float32, device="cuda"),
        }
    keys, values = (_cache(torch, cache, shape) for _ in range(2))
    scale = 1 / math.sqrt(heads.size)
    layer = Attention(
        heads.heads,
        heads.kv_heads,
        scale,
        angles.cos().to(torch.bfloat16),
        angles.sin().to(torch.bfloat16),
        keys,
        values,
        cache_type=cache.cache_type,
        page_table=table,
        **quantized,
    )
    starts = torch.full((work.batch,), work.past, dtype=torch.int32, device="cuda")
    places = torch.arange(work.past, work.length, device="cuda").to(torch.int32)
    vector = heads.kv_heads * heads.size
    return AttentionCall(
        query=torch.randn(work.batch, work.new, heads.heads * heads.size, **options),
        key=torch.randn(work.batch, work.new, vector, **options),
        value=torch.randn(work.batch, work.new, vector, **options),
        positions=places.repeat(work.batch, 1),
        starts=starts,
        layer=layer,
    )


def _cache(torch: Any, cache: Cache, shape: tuple[int, ...]) -> Any:
    if cache.cache_type == "float":
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    made = torch.empty(shape, dtype=torch.int8, device="cuda")
    for row in range(shape[0]):  # one at a time: fp32 of a whole cache is four times as large
        numbers = torch.randn(shape[1:], dtype=torch.float32, device="cuda")
        if cache.cache_type == "fp8":
            made[row] = numbers.to(torch.float8_e4m3fn).view(torch.int8)
        else:
            made[row] = (numbers / INT8_STEP).round().clamp(-127, 127).to(torch.int8)
    return made
