"""Calls of the attention kernels, with linear, paged and quantized caches, and what they compute in float64 PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch

from support import simt
from support.tolerances import BFLOAT16, FLOAT16

DTYPES = {"float16": (torch.float16, FLOAT16), "bfloat16": (torch.bfloat16, BFLOAT16)}
CACHES = ("float", "fp8", "int8")
PATHS = {"auto": 0, "plain": 1, "split": 2, "tiled": 3}


@dataclass(frozen=True)
class Call:
    """One call: ``starts`` has the tokens that each row's cache holds already."""

    starts: tuple[int, ...] = (0,)
    sequence: int = 1
    capacity: int = 16
    positions: int = 64
    heads: int = 4
    kv_heads: int = 2
    size: int = 64
    window: int = 0
    scale: float = 0.125
    shift: int = 0
    """Added to a token's position: where it is turned to, not where it is stored."""
    cache: str = "float"
    page_size: int = 0
    packed: bool = False
    norm: bool = False
    path: str = "auto"
    yarn: float = 0.0
    """If not 0, tables as YaRN makes them for a context that is so many times longer."""

    @property
    def rows(self) -> int:
        return len(self.starts)

    @property
    def row_pages(self) -> int:
        return self.capacity // self.page_size if self.page_size else 1

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """Of a cache as it lies in memory; a paged one has three pages more than it needs."""
        pages = self.rows * self.row_pages + 3 if self.page_size else self.rows
        return pages, self.kv_heads, self.page_size or self.capacity, self.size

    @property
    def numbers(self) -> list[float]:
        """As the driver takes them."""
        sizes = [self.rows, self.sequence, self.capacity, self.positions]
        heads = [self.heads, self.kv_heads, self.size, self.window, self.scale]
        kinds = [self.cache_shape[0], CACHES.index(self.cache), self.page_size, self.packed, self.norm]
        return [*sizes, *heads, *kinds, EPSILON, PATHS[self.path]]


EPSILON = 1e-6


@dataclass
class Inputs:
    """Query [B, S, Hq, D], key and value [B, S, Hk, D], tables [P, D / 2], caches full of garbage, and so on."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    query_norm: torch.Tensor
    key_norm: torch.Tensor
    key_scales: torch.Tensor
    value_scales: torch.Tensor
    pages: torch.Tensor

    @staticmethod
    def random(call: Call, dtype: torch.dtype, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        def cache() -> torch.Tensor:
            if call.cache == "float":
                return draw(*call.cache_shape)
            numbers = torch.randint(-127, 128, call.cache_shape, generator=generator).to(torch.int8)
            if call.cache == "fp8":
                numbers[(numbers & 0x7F) == 0x7F] = 0  # NaN
            return numbers

        cos, sin = _tables(call)
        starts = torch.tensor(call.starts, dtype=torch.int32)
        order = torch.randperm(call.cache_shape[0], generator=generator).to(torch.int32)
        # The largest number lies about four standard deviations out.
        most = {"float": 1.0, "fp8": 448.0, "int8": 127.0}[call.cache]
        spread = torch.rand((call.kv_heads, call.size), generator=generator) + 0.5
        return Inputs(
            query=draw(call.rows, call.sequence, call.heads, call.size),
            key=draw(call.rows, call.sequence, call.kv_heads, call.size),
            value=draw(call.rows, call.sequence, call.kv_heads, call.size),
            cos=cos.to(dtype),
            sin=sin.to(dtype),
            positions=starts[:, None] + torch.arange(call.sequence, dtype=torch.int32) + call.shift,
            starts=starts,
            key_cache=cache(),
            value_cache=cache(),
            query_norm=(1 + 0.3 * draw(call.size)).to(dtype),
            key_norm=(1 + 0.3 * draw(call.size)).to(dtype),
            key_scales=(4.0 / most * spread).float(),
            value_scales=(4.0 / most * (1 + torch.arange(call.kv_heads) / 8)).float(),
            pages=order[: call.rows * call.row_pages].view(call.rows, call.row_pages),
        )

    def arrays(self, call: Call) -> list[Any]:
        """As the driver reads them."""
        tensors = [self.query, self.key, self.value]
        if call.packed:
            tensors = [torch.cat(tensors, dim=2)]
        tensors += [self.cos, self.sin, self.positions, self.starts]
        if call.norm:
            tensors += [self.query_norm, self.key_norm]
        if call.cache != "float":
            tensors += [self.key_scales, self.value_scales]
        if call.page_size:
            tensors.append(self.pages)
        tensors += [self.key_cache, self.value_cache]
        return [_bits(tensor) for tensor in tensors]


@dataclass(frozen=True)
class Results:
    """Output [B, S, Hq, D] and the caches as they lie in memory."""

    output: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor

    def same_bits(self, other: Results) -> bool:
        pairs = [(self.output, other.output), (self.key_cache, other.key_cache), (self.value_cache, other.value_cache)]
        return all(np.array_equal(_bits(a), _bits(b)) for a, b in pairs)


def run(call: Call, inputs: Inputs, dtype: str, **options: Any) -> Results:
    """The kernels' results; ``options`` as :func:`support.simt.run` takes them."""
    kind = DTYPES[dtype][0]
    raw = np.frombuffer(simt.run("attention", dtype, call.numbers, inputs.arrays(call), **options), np.uint8)
    element = kind if call.cache == "float" else torch.int8
    found = []
    for like, of in ((inputs.query, kind), (inputs.key_cache, element), (inputs.value_cache, element)):
        size = like.numel() * of.itemsize
        numbers = raw[:size].copy().view(np.int16 if of.itemsize == 2 else np.int8)
        found.append(torch.from_numpy(numbers).view(of).view(like.shape))
        raw = raw[size:]
    return Results(*found)


def linear(call: Call, inputs: Inputs, cache: torch.Tensor, *, keys: bool) -> torch.Tensor:
    """What a cache says, as float64 [B, Hk, M, D], pages put one behind the other."""
    if call.cache == "float" or call.cache == "int8":
        values = cache.double()
    else:
        values = torch.from_numpy(cache.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64))
    if call.cache != "float":
        scales = inputs.key_scales[:, None, :] if keys else inputs.value_scales[:, None, None]
        values = values * scales.double()
    if call.page_size:
        rows = values[inputs.pages.long()]  # [B, pages, Hk, page, D]
        values = rows.transpose(1, 2).reshape(call.rows, call.kv_heads, call.capacity, call.size)
    return values


def turned(call: Call, inputs: Inputs, *, keys: bool) -> torch.Tensor:
    """Query or key [B, S, H, D], normalized if asked and turned by halves, float64."""
    x, weight = (inputs.key, inputs.key_norm) if keys else (inputs.query, inputs.query_norm)
    x = x.double()
    if call.norm:
        x = x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()
    cos, sin = (table.double()[inputs.positions.long()][:, :, None] for table in (inputs.cos, inputs.sin))
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def attended(call: Call, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """softmax(scale q k^T) v over caches [B, Hk, M, D] that hold the new tokens already; [B, S, Hq, D] float64."""
    places = torch.tensor(call.starts)[:, None] + torch.arange(call.sequence)  # [B, S]
    behind = places[:, :, None] - torch.arange(call.capacity)  # [B, S, M]
    seen = (behind >= 0) & ((behind < call.window) if call.window else torch.tensor(True))
    group = call.heads // call.kv_heads
    scores = torch.einsum("bshd,bhmd->bhsm", queries, keys.repeat_interleave(group, 1)) * call.scale
    weights = torch.softmax(scores.masked_fill(~seen[:, None], -torch.inf), -1)
    found = torch.einsum("bhsm,bhmd->bhsd", weights, values.repeat_interleave(group, 1))
    return found.transpose(1, 2)


def check(call: Call, dtype: str, seed: int = 0, **options: Any) -> None:
    """Run the call, and raise AssertionError unless output and caches are what float64 says."""
    kind, tolerance = DTYPES[dtype]
    inputs = Inputs.random(call, kind, seed)
    found = run(call, inputs, dtype, **options)
    expected_keys = turned(call, inputs, keys=True)
    keys = linear(call, inputs, found.key_cache, keys=True)
    values = linear(call, inputs, found.value_cache, keys=False)
    for row, start in enumerate(call.starts):
        new = slice(start, start + call.sequence)
        stored = keys[row, :, new].transpose(0, 1), values[row, :, new].transpose(0, 1)
        _check_stored(call, stored[0], expected_keys[row], inputs.key_scales, tolerance)
        _check_stored(call, stored[1], inputs.value[row].double(), inputs.value_scales[:, None], 0.0)
    _check_untouched(call, inputs, found)
    queries = turned(call, inputs, keys=False)
    if call.cache == "float":
        queries = queries.to(kind).double()  # as it is rounded before the product
    expected = attended(call, queries, keys, values)
    assert torch.isfinite(found.output).all()
    error = float((found.output.double() - expected).abs().max())
    assert error < tolerance * float(expected.abs().max()), f"off by {error}"


def _check_stored(
    call: Call, stored: torch.Tensor, exact: torch.Tensor, scales: torch.Tensor, tolerance: float
) -> None:
    """Vectors [S, Hk, D] are as close to ``exact`` as the cache's numbers can be: half a step, or its end."""
    error = (stored - exact).abs()
    if call.cache == "float":
        assert float(error.max()) <= tolerance * float(exact.abs().max())
        return
    steps = scales.double()
    if call.cache == "int8":
        bound = steps / 2
        exact = exact.clamp(-128 * steps, 127 * steps)
    else:
        exact = exact.clamp(-448 * steps, 448 * steps)
        bound = torch.maximum(exact.abs() / 16, steps * 2.0**-10)
    assert bool(((stored - exact).abs() <= bound * (1 + 1e-3)).all()), "a number is not the nearest one"


def _check_untouched(call: Call, inputs: Inputs, found: Results) -> None:
    """Nothing but the places of the new tokens was written."""
    taken = torch.zeros(call.cache_shape[0], call.cache_shape[2], dtype=torch.bool)
    for row, start in enumerate(call.starts):
        for place in range(start, start + call.sequence):
            size = call.page_size
            taken[(int(inputs.pages[row, place // size]), place % size) if size else (row, place)] = True
    for before, after in ((inputs.key_cache, found.key_cache), (inputs.value_cache, found.value_cache)):
        left = ~taken[:, None, :, None].expand(before.shape)
        assert torch.equal(before[left], after[left]), "a place of another token was written"


def _tables(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [P, D / 2], float64."""
    if not call.yarn:
        step = 10000.0 ** (-torch.arange(call.size // 2).double() * 2 / call.size)
        angles = torch.outer(torch.arange(call.positions).double(), step)
        return angles.cos(), angles.sin()
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    scaling = {"rope_type": "yarn", "factor": call.yarn, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    config = Qwen2Config(
        hidden_size=call.heads * call.size,
        num_attention_heads=call.heads,
        max_position_embeddings=call.positions,
        rope_parameters=scaling,
    )
    positions = torch.arange(call.positions)[None]
    cos, sin = Qwen2RotaryEmbedding(config)(torch.zeros(1, dtype=torch.float64), positions)
    return cos[0, :, : call.size // 2].double(), sin[0, :, : call.size // 2].double()


def _bits(tensor: torch.Tensor) -> Any:
    flat = tensor.contiguous()
    return (flat.view(torch.int16) if flat.dtype in (torch.float16, torch.bfloat16) else flat).numpy()
