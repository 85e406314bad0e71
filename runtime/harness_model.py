"""A bundle as a model of EleutherAI's lm-evaluation-harness (lm-eval): a ``lm_eval.api.model.TemplateLM``.

The harness cuts contexts from continuations and builds the prompts; here tokens are scored and texts generated, with
the bundle's own tokenizer, key/value cache and stop strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from qwenforge.errors import UserError
from qwenforge.runtime.language_model import LanguageModel
from qwenforge.runtime.scoring import log_probabilities

DEFAULT_NEW_TOKENS = 256
"""Of an answer whose task does not say, as in the harness's own models."""

Progress = Callable[[str, float], None]


def harness_model(model: LanguageModel, *, name: str, progress: Progress | None = None) -> Any:
    """``model`` as a harness model called ``name``.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        UserError: the bundle has no end-of-text token to begin a text with.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tell = progress or (lambda _, __: None)
    prefix = _prefix_token(model)

    class BundleModel(TemplateLM):  # type: ignore[misc]
        """See the module; a class inside a function, because its base is an optional library's."""

        @property
        def eot_token_id(self) -> int:
            return prefix

        @property
        def tokenizer_name(self) -> str:
            return name

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return model.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            found = []
            for index, (strings, context, continuation) in enumerate(requests):
                tell(f"request {index + 1} of {len(requests)}", index / len(requests))
                found.append(score_continuation(model, context, continuation))
                self.cache_hook.add_partial("loglikelihood", strings, found[-1])
            return found

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for index, request in enumerate(requests):
                tell(f"text {index + 1} of {len(requests)}", index / len(requests))
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=prefix,
                    max_seq_len=model.max_length - 1,
                    context_len=1,
                )
                pairs = map(make_disjoint_window, windows)
                totals.append(sum(score_continuation(model, *pair)[0] for pair in pairs))
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return list(_generated(model, [request.args for request in requests], tell))

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return model.tokenizer.render_chat(chat_history)

        def chat_template(self, chat_template: bool | str = False) -> str:
            return name

    return BundleModel()


def score_continuation(model: LanguageModel, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """log p of ``continuation`` behind ``context`` in nats, and whether greedy decoding would choose just that.

    What does not fit the bundle's context is cut off at the left, of the context alone.

    Raises:
        UserError: the continuation by itself does not fit.
    """
    if not continuation:
        return 0.0, True
    room = model.max_length - len(continuation)
    if room < 1 or not context:
        raise UserError(
            f"a continuation of {len(continuation)} tokens needs more context than the bundle's {model.max_length}; "
            "export with a larger --max-length."
        )
    context = context[-room:]
    # The last token's logits would predict what follows the continuation.
    tokens = [*context, *continuation[:-1]]
    first = len(context) - 1
    total, greedy = 0.0, True
    for start, logits in model.iterate_logits(tokens):
        kept = logits[max(0, first - start) :]
        if not len(kept):
            continue
        offset = max(start, first) - first
        wanted = continuation[offset : offset + len(kept)]
        total += float(log_probabilities(kept, wanted).sum())
        greedy = greedy and bool((kept.argmax(1) == np.asarray(wanted)).all())
    return total, greedy


def _generated(model: LanguageModel, requests: Sequence[tuple[str, dict[str, Any]]], tell: Progress) -> Iterator[str]:
    for index, (context, options) in enumerate(requests):
        tell(f"answer {index + 1} of {len(requests)}", index / len(requests))
        until = options.get("until") or []
        new_tokens = int(options.get("max_gen_toks") or options.get("max_new_tokens") or DEFAULT_NEW_TOKENS)
        new_tokens = min(new_tokens, model.max_length - 1)
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample", False) else 0.0
        prompt = model.tokenizer.encode(context, add_special_tokens=False)[-(model.max_length - new_tokens) :]
        result = model.generate(
            [prompt],
            max_new_tokens=new_tokens,
            temperature=temperature or None,
            top_p=options.get("top_p") if temperature else None,
            top_k=options.get("top_k") if temperature else None,
            seed=index if temperature else None,
            stop=[until] if isinstance(until, str) else [text for text in until if text],
        )
        yield result.texts[0]


def _prefix_token(model: LanguageModel) -> int:
    if not model.end_tokens:
        raise UserError("the bundle names no end-of-text token, with which tasks begin a text; export it again.")
    end = model.tokenizer.token_id("<|endoftext|>")  # what Qwen separates documents with
    return end if end is not None else min(model.end_tokens)
