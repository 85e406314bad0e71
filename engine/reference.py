"""transformers as the reference, with the weights of one module in memory at a time.

The model is transformers' own, built on the meta device; a hook around each module that owns weights reads them from
the checkpoint just before it runs and drops them right after. Of the embedding only the rows asked for are read, and
the vocabulary projection is computed a block of rows at a time. A model much larger than memory can be run this way,
one pass over its weights per call. Small models keep their weights between calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.engine.free_memory import give_back_freed_memory
from qwenforge.exporter.cache_argument import cache_argument
from qwenforge.exporter.checkpoint import Checkpoint, CheckpointWeight
from qwenforge.exporter.expected_tensors import EMBEDDING, OUTPUT_HEAD
from qwenforge.exporter.leaves import mapped_array
from qwenforge.exporter.weights import cast, slice_, substitute

if TYPE_CHECKING:
    import torch


_HEAD_ROWS = 8192
"""Rows of the vocabulary projection in memory at a time."""


class Reference:
    """A transformers model in fp32 over a checkpoint's weights, with a cache that grows from call to call.

    Args:
        checkpoint: where the weights are.
        resident: keep weights once read; otherwise each module's are dropped after it has run.
        rounded_to: round the weights to this type before they become fp32; those stored quantized are codes times
            scales, which are not rounded once more.
        rounded_rotary: round the cosines and sines to ``rounded_to`` too, as transformers does in 16 bits.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        resident: bool,
        rounded_to: ir.DataType | None = None,
        rounded_rotary: bool = False,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        self._checkpoint = checkpoint
        self._resident = resident
        self._rounded_to = rounded_to
        config = checkpoint.config.to_transformers()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        model.eval().requires_grad_(False)
        if checkpoint.config.num_experts:
            model.set_experts_implementation("eager")
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        if rounded_rotary and rounded_to is not None:
            half = {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}[rounded_to]
            model.model.rotary_emb.register_forward_hook(
                lambda _, __, tables: tuple(table.to(half).to(torch.float32) for table in tables)
            )
        self._model: Any = model
        owners = {"model.norm": model.model.norm}
        if resident:
            owners |= {"model.embed_tokens": model.model.embed_tokens, "lm_head": model.lm_head}
        owners |= {f"model.layers.{index}": layer for index, layer in enumerate(model.model.layers)}
        for name, module in owners.items():
            self._stream(name, module)
        self._cache: Any = DynamicCache()
        self._mask: npt.NDArray[np.int64] | None = None

    def __call__(
        self,
        tokens: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        valid: npt.NDArray[np.bool_],
        index: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Logits of ``tokens`` [B, S], of all of them or of those at ``index`` [B, N]; [B, S or N, V].

        ``valid`` [B, S] is False for padding behind a row's tokens, which later calls do not see. transformers counts a
        sliding window in places of the cache, padding included, so the padding is moved in front.
        """
        import torch

        padding = valid.shape[1] - valid.sum(1)
        places = np.arange(valid.shape[1]) - padding[:, None]  # [B, S]; where the token of each place comes from
        tokens, positions = (np.take_along_axis(array, places % valid.shape[1], 1) for array in (tokens, positions))
        mask = (places >= 0).astype(np.int64)
        self._mask = mask if self._mask is None else np.concatenate([self._mask, mask], axis=1)
        index = np.tile(np.arange(valid.shape[1]), (len(valid), 1)) if index is None else index
        index = (index + padding[:, None]) % valid.shape[1]  # of padding: any
        with torch.inference_mode():
            hidden = self._model.model(
                inputs_embeds=self._embedding(tokens),
                position_ids=torch.from_numpy(positions),
                attention_mask=torch.from_numpy(self._mask),
                use_cache=True,
                **{cache_argument(self._model.model): self._cache},
            ).last_hidden_state
            chosen = torch.from_numpy(index)[:, :, None].expand(-1, -1, hidden.shape[-1])
            return self._logits(hidden.gather(1, chosen))

    def _embedding(self, tokens: npt.NDArray[np.int64]) -> torch.Tensor:
        import torch

        if self._resident:
            embedded: torch.Tensor = self._model.model.embed_tokens(torch.from_numpy(tokens))
            return embedded
        rows = mapped_array(self._checkpoint.state_tensor(EMBEDDING))[tokens]
        return torch.from_numpy(self._as_fp32(ir.tensor(rows)))

    def _logits(self, hidden: torch.Tensor) -> npt.NDArray[np.float32]:
        import torch

        if self._resident:
            logits: npt.NDArray[np.float32] = self._model.lm_head(hidden).numpy()
            return logits
        head = self._checkpoint.state_tensor(OUTPUT_HEAD)
        size = int(head.shape.numpy()[0])
        blocks = []
        for start in range(0, size, _HEAD_ROWS):
            rows = torch.from_numpy(self._as_fp32(slice_(head, 0, start, min(start + _HEAD_ROWS, size))))
            blocks.append(torch.nn.functional.linear(hidden, rows).numpy())
        return np.concatenate(blocks, axis=-1)

    def _as_fp32(self, tensor: ir.TensorProtocol) -> npt.NDArray[np.float32]:
        """The values in memory of our own, rounded if asked."""
        if self._rounded_to is not None:
            tensor = _rounded(cast(tensor, ir.DataType.FLOAT), self._rounded_to)
        # Not numpy(): a stored tensor would keep its file mapped, and the pages of all layers would add up.
        array = np.ascontiguousarray(mapped_array(cast(tensor, ir.DataType.FLOAT)))
        return array if array.flags.writeable else array.copy()

    def _stream(self, prefix: str, module: torch.nn.Module) -> None:
        def load(owner: torch.nn.Module, _: object) -> None:
            import torch

            for name, parameter in list(owner.named_parameters()):
                if parameter.device.type == "meta":
                    tensor = self._checkpoint.state_tensor(f"{prefix}.{name}")
                    _set(owner, name, torch.from_numpy(self._as_fp32(tensor)))

        def drop(owner: torch.nn.Module, _: object, __: object) -> None:
            for name, parameter in list(owner.named_parameters()):
                _set(owner, name, parameter.data.to("meta"))
            give_back_freed_memory()

        module.register_forward_pre_hook(load)
        if not self._resident:
            module.register_forward_hook(drop)


def _rounded(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """The same plan over leaves that are rounded to ``dtype``, but for the quantized ones."""
    return substitute(tensor, lambda leaf: leaf if isinstance(leaf, CheckpointWeight) else cast(leaf, dtype))


def _set(owner: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    import torch

    path, _, last = name.rpartition(".")
    holder = owner.get_submodule(path) if path else owner
    setattr(holder, last, torch.nn.Parameter(tensor, requires_grad=False))
