"""Recipes: what a user asks for when a model is to be quantized, as frozen, typed and versioned settings.

A recipe says nothing about one model. :func:`qwenforge.calibration.calibrate.calibrate` makes a
:class:`~qwenforge.graph_passes.quantize.plan.QuantizationPlan` of it, a graph and text.

=====================  =======================================================================================
recipe                 weights; activations; how
=====================  =======================================================================================
``int8-w8a8``          int8, a scale a row; int8, one static scale a tensor; SmoothQuant (Xiao et al. 2022)
``int8-weight-only``   int8, a scale a row; as they are; needs no text
``int4-weight-only``   int4, a scale for 128 columns of a row; as they are; activation-aware scales and clipping
                       (AWQ, Lin et al. 2023), each column's error made up for by others (GPTQ, Frantar et al. 2022)
``fp8``                E4M3, a scale a row; E4M3, one static scale a tensor
=====================  =======================================================================================

Any of them takes ``cache="fp8"`` or ``"int8"``: an 8-bit key/value cache, keys scaled by head and channel.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qwenforge.errors import UserError
from qwenforge.graph_passes.quantize.plan import SitePlan
from qwenforge.graph_passes.quantize.sites import KEPT_BY_DEFAULT, Role

Format = Literal["int8", "int4", "fp8"]
Granularity = Literal["tensor", "channel", "group"]
RangeMethod = Literal["minmax", "percentile", "mse", "entropy"]

_KEEP, _RECIPE = "keep", "recipe"
_FORMATS: tuple[Format, ...] = ("int8", "int4", "fp8")
_DEFAULT_INT4_GROUP = 128
_KEPT_NAMES: dict[str, str] = {
    "qkv": "query, key and value projections are",
    "attention_output": "attention's output projections are",
    "mlp_input": "gate and up projections are",
    "mlp_output": "down projections are",
    "router": "routers are",
    "shared_gate": "shared experts' gates are",
    "vocabulary": "the vocabulary projection is",
}


class _Part(BaseModel):
    """Base of a recipe's parts: frozen, closed to unknown fields, and strict about types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Override(_Part):
    """An exception for the sites whose names match a pattern.

    Attributes:
        pattern: of site names, as in a shell: ``*`` also crosses dots, ``model.layers.0.*`` is a whole layer.
        action: ``keep`` leaves the weights as they are; ``recipe`` does what the recipe does elsewhere (for sites that
            are kept by default); ``int8``, ``int4`` and ``fp8`` quantize the weights alone.
        group_size: columns of a row that share a scale, for int8 and int4; None for a whole row.
    """

    pattern: Annotated[str, Field(min_length=1)]
    action: Literal["keep", "recipe", "int8", "int4", "fp8"]
    group_size: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Override:
        if self.group_size is not None and self.action not in ("int8", "int4"):
            raise ValueError(f"a group size does not go with {self.action!r}")
        return self

    def matches(self, site: str) -> bool:
        """Whether ``site`` is meant."""
        return fnmatch.fnmatchcase(site, self.pattern)

    def __str__(self) -> str:
        return f"{self.pattern}={self.action}" + (f":{self.group_size}" if self.group_size is not None else "")


class Recipe(_Part):
    """How to quantize a model.

    Attributes:
        version: of this format.
        name: of the recipe; results carry it.
        weight: the number format of weights.
        weight_granularity: what shares a scale: a matrix, a row (an output channel), or ``group_size`` columns of one.
        group_size: with granularity ``group`` only.
        activation: the format of the inputs of products, with one static scale a tensor; None leaves them as they are.
        activation_range: how the largest magnitude that an activation scale covers is chosen
            (:mod:`qwenforge.calibration.ranges`).
        percentile: of magnitudes that ``percentile`` covers, in percent.
        smoothing: how range moves between activations and weights: ``smoothquant`` by the largest magnitudes of both,
            ``awq`` by those of activations.
        smoothing_strength: SmoothQuant's alpha: 0 leaves all range with the activations, 1 gives it to the weights;
            None searches for it place by place, one half of the calibration text judging the other.
        clipping: search for each group's weights a scale below their largest magnitude that harms the outputs less.
        rounding: ``nearest``, or ``gptq``: column by column, later columns making up for the errors of earlier ones.
        cache: an 8-bit key/value cache.
        overrides: exceptions; the last one that matches a site counts.
        kept_roles: roles that stay in high precision unless an override says otherwise.
        expert_floor: an expert that was given fewer tokens than this falls back to the statistics of its weights.
    """

    version: Literal[1] = 1
    name: Annotated[str, Field(min_length=1)]
    weight: Format
    weight_granularity: Granularity = "channel"
    group_size: Annotated[int, Field(ge=8)] | None = None
    activation: Literal["int8", "fp8"] | None = None
    activation_range: RangeMethod = "minmax"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    smoothing: Literal["smoothquant", "awq"] | None = None
    smoothing_strength: Annotated[float, Field(ge=0, le=1)] | None = None
    clipping: bool = False
    rounding: Literal["nearest", "gptq"] = "nearest"
    cache: Literal["fp8", "int8"] | None = None
    overrides: tuple[Override, ...] = ()
    kept_roles: tuple[Role, ...] = tuple(sorted(KEPT_BY_DEFAULT))
    expert_floor: Annotated[int, Field(ge=1)] = 32

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if (self.weight_granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with weight_granularity 'group', and only with it")
        if self.weight == "int4" and self.weight_granularity != "group":
            raise ValueError("int4 weights need weight_granularity 'group'")
        if self.weight == "fp8" and self.weight_granularity == "group":
            raise ValueError("fp8 weights have a scale for a row or a matrix, not for a group")
        if self.activation is not None and self.activation != self.weight:
            raise ValueError(f"{self.activation} activations need {self.activation} weights")
        if self.weight == "fp8" and (self.clipping or self.rounding == "gptq"):
            raise ValueError("clipping and gptq are for integers")
        return self

    @property
    def needs_data(self) -> bool:
        """Whether the recipe cannot do without calibration text."""
        return (
            self.activation is not None
            or self.cache is not None
            or self.smoothing is not None
            or self.clipping
            or self.rounding == "gptq"
        )

    def choose(self, site: str, role: Role | Literal["experts"]) -> SitePlan:
        """What is done to the site of that name and role, weights and activations."""
        chosen = next((override for override in reversed(self.overrides) if override.matches(site)), None)
        if chosen is None:
            if role in self.kept_roles:
                return SitePlan(weight=None, reason=f"{_KEPT_NAMES[role]} kept in high precision by default")
            return self._general()
        if chosen.action == _KEEP:
            return SitePlan(weight=None, reason=f"override {chosen}")
        if chosen.action == _RECIPE:
            return self._general()
        weight, group = cast(Format, chosen.action), chosen.group_size
        if weight == "int4" and group is None:
            group = self.group_size or _DEFAULT_INT4_GROUP
        return SitePlan(weight=weight, group_size=group, reason=f"override {chosen}")

    def _general(self) -> SitePlan:
        return SitePlan(weight=self.weight, group_size=self.group_size, activation=self.activation)

    def override(self, *exceptions: Override | str) -> Recipe:
        """The same recipe with further exceptions, as :func:`parse_override` reads them."""
        more = tuple(parse_override(each) if isinstance(each, str) else each for each in exceptions)
        return self.changed(overrides=(*self.overrides, *more))

    def changed(self, **fields: object) -> Recipe:
        """The same recipe with other fields.

        Raises:
            UserError: there is no such field, or a value does not fit.
        """
        return _validated({**dict(self), **fields}, f"recipe {self.name}")

    def to_json(self) -> str:
        """The recipe as JSON text; :func:`from_json` reads it."""
        return self.model_dump_json(indent=1) + "\n"


_RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="int8-w8a8", weight="int8", activation="int8", smoothing="smoothquant", activation_range="mse"),
        Recipe(name="int8-weight-only", weight="int8"),
        Recipe(
            name="int4-weight-only",
            weight="int4",
            weight_granularity="group",
            group_size=_DEFAULT_INT4_GROUP,
            smoothing="awq",
            clipping=True,
            rounding="gptq",
        ),
        Recipe(name="fp8", weight="fp8", activation="fp8"),
    )
}

NAMES = tuple(_RECIPES)
"""The recipes that :func:`get` knows."""


def get(name: str) -> Recipe:
    """The recipe of that name; a name with ``.json`` at its end is a file.

    Raises:
        UserError: there is no such recipe.
    """
    if name.endswith(".json"):
        return load(Path(name))
    if name not in _RECIPES:
        raise UserError(f"there is no recipe {name!r}: use one of {', '.join(NAMES)}, or a recipe's .json file")
    return _RECIPES[name]


def load(path: Path) -> Recipe:
    """The recipe in the file ``path``.

    Raises:
        UserError: the file cannot be read or is no recipe; the message names the field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {path} cannot be read ({error}): check the file") from error
    return from_json(text, str(path))


def from_json(text: str, where: str = "the recipe") -> Recipe:
    """The recipe in JSON ``text``; ``where`` says where it came from.

    Raises:
        UserError: it is no recipe; the message names the field.
    """
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{where}: {_first(error)}") from error


def parse_override(text: str) -> Override:
    """``PATTERN=ACTION``: ``model.layers.0.*=keep``, ``lm_head=int8``, ``*.down_proj=int4:64``.

    Raises:
        UserError: the text has another form.
    """
    pattern, separator, action = text.rpartition("=")
    action, _, size = action.partition(":")
    try:
        if not separator or not pattern:
            raise ValueError
        fields: dict[str, object] = {"pattern": pattern, "action": action}
        if size:
            fields["group_size"] = int(size)
        return Override.model_validate(fields)
    except ValueError as error:  # pydantic's ValidationError is one too
        raise UserError(
            f"override {text!r} is not PATTERN=ACTION with an action of {_KEEP}, {_RECIPE}, {', '.join(_FORMATS)}, or "
            "int8 and int4 with a group size, as in '*.down_proj=int4:64'"
        ) from error


def is_override(choice: SitePlan) -> bool:
    """Whether :meth:`Recipe.choose` made ``choice`` by an override."""
    return choice.reason.startswith("override ")


def require_matches(recipe: Recipe, sites: Iterable[str]) -> None:
    """Refuse an override that names no site of the model: it is a typing error.

    Raises:
        UserError: the override and some names there are.
    """
    found = list(sites)
    for override in recipe.overrides:
        if not any(override.matches(site) for site in found):
            examples = ", ".join(found[:4])
            raise UserError(f"override {str(override)!r} matches no site of the model; there are {examples}...")


def _validated(fields: dict[str, object], where: str) -> Recipe:
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{where}: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    """The first of a validation's complaints in a line."""
    found = error.errors()[0]
    field = ".".join(map(str, found["loc"]))
    return f"{field}: {found['msg']}" if field else str(found["msg"])
