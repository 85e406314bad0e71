"""The recipes of ``--quantize`` by name, and which of them a device can use.

What a recipe does is in :mod:`qwenforge.calibration.recipes`; what it would cost on a device, in
:mod:`qwenforge.engine.planning.recipes`, where recipes of one size are one. Both go by these names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from qwenforge.devices import Device
from qwenforge.errors import UnsupportedError

RECIPE_PRECISIONS: Mapping[str, str] = MappingProxyType(
    {
        "fp8": "fp8",
        "int8-w8a8": "int8",
        "int8-weight-only": "int8",
        "int4-weight-only": "int4",
    }
)
"""The precision of the weights by recipe, from the most exact to the smallest."""


def offered(device: Device) -> tuple[str, ...]:
    """The recipes that ``device`` can use, from the most exact to the smallest."""
    return tuple(name for name, precision in RECIPE_PRECISIONS.items() if precision in device.precisions)


def require_recipe(device: Device, recipe: str, precisions: Iterable[str] = ()) -> None:
    """Refuse a recipe that ``device`` cannot use.

    Args:
        device: the one that the engine is for.
        recipe: a recipe's name, also one of a user's own.
        precisions: number formats that it uses besides those its name stands for, such as a cache's.

    Raises:
        UnsupportedError: the message names the recipes that the device can use.
    """
    needed = [RECIPE_PRECISIONS[recipe]] if recipe in RECIPE_PRECISIONS else []
    for precision in (*needed, *precisions):
        if precision in device.precisions:
            continue
        why = f"has no {precision.upper()} arithmetic"
        if precision == "fp8":
            why += ", which starts with SM 89 (Ada, Hopper) and on Jetson with Thor"
        raise UnsupportedError(
            f"recipe {recipe} needs {precision.upper()}, and {device.name} (SM {device.sm}) {why}; choose one of "
            f"{', '.join(offered(device))}."
        )
