"""Run by the stand-in's Python: the runtime's session on the device, a few steps (see ``__init__.py``)."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np

from qwenforge import ort_cuda_choice
from qwenforge.engine.tensorrt.gpu import LocalGpu
from qwenforge.runtime import backends
from qwenforge.runtime.session import GraphSession


def main(model: str, vocabulary: str, capture: str) -> None:
    attention: ort_cuda_choice.Operator = "plugin" if int(capture) else "native"
    record = ort_cuda_choice.choose(attention=attention).record(routed=False)
    gpu, no_library = LocalGpu("the stand-in", 90, 1 << 36, "13.0"), SimpleNamespace(path=None)
    with mock.patch.multiple(backends, local_gpu=lambda: gpu, find_ort_library=lambda _: no_library):
        backend = backends.cuda_backend(record)
    session = GraphSession(model, backend=backend, vocabulary_size=int(vocabulary))
    for _ in range(2):
        cache = session.new_cache(2, 64)
        prompt = session.bind(cache, first_row=0, batch=2, new_tokens=5, logits_count=1)
        prompt.advance_positions(np.zeros(2, np.int64))
        prompt.run()
        for batch, count in ((2, 4), (1, 3)):
            step = session.bind(cache, first_row=0, batch=batch, new_tokens=1, logits_count=1)
            for position in range(5, 5 + count):
                step.advance_positions(np.full(batch, position))
                assert step.run().shape == (batch, 1, int(vocabulary))
            cache.copy_row(1, 0, 5)
        session.release_cache(cache)


main(*sys.argv[1:])
