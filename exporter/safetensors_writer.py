"""Writing a ``.safetensors`` file of weight plans, streamed and hashed: no tensor is ever whole in memory.

The safetensors library writes tensors that are in memory; a weight of a large model need not fit there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from qwenforge.errors import UserError
from qwenforge.exporter.data_writer import Progress
from qwenforge.exporter.external_data import WrittenFile
from qwenforge.exporter.weights import chunks, dims

_NAMES = {ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16", ir.DataType.BFLOAT16: "BF16", ir.DataType.INT8: "I8"}
_ALIGNMENT = 4096
"""Of the first tensor, so that the file can be mapped and read in whole pages."""


def write_safetensors(
    path: Path, tensors: Mapping[str, ir.TensorProtocol], *, progress: Progress | None = None
) -> WrittenFile:
    """Write ``tensors`` to ``path`` in the given order.

    Raises:
        UserError: the file cannot be written, or a tensor's source cannot be read.
    """
    header: dict[str, object] = {}
    total = 0
    for name, tensor in tensors.items():
        end = total + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(dims(tensor)), "data_offsets": [total, end]}
        total = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    hashed = hashlib.sha256()
    done = 0
    try:
        with path.open("xb") as file:
            for piece in (len(text).to_bytes(8, "little"), text):
                file.write(piece)
                hashed.update(piece)
            for name, tensor in tensors.items():
                for chunk in chunks(tensor):
                    file.write(chunk)
                    hashed.update(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, total, name)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    if done != total:
        raise AssertionError(f"{path}: {done} bytes written for {total}")
    return WrittenFile(path, 8 + len(text) + total, hashed.hexdigest())
