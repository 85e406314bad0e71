"""Builds a bundle's engine through the product's own function, telling each step: ``build_bundle.py BUNDLE [JSON]``.

JSON: {"gpu": [name, sm, memory, driver], "options": {...}, "sizes": {...}}. A GPU is invented where the test is of the
target ``tensorrt``, which builds on one only; behind the stand-in the engine is TensorRT for RTX's all the same.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from qwenforge.engine.tensorrt.build import build_engine
from qwenforge.engine.tensorrt.gpu import LocalGpu
from qwenforge.engine.tensorrt.options import BuildOptions
from qwenforge.engine.tensorrt.profiles import Sizes


def main(bundle: Path, wishes: dict) -> None:
    options = dict(wishes.get("options", {}))
    if "timing_cache" in options:
        options["timing_cache"] = Path(options["timing_cache"])
    gpu = LocalGpu(*wishes["gpu"]) if "gpu" in wishes else None
    last = ""

    def tell(what: str, done: float) -> None:
        nonlocal last
        if what != last:
            print("step", what, flush=True)
        last = what

    signal.signal(signal.SIGINT, signal.default_int_handler)
    chosen = BuildOptions(sizes=Sizes(**wishes.get("sizes", {})), **options)
    report = build_engine(bundle, chosen, gpu=lambda: gpu, progress=tell)
    print(json.dumps({"built": report.built, "engine": report.record.model_dump(mode="json")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
