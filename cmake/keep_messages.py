"""`keep_messages.py COMPILER ARGUMENT...` runs a compiler and keeps what it says beside its output, as OUTPUT.log.

Otherwise what ptxas says of a kernel's registers is printed once, among the steps of the build, and lost. The words of
a compiler that fails are printed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main(command: list[str]) -> int:
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if finished.returncode:
        sys.stderr.buffer.write(finished.stdout)
    elif "-o" in command:
        output = Path(command[command.index("-o") + 1])
        output.with_name(output.name + ".log").write_bytes(finished.stdout)
    return finished.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
