"""What a plugin is, read from its ``op.yaml``: the single source for the lowering, the C++ and the tests.

A dimension is an expression over the plugin's attributes (``2 * intermediate_size``) or the name of a size that the
tensors themselves bring (``tokens``); such a name means the same size wherever it occurs.
"""

from __future__ import annotations

import ast
import functools
import math
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

NAMESPACE = "qwenforge"
"""Of the plugins in TensorRT's registry, and the ONNX domain of their nodes."""

PLUGINS = ("moe", "attention")
"""Folders of ``plugins/`` that hold an op.yaml."""

ElementType = Literal["float32", "float16", "bfloat16", "int32", "int8"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Attribute(_Part):
    """One plugin field; all are required, and values outside the stated range are refused."""

    name: str
    type: Literal["int", "float"]
    meaning: str
    minimum: float | None = None
    maximum: float | None = None
    multiple_of: int | None = None


class TypeChoice(_Part):
    """An element type or type variable for each value 0, 1, ... of an attribute."""

    attribute: str
    values: tuple[str, ...]


class Tensor(_Part):
    """An input or output.

    ``type`` is an element type, the name of a type variable, or a choice among those. ``present_if`` is an expression
    over the attributes: the input exists when it is not 0. ``aliases`` names the input whose memory an output shares.
    """

    name: str
    type: str | TypeChoice
    shape: tuple[str | int, ...]
    meaning: str = ""
    present_if: str | None = None
    aliases: str | None = None


class Requirement(_Part):
    """A condition over the attributes, and what to say when it does not hold."""

    holds: str
    message: str


class OpSpec(_Part):
    """One plugin."""

    name: str
    version: str
    summary: str
    types: dict[str, tuple[ElementType, ...]]
    attributes: tuple[Attribute, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    requirements: tuple[Requirement, ...] = ()

    def problem(self, attributes: dict[str, int | float]) -> str | None:
        """Why ``attributes`` are not this plugin's, in one clause; None when they are."""
        expected = {attribute.name for attribute in self.attributes}
        for name in sorted(expected - attributes.keys()):
            return f"attribute {name} is missing"
        for name in sorted(attributes.keys() - expected):
            return f"attribute {name} is unknown"
        for attribute in self.attributes:
            value = attributes[attribute.name]
            if attribute.type == "int" and not isinstance(value, int):
                return f"{attribute.name} is {value}, not an integer"
            if not math.isfinite(value):
                return f"{attribute.name} is {value}, no finite number"
            if attribute.minimum is not None and value < attribute.minimum:
                return f"{attribute.name} is {value}, below {attribute.minimum:g}"
            if attribute.maximum is not None and value > attribute.maximum:
                return f"{attribute.name} is {value}, above {attribute.maximum:g}"
            if attribute.multiple_of is not None and value % attribute.multiple_of:
                return f"{attribute.name} is {value}, no multiple of {attribute.multiple_of}"
        for requirement in self.requirements:
            if not evaluate(requirement.holds, attributes):
                return requirement.message
        return None

    def input_names(self, attributes: dict[str, int | float]) -> list[str]:
        """The inputs that exist under ``attributes``, in order."""
        return [
            tensor.name
            for tensor in self.inputs
            if tensor.present_if is None or evaluate(tensor.present_if, attributes) != 0
        ]


@functools.cache
def load(plugin: str) -> OpSpec:
    """The specification in the folder ``plugin`` (one of :data:`PLUGINS`)."""
    import yaml

    text = resources.files("qwenforge.plugins").joinpath(plugin).joinpath("op.yaml").read_text(encoding="utf-8")
    return OpSpec.model_validate(yaml.safe_load(text))


def evaluate(expression: str | int, values: dict[str, Any]) -> Any:
    """The value of an integer expression of an op.yaml: names, numbers, ``+ - * / %`` and comparisons.

    Raises:
        KeyError: a name is not in ``values``.
        ValueError: the expression holds anything else.
    """
    return _value(ast.parse(str(expression), mode="eval").body, values)


def _value(node: ast.expr, values: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() as number):
            return number
        case ast.Name(id=name):
            return values[name]
        case ast.BinOp(left=left, op=op, right=right):
            first, second = _value(left, values), _value(right, values)
            match op:
                case ast.Add():
                    return first + second
                case ast.Sub():
                    return first - second
                case ast.Mult():
                    return first * second
                case ast.Div():
                    return first // second
                case ast.Mod():
                    return first % second
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            first, second = _value(left, values), _value(right, values)
            match op:
                case ast.LtE():
                    return first <= second
                case ast.Lt():
                    return first < second
                case ast.Eq():
                    return first == second
    raise ValueError(f"{ast.unparse(node)!r} is not an expression of an op.yaml")
