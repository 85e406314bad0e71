"""Runs in the peer's environment: one GGUF model's logits at every position of some text."""

import ctypes
import json
import sys
from typing import Any

import numpy as np

_ERROR = 4  # ggml_log_level in ggml.h
_TYPE_FLOAT32 = 0  # ggml_type in ggml.h
_FLASH_ATTENTION_OFF = 0  # llama_flash_attn_type in llama.h


def main() -> None:
    """Read one request, a JSON object, from standard input and write the file that it names."""
    import llama_cpp  # type: ignore[import-not-found]

    request = json.load(sys.stdin)
    windows = np.load(request["windows"])
    log = llama_cpp.llama_log_callback(_tell_errors)  # kept alive as long as the library may call it
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(request["model"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {request['model']}")
    length = windows.shape[1]
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = length
    # The weights are on trial, not the cache or the kernel of attention.
    params.type_k = params.type_v = _TYPE_FLOAT32
    params.flash_attn_type = _FLASH_ATTENTION_OFF
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("llama.cpp cannot make a context")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    np.save(request["logits"], np.stack([_logits(llama_cpp, context, window, vocabulary) for window in windows]))


def _logits(llama_cpp: Any, context: Any, window: np.ndarray[Any, Any], vocabulary: int) -> np.ndarray[Any, Any]:
    """[S, V] float32 of one window [S]."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(len(window), 0, 1)
    batch.n_tokens = len(window)
    for place, token in enumerate(window.tolist()):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place] = 1
        batch.seq_id[place][0] = 0
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("llama.cpp cannot decode")
    pointer = ctypes.cast(llama_cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    found: np.ndarray[Any, Any] = np.ctypeslib.as_array(pointer, (len(window), vocabulary)).copy()
    llama_cpp.llama_batch_free(batch)
    return found


def _tell_errors(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR:
        sys.stderr.write(text.decode(errors="replace"))


if __name__ == "__main__":
    main()
