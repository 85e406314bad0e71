"""torch's attention, for ``bench/kernels.py`` to compare with: FlashAttention, cuDNN, memory-efficient.

Peers get the best case: queries turned beforehand, keys and values appended beforehand, a cache that is exactly as long
as the row, no mask where none is needed. Ours turn, append and attend. A peer that cannot run is a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwenforge.bench.attention_layers import AttentionCall, Cache, Heads, Work
from qwenforge.bench.attention_reference import turned

Peer = Callable[[], Any] | str
BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
"""torch.nn.attention.SDPBackend by our names."""


def peers(torch: Any, heads: Heads, cache: Cache, work: Work, call: AttentionCall) -> dict[str, Peer]:
    """Every peer by name: a call that gives [B, Hq, S, D], or the reason why it cannot run.

    ``torch flash`` and so on have ``enable_gqa``. A token that is alone in its row sees every key, so that the group's
    heads can also be queries of one head, in the ``folded`` peers: the way to read a cache once that every backend has.
    """
    if cache.page_size or cache.cache_type != "float":
        why = "torch's scaled_dot_product_attention has neither pages nor caches of 8 bits"
        return {f"torch {name}": why for name in BACKENDS}
    query = turned(call, call.query, heads.heads).to(call.query.dtype).transpose(1, 2)
    found: dict[str, Peer] = {}
    for name, backend in BACKENDS.items():
        found[f"torch {name}"] = _attention(torch, backend, heads, work, call, query)
        if work.new == 1:
            found[f"torch {name} folded"] = _folded(torch, backend, heads, call, query)
    return found


def _attention(torch: Any, name: str, heads: Heads, work: Work, call: AttentionCall, query: Any) -> Peer:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    backend = getattr(SDPBackend, name)
    options: dict[str, Any] = {"scale": call.layer.scale, "enable_gqa": heads.heads != heads.kv_heads}
    if work.past == 0:
        options["is_causal"] = True
    elif work.new > 1:
        options["attn_mask"] = causal_lower_right(work.new, work.length)

    def run() -> Any:
        with torch.no_grad(), sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                query, call.layer.keys, call.layer.values, **options
            )

    return run


def _folded(torch: Any, name: str, heads: Heads, call: AttentionCall, query: Any) -> Peer:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, name)
    group = query.reshape(query.shape[0], heads.kv_heads, heads.heads // heads.kv_heads, heads.size)

    def run() -> Any:
        with torch.no_grad(), sdpa_kernel(backend):
            attended = torch.nn.functional.scaled_dot_product_attention(
                group, call.layer.keys, call.layer.values, scale=call.layer.scale
            )
        return attended.reshape(query.shape)

    return run
