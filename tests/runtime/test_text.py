from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qwenforge.errors import BundleError, UserError
from qwenforge.runtime.stopping import StopStrings
from qwenforge.runtime.tokenizer import REPLACEMENT, IncrementalDecoder, Tokenizer

TEXT = "Grüße, 世界! 👩‍👩‍👧 naïve\n\tcafé \U0001f600 done"


@pytest.fixture
def tokenizer(checkpoint: Path) -> Tokenizer:
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    template = (checkpoint / "chat_template.jinja").read_text(encoding="utf-8")
    return Tokenizer(checkpoint / "tokenizer.json", config, template)


def test_decoder_pieces_never_split_a_character(tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(TEXT)]
    assert "".join(pieces) + decoder.flush() == TEXT
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert pieces.count("") == len(TEXT.encode()) - len(TEXT)


@pytest.mark.parametrize("seed", range(20))
def test_decoder_pieces_add_up_to_whole_decoding_random_bytes(tokenizer: Tokenizer, seed: int) -> None:
    tokens = np.random.default_rng(seed).integers(0, 259, 60).tolist()
    decoder = IncrementalDecoder(tokenizer)
    assert "".join(decoder.push(token) for token in tokens) + decoder.flush() == tokenizer.decode(tokens)


def test_decoder_keeps_spaces_of_word_piece_tokenizers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.WordLevel({"▁hello": 0, "▁world": 1, "▁again": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    decoder = IncrementalDecoder(Tokenizer(tmp_path / "tokenizer.json"))
    assert [decoder.push(token) for token in (0, 1, 2)] == ["hello", " world", " again"]


def test_decoder_flushes_incomplete_character(tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.push(token) for token in tokenizer.encode("a世")[:3]] == ["a", "", ""]
    assert decoder.flush() == REPLACEMENT
    assert decoder.flush() == ""


def test_decoder_hides_special_tokens(tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer)
    tokens = tokenizer.encode("a<|im_end|>b")
    assert len(tokens) == 3
    assert [decoder.push(token) for token in tokens] == ["a", "", "b"]


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "found"),
    [
        (["END"], ["abEN", "Dcd"], ["ab", ""], "END"),
        (["END"], ["abE", "xE", "N", "x"], ["ab", "Ex", "", "ENx"], None),
        (["aab"], ["aaa", "b"], ["a", ""], "aab"),
        (["xyz", "y"], ["wxyz"], ["wx"], "y"),
        (["ab", "abc"], ["zabc"], ["z"], "ab"),
        ([], ["any", "thing"], ["any", "thing"], None),
        (["\n\n"], ["a\n", "b\n", "\n"], ["a", "\nb", ""], "\n\n"),
    ],
)
def test_stop_strings_never_leak(stops: list[str], pieces: list[str], shown: list[str], found: str | None) -> None:
    matcher = StopStrings(stops)
    assert [matcher.push(piece) for piece in pieces] == shown
    assert matcher.found == found
    assert matcher.push("more") == ("" if found else "more")


@pytest.mark.parametrize("size", range(1, 9))
def test_stop_strings_do_not_depend_on_pieces(size: int) -> None:
    text = "a wxyz and aaab<|b and more"
    for stops, cut in ((["xyz", "y"], 3 + 1), (["aab", "<|b"], 12), (["<|b", "and m"], 15), (["morel"], len(text))):
        matcher = StopStrings(stops)
        shown = "".join(matcher.push(text[i : i + size]) for i in range(0, len(text), size))
        assert shown + matcher.flush() == text[:cut]


def test_stop_strings_flush_what_was_held() -> None:
    matcher = StopStrings(["END"])
    assert matcher.push("xEN") == "x"
    assert matcher.flush() == "EN"


def test_chat_equals_transformers_template(tokenizer: Tokenizer, checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "system", "content": "Be brief: é."}, {"role": "user", "content": "<b>Hi</b> 'there'"}]
    reference = AutoTokenizer.from_pretrained(checkpoint)
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.render_chat(messages) == expected
    assert tokenizer.encode_chat(messages) == reference(expected, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(TEXT) == reference(TEXT)["input_ids"]


def test_chat_template_has_the_hugging_face_helpers(checkpoint: Path) -> None:
    template = (
        "{%- for m in messages %}\n  {%- if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
        "{{ eos_token }}{{ strftime_now('%%') }}"
        "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}"
    )
    tokenizer = Tokenizer(checkpoint / "tokenizer.json", {"eos_token": {"content": "<E>"}}, template)
    message = {"role": "user", "content": "é<"}
    assert tokenizer.render_chat([message] * 2) == '{"role": "user", "content": "é<"}<E>%'
    with pytest.raises(UserError, match="the chat template rejects the messages: too many"):
        tokenizer.render_chat([message] * 3)


def test_chat_template_cannot_leave_its_sandbox(checkpoint: Path) -> None:
    tokenizer = Tokenizer(checkpoint / "tokenizer.json", {}, "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(UserError, match="the chat template rejects the messages"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


def test_chat_refused_when_bundle_has_no_template(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="no chat template; give the text with --prompt"):
        Tokenizer(checkpoint / "tokenizer.json").render_chat([{"role": "user", "content": "x"}])


def test_tokenizer_refuses_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: cannot read the tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")
