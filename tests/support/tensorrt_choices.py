"""The TensorRT lowerings that tests go through, by a short name."""

from __future__ import annotations

from qwenforge.tensorrt_choice import TensorRTChoice, choose

LOWERINGS = ("native", "plugin", "opset 20", "native experts", "rtx")


def lowering(name: str) -> TensorRTChoice:
    """The choice called ``name``, one of :data:`LOWERINGS`."""
    found = {
        "native": lambda: choose("tensorrt", device="h200", version="11.4"),
        "plugin": lambda: choose("tensorrt", device="h200", version="11.4", attention="plugin"),
        "opset 20": lambda: choose("tensorrt", device="jetson-orin-nano", version="10.3"),
        "native experts": lambda: choose("tensorrt", device="b200", experts="native"),
        "rtx": lambda: choose("tensorrt-rtx"),
    }[name]()
    assert found is not None
    return found
