"""The training loop: windows that begin where a document begins, AdamW, a cosine schedule."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

WINDOW = 256  # tokens
WARMUP_STEPS = 100
FINAL_LEARNING_RATE = 0.02  # as a share of the peak
REPORT_EVERY = 25  # steps


def batches(documents: Sequence[list[int]], batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless int64 ``[batch_size, WINDOW]`` batches of ``documents``, reshuffled each time round.

    A window is filled with pieces of at most ``WINDOW`` tokens, each from the next document, and cut when it is full:
    it always begins at the first token of a piece, as a prompt does.
    """
    generator = random.Random(seed)
    pieces = [ids[start : start + WINDOW] for ids in documents for start in range(0, len(ids), WINDOW)]
    batch: list[list[int]] = []
    window: list[int] = []
    while True:
        generator.shuffle(pieces)
        for piece in pieces:
            window += piece
            if len(window) >= WINDOW:
                batch.append(window[:WINDOW])
                window = []
            if len(batch) == batch_size:
                yield torch.tensor(batch)
                batch = []


def train(
    model: PreTrainedModel, documents: Sequence[list[int]], *, steps: int, batch_size: int, peak: float, seed: int
) -> float:
    """Train ``model`` in place, printing progress; returns the mean loss of the last steps reported."""
    optimizer = torch.optim.AdamW(_groups(model), lr=peak, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, steps))
    stream = batches(documents, batch_size, seed)
    model.train()
    started = time.monotonic()
    total = 0.0
    mean = math.nan
    counted = 0
    for step in range(1, steps + 1):
        tokens = next(stream)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False, **_router_loss(model)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += loss.item()
        counted += 1
        if step % REPORT_EVERY == 0 or step == steps:
            mean = total / counted
            total, counted = 0.0, 0
            elapsed = time.monotonic() - started
            rate = step * tokens.numel() / elapsed
            left = elapsed / step * (steps - step)
            print(f"step {step}/{steps}  loss {mean:.3f}  {rate:,.0f} tokens/s  {left:.0f} s left", flush=True)
    model.eval()
    return mean


def _groups(model: PreTrainedModel) -> list[dict[str, object]]:
    """Weight decay for matrices; none for norms and biases, which it would pull off their meaning."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def _router_loss(model: PreTrainedModel) -> dict[str, bool]:
    """Ask a mixture of experts to add the load-balancing loss that keeps all of its experts in use."""
    return {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}


def _learning_rate(step: int, steps: int) -> float:
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
