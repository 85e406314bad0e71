"""What a timed call of attention should have given: fp32, from the caches as the call left them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwenforge.bench.attention_layers import REFERENCE_QUERIES, AttentionCall, Heads, Work

CHECKED_ROWS = 8
"""Of a batch, evenly spaced with the first and the last among them; all rows are checked for NaN."""


@dataclass(frozen=True)
class Differences:
    """Of a call, relative to the largest number expected; NaN where something is NaN.

    Attributes:
        output: of the output from attention in fp32 over what the caches hold.
        append: of the new keys and values in the caches from those given, beyond what rounding to the cache's type
            allows (nothing for bf16, half a step for INT8, a sixteenth for E4M3).
    """

    output: float
    append: float


def differences(torch: Any, heads: Heads, work: Work, call: AttentionCall, output: Any) -> Differences:
    """How far ``output`` [B, S, Hq D] and the caches are from what they should be, after the call."""
    of_output, of_append = [0.0 if bool(torch.isfinite(output).all()) else float("nan")], [0.0]
    new_keys, new_values = turned(call, call.key, heads.kv_heads), _split(call.value, heads.kv_heads).float()
    for row in checked_rows(work.batch):
        keys, values = cached(torch, call, work, row)
        for held, given, scales in (
            (keys, new_keys, call.layer.key_scales),
            (values, new_values, call.layer.value_scales),
        ):
            appended = held[:, work.past :].transpose(0, 1)
            of_append.append(_beyond_rounding(torch, call.layer.cache_type, appended, given[row], scales))
        of_output.append(_output_difference(torch, heads, work, call, row, keys, values, output))
    return Differences(_largest(of_output), _largest(of_append))


def checked_rows(batch: int) -> list[int]:
    """Which rows of a batch are compared."""
    count = min(batch, CHECKED_ROWS)
    return [index * (batch - 1) // max(count - 1, 1) for index in range(count)]


def expected_rows(
    torch: Any, heads: Heads, work: Work, call: AttentionCall, row: int, first: int, keys: Any, values: Any
) -> Any:
    """Attention [S', Hq, D] in fp32 of up to REFERENCE_QUERIES queries of a row from ``first`` on.

    keys and values are [Hk, L, D]; the turned queries are rounded to bf16 where the caches are, as op.yaml allows.
    """
    queries = turned(call, call.query, heads.heads)[row, first : first + REFERENCE_QUERIES]
    if call.layer.cache_type == "float":
        queries = queries.to(torch.bfloat16).float()
    count, group = queries.shape[0], heads.heads // heads.kv_heads
    grouped = queries.view(count, heads.kv_heads, group, heads.size).permute(1, 2, 0, 3)  # [Hk, G, S', D]
    scores = call.layer.scale * grouped @ keys[:, None].transpose(-1, -2)
    last = work.past + first + torch.arange(count, device=scores.device)
    hidden = torch.arange(work.length, device=scores.device) > last[:, None]
    weights = torch.softmax(scores.masked_fill_(hidden, float("-inf")), -1)
    return (weights @ values[:, None]).permute(2, 0, 1, 3).reshape(count, heads.heads, heads.size)


def turned(call: AttentionCall, vectors: Any, count: int) -> Any:
    """The heads [B, S, H, D] of vectors [B, S, H D], turned by halves in fp32."""
    low, high = _split(vectors, count).float().chunk(2, -1)
    at = call.positions.long()
    cos, sin = (table.float()[at][:, :, None] for table in (call.layer.cos, call.layer.sin))
    joined = low.new_empty(*low.shape[:-1], 2 * low.shape[-1])
    joined[..., : low.shape[-1]] = low * cos - high * sin
    joined[..., low.shape[-1] :] = high * cos + low * sin
    return joined


def cached(torch: Any, call: AttentionCall, work: Work, row: int) -> tuple[Any, Any]:
    """Keys and values [Hk, L, D] of a row as the caches hold them now, in fp32."""
    layer = call.layer

    def widened(data: Any, scales: Any) -> Any:
        if layer.page_table is None:
            raw = data[row]
        else:
            pages = data[layer.page_table[row].long()]  # [pages, Hk, page, D]
            raw = pages.transpose(0, 1).flatten(1, 2)
        raw = raw[:, : work.length].contiguous()
        numbers = (raw.view(torch.float8_e4m3fn) if layer.cache_type == "fp8" else raw).float()
        return numbers if scales is None else numbers * scales

    value_scales = layer.value_scales
    return (
        widened(layer.keys, None if layer.key_scales is None else layer.key_scales[:, None, :]),
        widened(layer.values, None if value_scales is None else value_scales[:, None, None]),
    )


def _output_difference(
    torch: Any, heads: Heads, work: Work, call: AttentionCall, row: int, keys: Any, values: Any, output: Any
) -> float:
    worst, largest = [0.0], [0.0]
    found = _split(output, heads.heads)[row].float()
    for first in range(0, work.new, REFERENCE_QUERIES):
        expected = expected_rows(torch, heads, work, call, row, first, keys, values)
        worst.append(float((found[first : first + len(expected)] - expected).abs().max()))
        largest.append(float(expected.abs().max()))
    return _largest(worst) / _largest(largest)


def _beyond_rounding(torch: Any, cache_type: str, held: Any, given: Any, scales: Any) -> float:
    allowed: Any = 0.0
    if cache_type == "fp8":
        allowed = given.abs() / 16
    elif cache_type == "int8":
        allowed = scales / 2 if scales.dim() == 2 else scales[:, None] / 2
    excess = ((held - given).abs() - allowed).max()
    return float(torch.where(excess.isnan(), excess, excess.clamp(min=0))) / float(given.abs().max())


def _split(vectors: Any, count: int) -> Any:
    return vectors.view(*vectors.shape[:2], count, vectors.shape[2] // count)


def _largest(numbers: list[float]) -> float:
    """NaN where one of them is."""
    return next((number for number in numbers if number != number), max(numbers))
