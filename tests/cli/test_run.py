"""``qwenforge run`` on a bundle that ``qwenforge export`` wrote, each in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

from support.command_line import qwenforge


def test_exported_bundle_says_what_transformers_says(bundle: Path, checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    finished = qwenforge("run", bundle, "--prompt", "Once upon a time", "--max-new-tokens", "24", "--json")
    assert (finished.code, finished.err) == (0, "")
    said = json.loads(finished.out)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    prompt = torch.tensor([tokenizer("Once upon a time").input_ids])
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    tokens = expected[0, prompt.shape[1] :].tolist()
    assert said["prompt_tokens"] == prompt.tolist()
    if said["finish_reason"] == ["stop"]:
        tokens = tokens[: len(said["tokens"][0])]
    assert said["tokens"] == [tokens]


def test_text_goes_to_stdout_and_nothing_to_stderr(bundle: Path) -> None:
    options = ["--prompt", "Once upon a time", "--max-new-tokens", "8"]
    text, said = qwenforge("run", bundle, *options), qwenforge("run", bundle, *options, "--json")
    assert (text.code, text.err) == (0, "")
    assert text.out == json.loads(said.out)["text"][0] + "\n"


def test_folder_that_is_no_bundle_is_refused_in_one_sentence(checkpoint: Path) -> None:
    sentence = qwenforge("run", checkpoint, "--prompt", "a").refusal()
    assert str(checkpoint) in sentence and "is not a qwenforge bundle" in sentence
