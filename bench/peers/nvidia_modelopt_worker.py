"""Runs in the peer's environment: quantizes one model with ModelOpt and writes its logits on some text."""

import json
import sys

import numpy as np


def main() -> None:
    """Read one request, a JSON object, from standard input and write the file that it names."""
    import modelopt.torch.quantization as mtq  # type: ignore[import-not-found]
    import torch
    from transformers import AutoModelForCausalLM

    request = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype=torch.float32).eval()
    calibration = torch.from_numpy(np.load(request["calibration"]))
    windows = torch.from_numpy(np.load(request["windows"]))

    def show_text(shown: torch.nn.Module) -> None:
        for row in calibration:
            shown(row[None])

    with torch.no_grad():
        quantized = mtq.quantize(model, getattr(mtq, request["config"]), show_text)
        np.save(request["logits"], np.concatenate([quantized(row[None]).logits.float().numpy() for row in windows]))


if __name__ == "__main__":
    main()
