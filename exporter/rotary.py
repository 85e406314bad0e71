"""Rotary position embedding settings, in the old spelling (``rope_scaling``) and the new one (``rope_parameters``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qwenforge.errors import CheckpointError, UnsupportedError
from qwenforge.exporter.config_fields import Fields

_DEFAULT_THETA = 10_000.0
_THETA_BOUNDS = {"at_least": 2.0, "at_most": 1e30}
_FACTOR_BOUNDS = {"at_least": 1.0, "at_most": 1e9}
_TUNING_BOUNDS = {"at_least": 1e-3, "at_most": 1e6}
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
    """Read either spelling as transformers does: values inside ``rope_scaling`` or ``rope_parameters`` win.

    transformers lets ``rope_scaling`` replace ``rope_parameters``, base included; two that differ are refused.
    """
    theta = fields.number("rope_theta", _DEFAULT_THETA, **_THETA_BOUNDS)
    outer_partial = fields.raw("partial_rotary_factor")
    outer_original = fields.raw("original_max_position_embeddings")
    old, new = fields.raw("rope_scaling"), fields.raw("rope_parameters")
    name = "rope_scaling" if old else "rope_parameters"
    for spelling, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, Mapping):
            raise fields.error(spelling, "must be an object or null")
    if old and new and _one_spelling(old) != _one_spelling(new):
        raise fields.error("rope_scaling", "contradicts 'rope_parameters', so that only one of them may be given")
    given = old or new or {}
    inner = Fields(given, f"{fields.where}: {name}")
    if any(isinstance(value, Mapping) for value in given.values()):
        raise fields.refuse(name, "rotary settings per layer type are not supported")
    kind = given.get("rope_type", given.get("type", "default"))
    if given.get("type", kind) != kind:
        raise inner.error("type", f"contradicts 'rope_type' ({kind!r})")
    inner.raw("rope_type"), inner.raw("type")
    theta = inner.number("rope_theta", theta, **_THETA_BOUNDS)
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
        rotary = RotaryConfig("linear", theta, factor=inner.number("factor", None, **_FACTOR_BOUNDS))
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
    if fields.raw("factor") is None:
        factor = max_position_embeddings / original
    else:
        factor = fields.number("factor", None, **_FACTOR_BOUNDS)

    def optional(name: str) -> float | None:
        return None if fields.raw(name) is None else fields.number(name, None, **_TUNING_BOUNDS)

    # transformers takes null for false.
    truncate = not (fields.has("truncate") and fields.raw("truncate") is None) and fields.boolean("truncate", True)
    fast, slow = optional("beta_fast") or 32.0, optional("beta_slow") or 1.0
    if fast < slow:
        raise fields.error("beta_fast", f"must not be below 'beta_slow' ({slow:g})")
    return RotaryConfig(
        "yarn",
        theta,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=optional("attention_factor"),
        beta_fast=fast,
        beta_slow=slow,
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=truncate,
    )


def _one_spelling(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the type under its new name."""
    return {"rope_type" if name == "type" else name: value for name, value in given.items()}


def _is_off(value: Any) -> bool:
    return value is None or value == 1
