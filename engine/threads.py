"""How many threads PyTorch computes with, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """One thread inside, what was set before afterwards.

    Small matrices shared among threads take longer, on a busy machine a hundred times longer, to wait than to compute.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
