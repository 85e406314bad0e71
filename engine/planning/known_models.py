"""Configurations of the official models, so that a plan needs no download, and of any checkpoint folder."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from qwenforge.errors import UserError
from qwenforge.exporter.config import ModelConfig
from qwenforge.exporter.prequantized.format import Format
from qwenforge.exporter.prequantized.read import read_format

CONFIGS = Path(__file__).parent / "configs"
"""Folder of the configurations that ship with the package."""
KNOWN_MODELS = tuple(sorted(path.stem for path in CONFIGS.glob("*.json")))
"""Names of the configurations that ship with the package."""


def model_config(checkpoint: str) -> tuple[str, ModelConfig]:
    """Name and configuration of a known model, or of the checkpoint in a folder.

    Raises:
        UserError: it is neither.
        CheckpointError: the folder's config.json is damaged.
        UnsupportedError: it asks for an architecture that is not supported.
    """
    known = checkpoint.lower()
    if known in KNOWN_MODELS:
        text = (CONFIGS / f"{known}.json").read_text(encoding="utf-8")
        return known, ModelConfig.parse(json.loads(text), where=f"{known}'s config.json")
    folder = Path(checkpoint)
    if not folder.is_dir():
        near = difflib.get_close_matches(known, KNOWN_MODELS, n=1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"{checkpoint} is neither a checkpoint folder nor a known model{guess}; known are "
            f"{', '.join(KNOWN_MODELS)}."
        )
    return folder.resolve().name, ModelConfig.read(folder / "config.json")


def stored_format(checkpoint: str, config: ModelConfig) -> Format | None:
    """How the weights of what :func:`model_config` read are quantized; None for floating-point weights.

    Raises:
        CheckpointError: the folder's description of it is damaged.
        UnsupportedError: it is a format that is not supported.
    """
    if checkpoint.lower() in KNOWN_MODELS:
        return None
    return read_format(Path(checkpoint), config.source)
