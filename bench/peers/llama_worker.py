"""Runs in the peer's environment, of which only llama-cpp-python and numpy are used: one model, measured on request.

The protocol is that of ``qwenforge.bench.worker``. llama.cpp's own C functions are called, since the Python class over
them copies logits and does bookkeeping that llama.cpp's programs do not.
"""

import ctypes
import json
import os
import resource
import sys
import time
from typing import Any

import numpy as np

CONTEXT = 2048
"""Tokens of the cache, as many as a qwenforge bundle of the comparison allows."""


_ERROR = 4  # ggml_log_level in ggml.h


class Engine:
    """A loaded model with one context."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self._library = llama_cpp
        self._log = llama_cpp.llama_log_callback(_tell_errors)  # kept alive as long as the library may call it
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, 512, 512
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def steps(self, prompt: list[int], new_tokens: int) -> list[float]:
        """Times from the start: then after each token is known, ``new_tokens + 1`` in all."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        times = [time.perf_counter()]
        tokens = prompt
        for _ in range(new_tokens):
            tokens = [self._next(tokens)]
            times.append(time.perf_counter())
        return times

    def _next(self, tokens: list[int]) -> int:
        """The likeliest token behind ``tokens``, which join the cache."""
        data = (self._library.llama_token * len(tokens))(*tokens)
        if self._library.llama_decode(self._context, self._library.llama_batch_get_one(data, len(tokens))):
            raise SystemExit("llama.cpp cannot decode")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(pointer, (self._vocabulary,)).argmax())


def _tell_errors(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    """Serve runs until standard input ends."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    setup: dict[str, Any] = json.loads(sys.stdin.readline())
    arguments = setup["arguments"]
    engine = Engine(arguments["model"], arguments["threads"])
    channel.write(json.dumps({"description": setup["subject"], "vocab_size": arguments["vocab_size"]}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        generator = np.random.default_rng(request["seed"])
        shape = (request["batch"], request["prompt_tokens"])
        prompts = generator.integers(0, arguments["vocab_size"], shape).tolist()
        times = engine.steps(prompts[0], request["new_tokens"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        channel.write(json.dumps({"times": times, "peak_rss_bytes": peak}) + "\n")


if __name__ == "__main__":
    main()
