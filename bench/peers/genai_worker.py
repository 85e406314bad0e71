"""Runs in the peer's environment, of which only onnxruntime-genai and numpy are used: one model, measured on request.

The protocol is that of ``qwenforge.bench.worker``: JSON lines on standard input and output, the first names the model.
"""

import json
import os
import resource
import sys
import time
from typing import Any

import numpy as np


def steps(model: Any, prompt: list[int], new_tokens: int) -> list[float]:
    """Times from the start: then after each token is known, ``new_tokens + 1`` in all."""
    import onnxruntime_genai as og  # type: ignore[import-not-found]

    times = [time.perf_counter()]
    params = og.GeneratorParams(model)
    # An end token may not stop the run: the least length is the greatest.
    length = len(prompt) + new_tokens
    params.set_search_options(do_sample=False, max_length=length, min_length=length)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    for _ in range(new_tokens):
        generator.generate_next_token()
        times.append(time.perf_counter())
    return times


def main() -> None:
    """Serve runs until standard input ends."""
    import onnxruntime_genai as og

    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    setup = json.loads(sys.stdin.readline())
    model = og.Model(setup["arguments"]["model"])
    channel.write(json.dumps({"description": setup["subject"], "vocab_size": setup["arguments"]["vocab_size"]}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        generator = np.random.default_rng(request["seed"])
        shape = (request["batch"], request["prompt_tokens"])
        prompts = generator.integers(0, setup["arguments"]["vocab_size"], shape).tolist()
        times = steps(model, prompts[0], request["new_tokens"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        channel.write(json.dumps({"times": times, "peak_rss_bytes": peak}) + "\n")


if __name__ == "__main__":
    main()
