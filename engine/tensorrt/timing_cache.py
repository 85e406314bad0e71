"""Timings of kernels that TensorRT measured, kept from build to build for one device, version and driver."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import Any

from qwenforge.errors import UserError


def default_path(device: str, sm: int, version: str, driver: str | None) -> Path:
    """Where the timings of this device, TensorRT version and driver are kept (XDG_CACHE_HOME or ~/.cache)."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwenforge" / "timing"
    parts = (device, f"sm{sm}", version, f"driver-{driver or 'none'}")
    return folder / ("-".join(re.sub(r"[^\w.]", "_", part) for part in parts) + ".cache")


def attach(config: Any, path: Path | None) -> None:
    """Give the builder's ``config`` the timings in ``path``; an absent or unreadable cache is an empty one."""
    if path is None:
        return
    data = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(data) or config.create_timing_cache(b"")
    # A cache of another version or device is refused, not misused.
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def save(config: Any, path: Path | None) -> int:
    """Add the timings of ``config`` to those in ``path``, whatever another build wrote meanwhile; bytes written.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        return 0
    cache = config.get_timing_cache()
    if cache is None:
        return 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.is_file() and (others := config.create_timing_cache(path.read_bytes())) is not None:
                cache.combine(others, ignore_mismatch=False)
            data = bytes(memoryview(cache.serialize()))
            partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
            partial.write_bytes(data)
            os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"the timing cache {path} cannot be written ({error.strerror}): give another place with --timing-cache, or "
            "--timing-cache none."
        ) from error
    return len(data)
