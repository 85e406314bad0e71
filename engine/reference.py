"""transformers as the reference, with the weights of one module in memory at a time.

The model is transformers' own, built on the meta device; a hook around each module that owns weights reads them from
the checkpoint just before it runs and drops them right after. A model much larger than memory can be run this way, one
pass over its weights per call. Small models keep their weights between calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.exporter.weights import cast

if TYPE_CHECKING:
    import torch


class Reference:
    """A transformers model in fp32 over a checkpoint's weights, with a cache that grows from call to call.

    Args:
        checkpoint: where the weights are.
        resident: keep weights once read; otherwise each module's are dropped after it has run.
        rounded_to: round the weights to this type before they become fp32.
    """

    def __init__(self, checkpoint: Checkpoint, *, resident: bool, rounded_to: ir.DataType | None = None) -> None:
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
        self._model: Any = model
        owners = {
            "model.embed_tokens": model.model.embed_tokens,
            "model.norm": model.model.norm,
            "lm_head": model.lm_head,
        }
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

        ``valid`` [B, S] is False for padding, which later calls do not see either.
        """
        import torch

        mask = valid.astype(np.int64)
        self._mask = mask if self._mask is None else np.concatenate([self._mask, mask], axis=1)
        with torch.inference_mode():
            hidden = self._model.model(
                input_ids=torch.from_numpy(tokens),
                position_ids=torch.from_numpy(positions),
                attention_mask=torch.from_numpy(self._mask),
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state
            if index is not None:
                chosen = torch.from_numpy(index)[:, :, None].expand(-1, -1, hidden.shape[-1])
                hidden = hidden.gather(1, chosen)
            logits: npt.NDArray[np.float32] = self._model.lm_head(hidden).numpy()
        return logits

    def _stream(self, prefix: str, module: torch.nn.Module) -> None:
        def load(owner: torch.nn.Module, _: object) -> None:
            import torch

            for name, parameter in list(owner.named_parameters()):
                if parameter.device.type == "meta":
                    tensor = self._checkpoint.state_tensor(f"{prefix}.{name}")
                    if self._rounded_to is not None:
                        tensor = cast(tensor, self._rounded_to)
                    array = np.ascontiguousarray(cast(tensor, ir.DataType.FLOAT).numpy())
                    _set(owner, name, torch.from_numpy(array if array.flags.writeable else array.copy()))

        def drop(owner: torch.nn.Module, _: object, __: object) -> None:
            for name, parameter in list(owner.named_parameters()):
                _set(owner, name, parameter.data.to("meta"))

        module.register_forward_pre_hook(load)
        if not self._resident:
            module.register_forward_hook(drop)


def _set(owner: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    import torch

    path, _, last = name.rpartition(".")
    holder = owner.get_submodule(path) if path else owner
    setattr(holder, last, torch.nn.Parameter(tensor, requires_grad=False))
