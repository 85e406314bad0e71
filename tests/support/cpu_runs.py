"""Models of one node of our CPU ops in real ONNX Runtime, many in one process, with each instruction set."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

from qwenforge import names
from qwenforge.engine.cpu_library import INSTRUCTION_SET_VARIABLE
from support.source_tree import ROOT

Array = npt.NDArray[Any]

INSTRUCTION_SETS = {"avx512-vnni": "avx512", "avx2": "avx2", "baseline": "baseline"}
"""What the environment asks for, by the name that the library gives; best first."""

NAME = "layer 3"
"""Of every node."""


@dataclass(frozen=True)
class Job:
    """A model of one node with outputs ``result`` and, where it is wanted, ``sum``; run with each count of threads."""

    model: bytes
    feeds: Mapping[str, Array]
    threads: tuple[int, ...] = (2,)


@dataclass(frozen=True)
class Answer:
    """The outputs of two runs with each count of threads."""

    runs: tuple[list[Array], ...]

    @property
    def outputs(self) -> list[Array]:
        """Of the first run; every other one has to have the same bits."""
        for outputs in self.runs[1:]:
            assert [each.tobytes() for each in outputs] == [each.tobytes() for each in self.runs[0]]
        return self.runs[0]


def node_model(
    op_type: str,
    inputs: Sequence[tuple[str, Array | None]],
    attributes: Mapping[str, Any],
    *,
    fed: Mapping[str, Array],
    wants_sum: bool = False,
) -> bytes:
    """One node of our domain named :data:`NAME`. ``inputs`` are in the op's order; None is left out.

    Those in ``fed`` are inputs of the graph, with no fixed shape; the others are initializers.
    """
    given = [name if value is not None or name in fed else "" for name, value in inputs]
    while not given[-1]:
        given.pop()
    outputs = ["result", "sum"] if wants_sum else ["result"]
    node = helper.make_node(op_type, given, outputs, name=NAME, domain=names.CPU_DOMAIN, **attributes)
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
        for name, value in fed.items()
    ]
    kept = [
        numpy_helper.from_array(np.ascontiguousarray(value), name)
        for name, value in inputs
        if value is not None and name not in fed
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph([node], "one", infos, results, kept)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(names.CPU_DOMAIN, 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


def cpu_session(library: Path, model: bytes, threads: int) -> Any:
    """An ``onnxruntime.InferenceSession`` with our ops."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def answer(library: Path, job: Job) -> Answer:
    """``job``, with this process's instruction set."""
    runs: list[list[Array]] = []
    for threads in job.threads:
        session = cpu_session(library, job.model, threads)
        runs += [session.run(None, dict(job.feeds)) for _ in range(2)]
    return Answer(tuple(runs))


def answers_by(library: Path, instruction_set: str, jobs: Mapping[str, Job]) -> dict[str, Answer]:
    """All of ``jobs`` in one process that asks for ``instruction_set``, a value of :data:`INSTRUCTION_SETS`."""
    environment = {**os.environ, INSTRUCTION_SET_VARIABLE: instruction_set, "PYTHONPATH": str(ROOT / "tests")}
    finished = subprocess.run(
        [sys.executable, "-c", "from support import cpu_runs; cpu_runs.main()", str(library)],
        input=pickle.dumps(dict(jobs)),
        capture_output=True,
        env=environment,
        check=False,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr.decode()
    found: dict[str, Answer] = pickle.loads(finished.stdout)
    return found


def supported_sets(best: str) -> list[str]:
    """The values of :data:`INSTRUCTION_SETS` from ``best``, a name that the library gives, downwards."""
    listed = list(INSTRUCTION_SETS)
    return [INSTRUCTION_SETS[name] for name in listed[listed.index(best) :]]


def main() -> None:
    """The other end of :func:`answers_by`."""
    library, jobs = Path(sys.argv[1]), pickle.load(sys.stdin.buffer)
    pickle.dump({name: answer(library, job) for name, job in jobs.items()}, sys.stdout.buffer)
