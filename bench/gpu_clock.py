"""The GPU under measurement: its ceilings today, and the times of calls that take turns.

Calls are replayed as CUDA graphs with a cold L2; medians with the 10th and 90th percentile, in microseconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Time:
    """Microseconds: median, 10th and 90th percentile."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(times: Sequence[float]) -> Time:
        """Of single measurements."""
        ordered = sorted(times)
        return Time(statistics.median(ordered), ordered[len(ordered) // 10], ordered[len(ordered) * 9 // 10])


class Machine:
    """The GPU: its name, and its copy bandwidth (bytes a second) and bf16 matrix rate (operations a second) today."""

    def __init__(self, torch: Any, rounds: int) -> None:
        self.torch, self.rounds = torch, rounds
        self.name = torch.cuda.get_device_name()
        major, minor = torch.cuda.get_device_capability()
        self.sm = 10 * major + minor
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        data = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda")
        copied = self.times({"copy": self.replayable(lambda: data[0].copy_(data[1]))})["copy"]
        self.bandwidth = data.numel() / (copied.median * 1e-6)
        square = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
        product = torch.empty_like(square)
        multiply = self.replayable(lambda: torch.matmul(square, square, out=product))
        multiplied = self.times({"matmul": multiply})["matmul"]
        self.rate = 2 * 8192**3 / (multiplied.median * 1e-6)

    def free_bytes(self) -> int:
        """GPU memory that torch could still have."""
        return int(self.torch.cuda.mem_get_info()[0])

    def times(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, Time]:
        """Every call's time, taken in turns, L2 flushed before each."""
        measured: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.rounds):
            for name, call in calls.items():
                self._flush.zero_()
                start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                measured[name].append(start.elapsed_time(end) * 1e3)
        return {name: Time.of(times) for name, times in measured.items()}

    def replayable(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as a CUDA graph, made after two calls that warm it up.

        Raises:
            RuntimeError: it does something that cannot be captured, or says so by an attribute ``graph`` that is False.
        """
        torch = self.torch
        if not getattr(call, "graph", True):
            raise RuntimeError("it waits for the device")
        before = torch.cuda.current_stream()
        stream = torch.cuda.Stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            torch.cuda.set_stream(before)  # torch stays on the stream of a capture that failed
            raise
        return graph.replay  # type: ignore[no-any-return]


@dataclass
class Contenders:
    """Calls that can be timed: captured ones, those that cannot be captured, and why others do not take part.

    Attributes:
        ready: by name, what is to be timed.
        not_replayed: why a peer is called and not replayed.
        left_out: why one cannot run.
    """

    ready: dict[str, Callable[[], Any]] = field(default_factory=dict)
    not_replayed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def capture(self, machine: Machine, calls: Mapping[str, Callable[[], Any]], ours: Collection[str]) -> None:
        """Make ``calls`` ready. A peer that cannot be captured is called; one of ``ours`` is left out."""
        for name, call in calls.items():
            try:
                self.ready[name] = machine.replayable(call)
            except RuntimeError as error:
                if name in ours:
                    self.left_out[name] = f"cannot be captured in a CUDA graph: {error}"[:300]
                else:
                    self.ready[name], self.not_replayed[name] = call, str(error)[:300]
