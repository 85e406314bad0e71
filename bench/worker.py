"""A process that holds one subject and measures it on request, over JSON lines on standard input and output.

Started by :mod:`qwenforge.bench.latency` as ``python -m qwenforge.bench.worker``; the first line names the subject
and its arguments, every further line asks for one run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from qwenforge.machine import high_water_mark


def main() -> int:
    """Serve runs until standard input ends."""
    # Whatever a library prints must not come between our lines: they go to a private copy of stdout.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(value: dict[str, Any]) -> None:
        channel.write(json.dumps(value) + "\n")

    from qwenforge.bench.subjects import SUBJECTS
    from qwenforge.errors import UserError

    setup = json.loads(sys.stdin.readline())
    arguments = {
        name: Path(value) if name in ("bundle", "checkpoint") else value for name, value in setup["arguments"].items()
    }
    try:
        subject = SUBJECTS[setup["subject"]](**arguments)
        answer({"description": subject.description, "vocab_size": subject.vocab_size})
        for line in sys.stdin:
            request = json.loads(line)
            generator = np.random.default_rng(request["seed"])
            shape = (request["batch"], request["prompt_tokens"])
            prompts = generator.integers(0, subject.vocab_size, shape).tolist()
            answer({"times": subject.steps(prompts, request["new_tokens"]), "peak_rss_bytes": peak_rss_bytes()})
    except UserError as error:
        answer({"error": str(error)})
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("qwenforge"):
            raise
        answer({"error": f"measuring {setup['subject']} needs {error.name}, which is not installed: install it here."})
        return 1
    return 0


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = high_water_mark("self")
    if peak is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main())
