"""torch's CUDA without a GPU: tensors stay on the CPU, streams and graphs do nothing, a call takes a millisecond."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from qwenforge.bench.gpu_clock import Machine


class Event:
    """The next event is a millisecond later."""

    now = 0.0

    def record(self) -> None:
        Event.now += 1.0
        self.at = Event.now

    def synchronize(self) -> None:
        """Everything has happened."""

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


class StandIn:
    """torch, whose ``device="cuda"`` is the CPU."""

    def __init__(self, capture: Callable[[Any], Any] = contextlib.nullcontext, free: int = 1 << 30) -> None:
        stream = SimpleNamespace(wait_stream=lambda _: None)
        self.cuda = SimpleNamespace(
            Event=lambda enable_timing: Event(),
            Stream=lambda: stream,
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
            current_stream=lambda: stream,
            set_stream=lambda _: None,
            stream=contextlib.nullcontext,
            graph=capture,
            synchronize=lambda: None,
            empty_cache=lambda: None,
            mem_get_info=lambda: (free, free),
        )

    @staticmethod
    def Generator(device: str) -> torch.Generator:
        return torch.Generator()

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if not inspect.isbuiltin(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            options.pop("device", None)
            return found(*arguments, **options)

        return call


def machine(stand_in: StandIn) -> Machine:
    """A GPU of 4 TB/s and 800 TFLOP/s, on which everything takes a millisecond."""
    made = Machine.__new__(Machine)
    made.torch, made.rounds, made.sm = stand_in, 3, 90
    made.bandwidth, made.rate, made.name = 4e12, 8e14, "stand-in"
    made._flush = torch.empty(8)
    return made
