"""Which format a checkpoint is quantized in, by its configuration files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwenforge.errors import CheckpointError, UnsupportedError
from qwenforge.exporter.checkpoint_files import inside, read_json_object
from qwenforge.exporter.prequantized.awq import AWQ
from qwenforge.exporter.prequantized.compressed_tensors import CompressedTensors
from qwenforge.exporter.prequantized.format import Format
from qwenforge.exporter.prequantized.fp8 import ModelOpt, PlainFP8
from qwenforge.exporter.prequantized.gptq import GPTQ

FIELD = "quantization_config"
MODELOPT_FILE = "hf_quant_config.json"

FORMATS: Mapping[str, Callable[[Mapping[str, Any], str], Format]] = {
    "gptq": GPTQ,
    "awq": AWQ,
    "compressed-tensors": CompressedTensors,
    "modelopt": ModelOpt,
    "fp8": PlainFP8,
}
"""By ``quant_method``."""


def read_format(folder: Path, values: Mapping[str, Any]) -> Format | None:
    """The format of the checkpoint in ``folder`` with the config.json ``values``; None when it is not quantized.

    Raises:
        CheckpointError: the configuration is damaged.
        UnsupportedError: it names a method, version or number format that is not supported; the message says which are.
    """
    config = values.get(FIELD)
    where = f"{folder / 'config.json'}: {FIELD}"
    if config is None or config == {}:
        if not (folder / MODELOPT_FILE).exists():
            return None
        file = inside(folder, MODELOPT_FILE, named_by=str(folder))
        return ModelOpt(read_json_object(file), str(folder / MODELOPT_FILE))
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where} must be an object, not {config!r}; correct the file")
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        raise UnsupportedError(
            f"{where}: 'quant_method' is {method!r}; supported: {', '.join(FORMATS)}; or export the unquantized "
            "checkpoint"
        )
    return FORMATS[method](config, where)
