"""Replacing a folder in one step, so that whoever looks finds the old one whole or the new one whole.

The new contents are written into a hidden sibling, ``.NAME.partial-PID-TOKEN``, which its writer keeps locked (flock).
Swapping uses Linux's ``renameat2(RENAME_EXCHANGE)``; where the system or the filesystem lacks it the old folder is
renamed aside to ``.NAME.old-PID-TOKEN`` first, and the next writer puts it back should the process die in between.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class LockedFolder:
    """A new hidden sibling of ``target``, locked until :meth:`unlock`, so that others can tell it from a dead one.

    Raises OSError when the folder cannot be made.
    """

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
        self.path.mkdir()
        self._lock = _try_lock(self.path)

    def unlock(self) -> None:
        """Release the lock; idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def sync_tree(folder: Path) -> None:
    """Flush every file and folder under ``folder`` to the disk (fsync), files before the folders that name them."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(os.path.join(root, name))
        _sync(root)


def replace_folder(new: Path, target: Path) -> Path | None:
    """Make ``new`` appear as ``target``; both lie in one parent folder.

    Returns the folder, under a hidden name, that now holds what ``target`` held and is the caller's to delete; None
    when there was nothing. Raises OSError when the swap is impossible; then ``target`` is as before.
    """
    leftover: Path | None = None
    if not target.exists() or not any(target.iterdir()):
        os.rename(new, target)  # refuses, by itself, a target that has filled up since
    elif _exchange(new, target):
        leftover = new
    else:
        leftover = target.with_name(f".{target.name}.old-{os.getpid()}-{secrets.token_hex(4)}")
        os.rename(target, leftover)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(leftover, target)
            raise
    _sync(target.parent)
    return leftover


def clean_up_after_dead_writers(target: Path) -> None:
    """Undo what killed writers of ``target`` left: restore a folder renamed aside, delete partial ones.

    A sibling counts as dead when its process is gone and nobody holds its lock.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(partial|old)-(\d+)-[0-9a-f]{{8}}")
    if not target.parent.is_dir():
        return
    for sibling in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(sibling.name)
        if match is None or sibling.is_symlink() or not sibling.is_dir() or _is_alive(int(match[2])):
            continue
        lock = _try_lock(sibling)
        if lock is None:
            continue
        try:
            if match[1] == "old" and not target.exists():
                os.rename(sibling, target)
            else:
                shutil.rmtree(sibling)
        finally:
            os.close(lock)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically; False where that is not available."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library older than the call
        return False
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _try_lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, or None when another process holds it."""
    import fcntl  # POSIX only: bundles are written there, but read anywhere

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
