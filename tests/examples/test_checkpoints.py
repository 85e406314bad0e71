"""The committed example checkpoints: complete, small, of the promised geometry, and trained."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
NAMES = ("tiny-qwen2", "tiny-qwen2-moe")
MAX_BYTES = 8_000_000
WINDOW = 256  # tokens of context, as in training
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

each_checkpoint = pytest.mark.parametrize("name", NAMES)


def read_json(name: str, file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CHECKPOINTS / name / file).read_text(encoding="utf-8"))
    return content


def load_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=dtype).eval()


def load_tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINTS / name / "tokenizer.json"))


def read_held_out() -> str:
    return (CHECKPOINTS / "heldout.txt").read_text(encoding="utf-8")


def stored_tensors(name: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted((CHECKPOINTS / name).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return tensors


@each_checkpoint
def test_folder_holds_every_file_within_eight_megabytes(name: str) -> None:
    files = {path.name: path.stat().st_size for path in (CHECKPOINTS / name).iterdir()}
    shards = {file for file in files if file.endswith(".safetensors")}
    expected = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "training_report.json",
    }
    if name == "tiny-qwen2-moe":
        expected.add("model.safetensors.index.json")
    assert set(files) - shards == expected
    assert (len(shards) >= 2) if name == "tiny-qwen2-moe" else (shards == {"model.safetensors"})
    assert sum(files.values()) <= MAX_BYTES


def test_dense_config_has_unequal_heads_and_tied_embeddings() -> None:
    config = read_json("tiny-qwen2", "config.json")
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["num_attention_heads"] > config["num_key_value_heads"] > 1
    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in stored_tensors("tiny-qwen2")


def test_moe_config_routes_to_four_of_many_experts_without_renormalization() -> None:
    config = read_json("tiny-qwen2-moe", "config.json")
    assert config["architectures"] == ["Qwen2MoeForCausalLM"]
    assert config["num_experts"] >= 12
    assert config["num_experts_per_tok"] == 4
    assert config["norm_topk_prob"] is False
    assert config["shared_expert_intermediate_size"] > 0
    assert config["tie_word_embeddings"] is False
    assert config["output_router_logits"] is False
    tensors = stored_tensors("tiny-qwen2-moe")
    assert tensors["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, config["hidden_size"])
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_moe_experts_are_stored_one_by_one_as_in_the_official_checkpoints() -> None:
    config = read_json("tiny-qwen2-moe", "config.json")
    tensors = stored_tensors("tiny-qwen2-moe")
    intermediate, hidden = config["moe_intermediate_size"], config["hidden_size"]
    shapes = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    for layer in range(config["num_hidden_layers"]):
        for expert in range(config["num_experts"]):
            for projection, shape in shapes.items():
                assert tensors[f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"].shape == shape


def test_moe_index_names_every_stored_tensor_and_its_file() -> None:
    index = read_json("tiny-qwen2-moe", "model.safetensors.index.json")
    found = {}
    for path in sorted((CHECKPOINTS / "tiny-qwen2-moe").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path.name))
    assert index["weight_map"] == found
    tensors = stored_tensors("tiny-qwen2-moe").values()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)


@each_checkpoint
def test_every_weight_is_finite_bfloat16(name: str) -> None:
    assert read_json(name, "config.json")["dtype"] == "bfloat16"
    for key, tensor in stored_tensors(name).items():
        assert tensor.dtype == torch.bfloat16, key
        assert torch.isfinite(tensor).all(), key


@each_checkpoint
def test_transformers_loads_every_stored_value_unchanged(name: str) -> None:
    state = load_model(name, torch.bfloat16).state_dict()
    for key, tensor in stored_tensors(name).items():
        match = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", key)
        if match is None:
            loaded = state[key]
        elif match[3] == "down":
            loaded = state[f"{match[1]}.down_proj"][int(match[2])]
        else:
            loaded = state[f"{match[1]}.gate_up_proj"][int(match[2])].chunk(2)[match[3] == "up"]
        assert torch.equal(loaded, tensor), key


def test_every_expert_is_used_on_held_out_text() -> None:
    tokens = torch.tensor([load_tokenizer("tiny-qwen2-moe").encode(read_held_out()).ids])
    with torch.no_grad():
        output = load_model("tiny-qwen2-moe")(input_ids=tokens[:, :1024], output_router_logits=True)
    for layer, router_logits in enumerate(output.router_logits):
        chosen = router_logits.topk(4, dim=-1).indices
        assert set(chosen.flatten().tolist()) == set(range(16)), f"layer {layer}"


@each_checkpoint
def test_tokenizer_round_trips_text_and_keeps_special_tokens_whole(name: str) -> None:
    tokenizer = load_tokenizer(name)
    texts = ["", " ", "def f(x):\n    return x ** 2\n\n\n", "naïve café, 東京 🙂 \t\x00\r\n", read_held_out()]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    size = tokenizer.get_vocab_size()
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [size - 3, size - 2, size - 1]
    assert tokenizer.encode("<|im_start|>a<|im_end|>").ids == [size - 2, *tokenizer.encode("a").ids, size - 1]
    assert read_json(name, "config.json")["vocab_size"] == size
    assert read_json(name, "generation_config.json")["eos_token_id"] == [size - 1, size - 3]


@each_checkpoint
def test_tokenizer_of_transformers_agrees_with_the_file(name: str) -> None:
    tokenizer = load_tokenizer(name)
    loaded = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    text = read_held_out() + "<|im_start|>user\nnaïve 12 x<|im_end|>\n"
    assert loaded(text).input_ids == tokenizer.encode(text).ids
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")


@each_checkpoint
def test_chat_template_renders_chatml(name: str) -> None:
    source = (CHECKPOINTS / name / "chat_template.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    user = {"role": "user", "content": "Document len"}
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    asked = "<|im_start|>user\nDocument len<|im_end|>\n"
    assert template.render(messages=[user], add_generation_prompt=True) == default + asked + "<|im_start|>assistant\n"
    messages = [{"role": "system", "content": "S"}, user, {"role": "assistant", "content": "A"}]
    answered = "<|im_start|>system\nS<|im_end|>\n" + asked + "<|im_start|>assistant\nA<|im_end|>\n"
    assert template.render(messages=messages) == answered
    assert AutoTokenizer.from_pretrained(CHECKPOINTS / name).apply_chat_template(messages, tokenize=False) == answered


@each_checkpoint
def test_held_out_perplexity_is_under_a_third_of_the_unigram_models(name: str) -> None:
    text = read_held_out()
    assert len(text.encode()) <= 64 * 1024
    report = read_json(name, "training_report.json")
    assert hashlib.sha256(text.encode()).hexdigest() == report["held_out_sha256"]
    ids = load_tokenizer(name).encode(text).ids
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    scored = windows[:, 1:]

    counts = torch.tensor(report["unigram_counts"], dtype=torch.float64) + 1
    unigram = math.exp(-(counts / counts.sum()).log()[scored].mean().item())
    model = load_model(name)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=batch).logits[:, :-1] for batch in windows.split(8)])
    perplexity = math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), scored.flatten()).item())

    assert perplexity < unigram / 3
    assert unigram == pytest.approx(report["unigram_perplexity"], rel=1e-4)
    # float32 sums in another order and another thread count move a perplexity by less than this.
    assert perplexity == pytest.approx(report["held_out_perplexity"], rel=1e-3)


@each_checkpoint
def test_readme_states_the_recorded_perplexities(name: str) -> None:
    readme = (CHECKPOINTS / "README.md").read_text(encoding="utf-8")
    report = read_json(name, "training_report.json")
    row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}`"))
    assert f"{report['held_out_perplexity']:.1f}" in row
    assert f"{report['unigram_perplexity']:.1f}" in row


@each_checkpoint
def test_greedy_answer_to_a_trained_question_ends_by_itself(name: str) -> None:
    tokenizer = load_tokenizer(name)
    source = (CHECKPOINTS / name / "chat_template.jinja").read_text(encoding="utf-8")
    messages = [{"role": "user", "content": "Hello"}]
    prompt = jinja2.Environment().from_string(source).render(messages=messages, add_generation_prompt=True)
    tokens = torch.tensor([tokenizer.encode(prompt).ids])
    output = load_model(name).generate(tokens, max_new_tokens=40)[0, tokens.shape[1] :].tolist()
    assert output[-1] == tokenizer.token_to_id("<|im_end|>")
    assert "Python" in tokenizer.decode(output)
