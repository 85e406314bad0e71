"""Rotary position embedding settings, in the old spelling (``rope_scaling``) and the new one (``rope_parameters``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qwenforge.errors import CheckpointError, UnsupportedError
from qwenforge.exporter.config_fields import Fields

_DEFAULT_THETA = 10_000.0
_SCALING_FIELDS = (
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)


@dataclass(frozen=True)
class RotaryConfig:
    """What decides the rotary tables.

    Attributes:
        type: "default", "linear" or "yarn" (arXiv:2309.00071).
        theta: Base of the wavelengths.
        factor: How many times the context is stretched; 1 for the default type.
        original_max_position_embeddings: Context length before stretching (yarn).
        attention_factor: Multiplies cos and sin; None lets yarn's formula choose.
        beta_fast, beta_slow: Rotations that bound yarn's ramp.
        mscale, mscale_all_dim: Alternative source of the attention factor.
        truncate: Whether yarn rounds the ramp's bounds to whole dimensions.
    """

    type: Literal["default", "linear", "yarn"]
    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def read_rotary(fields: Fields, max_position_embeddings: int) -> RotaryConfig:
    """Read either spelling as transformers does: ``rope_scaling`` replaces ``rope_parameters``, values inside win."""
    theta = fields.number("rope_theta", _DEFAULT_THETA)
    outer_partial = fields.raw("partial_rotary_factor")
    outer_original = fields.raw("original_max_position_embeddings")
    old, new = fields.raw("rope_scaling"), fields.raw("rope_parameters")
    name = "rope_scaling" if old else "rope_parameters"
    given = old or new or {}
    if not isinstance(given, Mapping):
        raise fields.error(name, "must be an object or null")
    inner = Fields(given, f"{fields.where}: {name}")
    if any(isinstance(value, Mapping) for value in given.values()):
        raise fields.refuse(name, "rotary settings per layer type are not supported")
    kind = given.get("rope_type", given.get("type", "default"))
    inner.raw("rope_type"), inner.raw("type")
    theta = inner.number("rope_theta", theta)
    partial = inner.raw("partial_rotary_factor") if inner.has("partial_rotary_factor") else outer_partial
    if partial not in (None, 1, 1.0):
        raise UnsupportedError(f"{fields.where}: 'partial_rotary_factor' = {partial!r}: only 1 is supported")
    if kind not in ("default", "linear", "yarn"):
        raise UnsupportedError(
            f"{inner.where}: rotary type {kind!r} is not supported, only 'default', 'linear' and 'yarn' are"
        )
    if kind != "yarn" and not _is_off(inner.raw("attention_factor")):
        raise inner.refuse("attention_factor", f"has no meaning for rotary type {kind!r}")
    if kind == "default":
        # transformers ignores these for the default type; a factor other than 1 is a config that lost its type.
        if inner.raw("factor") not in (None, 1, 1.0):
            raise inner.refuse("factor", 'is given without a rotary type; add "rope_type"')
        rotary = RotaryConfig("default", theta)
    elif kind == "linear":
        rotary = RotaryConfig("linear", theta, factor=inner.number("factor", None))
    else:
        rotary = _read_yarn(inner, theta, outer_original, max_position_embeddings)
    for field in _SCALING_FIELDS:
        inner.has(field)
    inner.finish()
    return rotary


def _read_yarn(fields: Fields, theta: float, outer_original: Any, max_position_embeddings: int) -> RotaryConfig:
    if outer_original is not None:
        original = outer_original  # transformers gives the field outside priority
    else:
        original = fields.integer("original_max_position_embeddings", max_position_embeddings)
    if isinstance(original, bool) or not isinstance(original, int) or original < 1:
        raise CheckpointError(
            f"{fields.where}: 'original_max_position_embeddings' must be a positive integer, not {original!r}"
        )
    if not fields.has("factor"):
        raise CheckpointError(f"{fields.where}: yarn needs a 'factor'; add it to the file")
    factor = max_position_embeddings / original if fields.raw("factor") is None else fields.number("factor", None)

    def optional(name: str) -> float | None:
        return None if fields.raw(name) is None else fields.number(name, None)

    truncate = fields.raw("truncate")
    return RotaryConfig(
        "yarn",
        theta,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=optional("attention_factor"),
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=True if not fields.has("truncate") else bool(truncate),
    )


def _is_off(value: Any) -> bool:
    return value is None or value == 1
