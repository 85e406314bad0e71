"""Compiles for this machine's GPU, all at once, what tests/gpu/run.sh needs: ``python -P tests/gpu/build.py FOLDER``.

FOLDER/driver is the tests' program, FOLDER/libqwenforge_kernels.so the library that benchmarks load. With a second
argument, the folder of CUTLASS's headers, the library has the grouped GEMM.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qwenforge.bench.kernel_library import build
from support import simt
from support.plugin_library import cuda_folder


def main(arguments: Sequence[str]) -> int:
    """Compile; what the compiler says is the exception's text."""
    folder, *cutlass = map(Path, arguments)
    cuda = cuda_folder()
    if cuda is None:
        print("tests/gpu/build.py: error: there is no nvcc: put it on PATH", file=sys.stderr)
        return 1
    with ThreadPoolExecutor() as pool:
        driver = pool.submit(simt.driver)
        library = pool.submit(build, str(cuda / "bin" / "nvcc"), folder, *cutlass)
        link = folder / "driver"
        link.unlink(missing_ok=True)
        link.symlink_to(driver.result())
        print(library.result())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
