"""Optimization profiles: one for prompts and one for single tokens, tuned for what the user calls typical."""

from __future__ import annotations

from dataclasses import dataclass

from qwenforge import names
from qwenforge.errors import UserError
from qwenforge.manifest import BundleFacts, ProfileRecord, TensorSpec

TYPICAL_PROMPT = 512
"""Prompt tokens that the prefill profile is tuned for unless the user says otherwise."""


@dataclass(frozen=True)
class Sizes:
    """What the profiles span: at most and typically. None: the bundle's own limits, a prompt of 512 and one row."""

    max_length: int | None = None
    max_batch: int | None = None
    typical_prompt: int | None = None
    typical_batch: int | None = None


def profile_shapes(facts: BundleFacts, sizes: Sizes | None = None) -> list[ProfileRecord]:
    """The prefill and the decode profile of a bundle.

    Raises:
        UserError: ``sizes`` go beyond the bundle's caches, or typical ones beyond the largest.
    """
    sizes = sizes or Sizes()
    capacity, rows = facts.limits.max_length, facts.limits.max_batch or 1
    longest = _at_most("--max-length", sizes.max_length, capacity, "the bundle's caches hold")
    batch = _at_most("--max-batch", sizes.max_batch, rows, "the bundle was exported for")
    prompt = _at_most(
        "--typical-prompt", sizes.typical_prompt, longest, "the largest prompt is", default=TYPICAL_PROMPT
    )
    typical = _at_most("--typical-batch", sizes.typical_batch, batch, "the largest batch is", default=1)
    bound = {spec.name for spec in facts.weight_inputs}
    dynamic = [spec for spec in facts.inputs if spec.name not in bound]

    def shapes(count: int, tokens: int) -> dict[str, tuple[int, ...]]:
        values = {names.BATCH: count, names.SEQUENCE: tokens, names.LOGITS_COUNT: 1, names.CAPACITY: capacity}
        return {spec.name: _sized(spec, values) for spec in dynamic}

    def profile(name: str, most: int, middle: int) -> ProfileRecord:
        return ProfileRecord(
            name=name, minimum=shapes(1, 1), typical=shapes(typical, middle), maximum=shapes(batch, most)
        )

    return [profile("prefill", longest, prompt), profile("decode", 1, 1)]


def _at_most(flag: str, wanted: int | None, limit: int, what: str, *, default: int | None = None) -> int:
    if wanted is None:
        return limit if default is None else min(default, limit)
    if wanted > limit:
        raise UserError(
            f"{flag} {wanted} is too large, {what} {limit}: give at most that, or export with a larger one."
        )
    return wanted


def _sized(spec: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape)
