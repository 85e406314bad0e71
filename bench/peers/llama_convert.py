"""Runs in the peer's environment: a Qwen2 or Qwen2-MoE checkpoint to GGUF, then to a format of llama.cpp's own.

``python llama_convert.py CHECKPOINT OUTPUT.gguf f16|q8_0|q4_0|q4_k_m [keep-vocabulary]``. The names are those of
llama.cpp's converter; the file has no tokenizer, since the measurement gives token ids. Experts are stacked, as that
converter does. The last word leaves the embedding and the vocabulary projection in float16.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_STORED = {"F32": np.float32, "F16": np.float16}
_FTYPES = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15}  # llama_ftype in llama.h
_TYPE_FLOAT16 = 1  # ggml_type in ggml.h
_FLOAT16 = 1


def main() -> None:
    """Convert as the command line says."""
    checkpoint, output, number_format = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    config = json.loads((checkpoint / "config.json").read_text())
    plain = output.with_name("f16.gguf")
    if not plain.is_file():
        partial = plain.with_suffix(".partial")
        _write(config, checkpoint, partial)
        os.replace(partial, plain)
    if number_format != "f16":
        _quantize(plain, output, _FTYPES[number_format], keep_vocabulary=sys.argv[4:] == ["keep-vocabulary"])


def _write(config: dict[str, Any], checkpoint: Path, output: Path) -> None:
    import gguf  # type: ignore[import-not-found]

    sparse = "num_experts" in config
    architecture = gguf.MODEL_ARCH.QWEN2MOE if sparse else gguf.MODEL_ARCH.QWEN2
    layers = config["num_hidden_layers"]
    writer = gguf.GGUFWriter(output, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config.get("rope_parameters", config)["rope_theta"])  # by transformers 5, before it
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(_FLOAT16)
    if sparse:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    names = gguf.get_tensor_name_map(architecture, layers)
    for name, tensor in _merged(_tensors(checkpoint), config):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise SystemExit(f"{name} has no name in llama.cpp")
        # Matrices in float16 and vectors in float32, the router among the vectors' precision, as its converter has it.
        wide = tensor.ndim == 1 or "ffn_gate_inp" in found
        writer.add_tensor(found, tensor.astype(np.float32 if wide else np.float16).squeeze())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Name and values of every tensor of a checkpoint's safetensors files, mapped."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        mapped = np.memmap(path, np.uint8, "r")
        length = int(mapped[:8].view(np.uint64)[0])
        for name, entry in json.loads(mapped[8 : 8 + length].tobytes()).items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                yield name, _values(mapped[start:end], entry["dtype"]).reshape(entry["shape"])


def _values(stored: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """Bytes as numbers, bfloat16 as float32: it is the upper half of one."""
    if dtype == "BF16":
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return stored.view(_STORED[dtype])


def _merged(
    tensors: Iterator[tuple[str, np.ndarray[Any, Any]]], config: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """The same, each layer's experts of one kind in one tensor [E, N, K]."""
    experts: dict[tuple[str, str], dict[int, np.ndarray[Any, Any]]] = {}
    for name, tensor in tensors:
        layer, found, rest = name.partition(".mlp.experts.")
        if not found:
            yield name, tensor
            continue
        number, kind, _ = rest.split(".")
        part = experts.setdefault((layer, kind), {})
        part[int(number)] = tensor
        if len(part) == config["num_experts"]:
            matrices = experts.pop((layer, kind))
            yield f"{layer}.mlp.experts.{kind}.weight", np.stack([matrices[each] for each in range(len(matrices))])


def _quantize(source: Path, output: Path, ftype: int, *, keep_vocabulary: bool) -> None:
    import llama_cpp  # type: ignore[import-not-found]

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    if keep_vocabulary:
        params.quantize_output_tensor, params.token_embedding_type = False, _TYPE_FLOAT16
    partial = output.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), params):
        raise SystemExit(f"llama.cpp cannot quantize {source}")
    os.replace(partial, output)


if __name__ == "__main__":
    main()
