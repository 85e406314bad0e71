"""The published formats by name, for tests that run over all of them."""

from __future__ import annotations

from collections.abc import Callable

from support.prequantized_checkpoints import Style, awq, compressed_tensors, gptq, modelopt, plain_fp8

_STATIC_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
_TOKEN_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
_TOKEN_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_STATIC_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


def _float8(strategy: str) -> dict[str, object]:
    block = {"block_structure": [128, 128]} if strategy == "block" else {}
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False} | block


def _integer(bits: int, strategy: str, group_size: int | None = None, *, symmetric: bool = True) -> dict[str, object]:
    size = {"group_size": group_size} if group_size else {}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False} | size


STYLES: dict[str, Callable[[], Style]] = {
    "gptq-int4-group128": lambda: gptq(bits=4, group_size=128),
    "gptq-int4-group64": lambda: gptq(bits=4, group_size=64),
    "gptq-int4-group32-v2": lambda: gptq(bits=4, group_size=32, version="gptq_v2"),
    "gptq-int4-asymmetric": lambda: gptq(bits=4, group_size=64, symmetric=False),
    "gptq-int4-asymmetric-v2": lambda: gptq(bits=4, group_size=64, symmetric=False, version="gptq_v2"),
    "gptq-int4-whole-row": lambda: gptq(bits=4, group_size=-1),
    "gptq-int8-group128": lambda: gptq(bits=8, group_size=128),
    "gptq-int8-asymmetric": lambda: gptq(bits=8, group_size=128, symmetric=False),
    "gptq-int8-whole-row": lambda: gptq(bits=8, group_size=-1),
    "awq-group128": lambda: awq(group_size=128),
    "awq-group32": lambda: awq(group_size=32),
    "compressed-fp8-channel-dynamic": lambda: compressed_tensors("float-quantized", _float8("channel"), _TOKEN_FP8),
    "compressed-fp8-tensor-static": lambda: compressed_tensors(
        "float-quantized", _float8("tensor"), _STATIC_FP8, cache=_STATIC_FP8
    ),
    "compressed-fp8-block": lambda: compressed_tensors("float-quantized", _float8("block"), _TOKEN_FP8),
    "compressed-w4a16-group128": lambda: compressed_tensors("pack-quantized", _integer(4, "group", 128)),
    "compressed-w4a16-asymmetric": lambda: compressed_tensors(
        "pack-quantized", _integer(4, "group", 32, symmetric=False)
    ),
    "compressed-w8a16-channel": lambda: compressed_tensors("pack-quantized", _integer(8, "channel")),
    "compressed-w8a8-dynamic": lambda: compressed_tensors("int-quantized", _integer(8, "channel"), _TOKEN_INT8),
    "compressed-w8a8-static": lambda: compressed_tensors("int-quantized", _integer(8, "channel"), _STATIC_INT8),
    "modelopt-fp8": lambda: modelopt(),
    "modelopt-fp8-file-only": lambda: modelopt(only_file=True, cache=False),
    "modelopt-fp8-per-channel": lambda: modelopt(per_channel=True, cache=False),
    "plain-fp8-static": lambda: plain_fp8(),
    "plain-fp8-block": lambda: plain_fp8(block=True),
}
