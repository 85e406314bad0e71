"""A loaded bundle that generates text: ``load`` and :class:`LanguageModel`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from qwenforge.chat_template import Message
from qwenforge.errors import BundleError, UnsupportedError, UserError
from qwenforge.manifest import Manifest
from qwenforge.ort_cuda_choice import ORT_CUDA
from qwenforge.runtime.backends import Backend, cpu_backend, cuda_backend
from qwenforge.runtime.generation import RunningSequence, generate_events
from qwenforge.runtime.results import GeneratedSequence, GenerationResult, TokenEvent
from qwenforge.runtime.sampling import Sampler, SamplingOptions
from qwenforge.runtime.scoring import iterate_logits, log_probabilities
from qwenforge.runtime.session import GraphSession
from qwenforge.runtime.stopping import DEFAULT_MAX_NEW_TOKENS, StopStrings
from qwenforge.runtime.tokenizer import IncrementalDecoder, Tokenizer

DEFAULT_MAX_BATCH = 32
"""Sequences at once where neither the bundle nor the caller says."""

CPU_TARGETS = ("ort-cpu", "portable")
"""Targets whose graph plain ONNX Runtime runs on the CPU."""

RUN_TARGETS = (*CPU_TARGETS, ORT_CUDA)
"""Targets that this runtime runs."""

Limit = TypeVar("Limit", int, int | None)

Prompts: TypeAlias = (
    str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Message] | Sequence[Sequence[Message]]
)
"""A text, texts, a token list, token lists, a chat (messages) or chats."""


class LanguageModel:
    """Generates text with one exported model; see :func:`load`.

    Every call allocates its own cache, so calls may run in several threads. A cache has as many tokens as prompt
    and answer need, rounded up to 64 and at most ``max_length``.

    Args:
        session: the graph.
        tokenizer: the bundle's tokenizer.
        max_length: prompt and answer together, in tokens.
        max_batch: sequences generated at once; more are generated in turns.
        end_tokens: the tokens that end a sequence.
        prefill_chunk: tokens of a prefill step; None is what suits the session's backend.
    """

    def __init__(
        self,
        session: GraphSession,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        max_batch: int,
        end_tokens: Sequence[int],
        prefill_chunk: int | None = None,
    ) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self.max_length = min(max_length, session.fixed_capacity or max_length)
        self.max_batch = max_batch
        self.end_tokens = frozenset(end_tokens)
        self.prefill_chunk = prefill_chunk or session.backend.prefill_chunk

    def generate(self, prompts: Prompts, **options: Any) -> GenerationResult:
        """Generate to the end; takes the arguments of :meth:`stream`.

        Returns:
            one sequence a prompt and sample: the ``n`` of the first prompt, then those of the second.
        """
        sequences = self._sequences(prompts, **options)
        texts: list[list[str]] = [[] for _ in sequences]
        for event in self._events(sequences):
            texts[event.sequence].append(event.text)
        return GenerationResult(tuple(_finished(s, "".join(t)) for s, t in zip(sequences, texts, strict=True)))

    def stream(self, prompts: Prompts, **options: Any) -> Iterator[TokenEvent]:
        """Generate token by token.

        Nothing but the end-of-sequence tokens is taken from the bundle's generation config: without a temperature
        the best token is chosen.

        Args:
            prompts: a text, texts, a token list, token lists, a chat or chats (lists of messages).
            max_new_tokens: at most so many new tokens a sequence; default 256.
            temperature: above 0 samples; None or 0 is greedy.
            top_k, top_p, min_p, repetition_penalty, seed: see :class:`~qwenforge.runtime.sampling.SamplingOptions`.
            stop: a string, or strings, before which the text ends.
            n: samples a prompt; they share one prefill.
            ignore_eos: go on after an end-of-sequence token (for measurements).

        Raises:
            UserError: a prompt is empty, too long for ``max_length`` or out of the vocabulary, or an option is out
                of range; raised by the call itself, before the first event is asked for.
        """
        return self._events(self._sequences(prompts, **options))

    def logits(self, token_lists: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """The logits after every token: an array [len(tokens), V] fp32 for each of ``token_lists``."""
        results = []
        for tokens in token_lists:
            result = np.empty((len(tokens), self.session.vocabulary_size), np.float32)
            for start, piece in self.iterate_logits(tokens):
                result[start : start + len(piece)] = piece
            results.append(result)
        return results

    def iterate_logits(self, tokens: Sequence[int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The logits after every token in bounded pieces: (position, logits [n, V] fp32); copy what you keep."""
        self._check_tokens(tokens, "the text", self.max_length)
        return iterate_logits(self.session, tokens, max_length=self.max_length, chunk=self.prefill_chunk)

    def score(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """The natural log-probability of each of ``tokens`` but the first, given those before it; shape [len - 1]."""
        pieces = []
        for start, logits in self.iterate_logits(tokens):
            following = tokens[start + 1 : start + 1 + len(logits)]
            pieces.append(log_probabilities(logits, following))
        return np.concatenate(pieces)

    def _events(self, sequences: list[RunningSequence]) -> Iterator[TokenEvent]:
        return generate_events(
            self.session, sequences, max_batch=self.max_batch, max_length=self.max_length, chunk=self.prefill_chunk
        )

    def _sequences(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        n: int = 1,
        ignore_eos: bool = False,
    ) -> list[RunningSequence]:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}: give at least 1")
        if n < 1:
            raise UserError(f"n is {n}: give at least 1")
        options = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        sequences: list[RunningSequence] = []
        for number, tokens in enumerate(self._tokenize(prompts)):
            prompt = tuple(int(token) for token in tokens)
            self._check_tokens(prompt, f"prompt {number + 1}", self.max_length - 1)
            room = self.max_length - len(prompt)
            sequences += [
                RunningSequence(
                    index=number * n + sample,
                    prompt=prompt,
                    new_tokens_limit=min(max_new_tokens, room),
                    limit_reason="length" if max_new_tokens <= room else "capacity",
                    end_tokens=frozenset() if ignore_eos else self.end_tokens,
                    sampler=Sampler(options, sample),
                    decoder=IncrementalDecoder(self.tokenizer),
                    stop_strings=StopStrings(stops),
                )
                for sample in range(n)
            ]
        return sequences

    def _tokenize(self, prompts: Prompts) -> list[Sequence[int]]:
        if isinstance(prompts, str):
            return [self.tokenizer.encode(prompts)]
        if not prompts:
            raise UserError("there is no prompt: give a text, a token list or chat messages")
        if all(isinstance(item, int | np.integer) for item in prompts):
            return [prompts]  # type: ignore[list-item]
        if all(isinstance(item, Mapping) for item in prompts):
            return [self.tokenizer.encode_chat(prompts)]  # type: ignore[arg-type]
        return [self._tokenize_one(item) for item in prompts]

    def _tokenize_one(self, prompt: Any) -> Sequence[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, Sequence | np.ndarray):
            items = list(prompt)
            if all(isinstance(item, int | np.integer) for item in items):
                return items
            if all(isinstance(item, Mapping) for item in items):
                return self.tokenizer.encode_chat(items)
        raise UserError(f"a prompt is {type(prompt).__name__}: give a text, a list of tokens or a list of messages")

    def _check_tokens(self, tokens: Sequence[int], what: str, longest: int) -> None:
        if not len(tokens):
            raise UserError(f"{what} has no tokens: give at least one")
        if len(tokens) > longest:
            raise UserError(
                f"{what} has {len(tokens)} tokens, at most {longest} fit a max_length of {self.max_length}: "
                "shorten it, or export with a larger --max-length"
            )
        if not 0 <= min(tokens) <= max(tokens) < self.session.vocabulary_size:
            raise UserError(f"{what} holds a token outside 0 to {self.session.vocabulary_size - 1}")


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    max_batch: int | None = None,
    max_length: int | None = None,
    prefill_chunk: int | None = None,
    plugin_library: str | Path | None = None,
    gpu: int = 0,
) -> LanguageModel:
    """Load a bundle for generation: on the CPU, or for target ort-cuda on an NVIDIA GPU.

    Args:
        path: the bundle folder.
        threads: intra-op threads of the CPU; None is one a physical core.
        max_batch: at most so many sequences at once, others wait; at most, and by default, the bundle's limit, or 32.
        max_length: prompt and answer together, in tokens; at most, and by default, the bundle's limit.
        prefill_chunk: tokens of a prefill step; smaller takes less memory; by default what is fast on a CPU or a GPU.
        plugin_library: for a bundle that needs it, libqwenforge_cpu.so (ort-cpu) or libqwenforge_ort.so (ort-cuda); by
            default from the environment or where it is installed or built.
        gpu: number of the GPU, for an ort-cuda bundle.

    Raises:
        BundleError: the bundle is incomplete, damaged or of a newer schema.
        UnsupportedError: the bundle's target is not one of this runtime.
        UserError: an argument is out of range, or what the bundle needs, such as our library, is not here.
    """
    from qwenforge.bundle import Bundle

    if prefill_chunk is not None and prefill_chunk < 1:
        raise UserError(f"prefill_chunk is {prefill_chunk}: give at least 1")
    bundle = Bundle.open(Path(path))
    manifest = bundle.manifest
    if manifest.target not in RUN_TARGETS:
        raise UnsupportedError(
            f"{path}: the bundle's target is {manifest.target}, this runtime runs {', '.join(RUN_TARGETS)}; "
            "export the checkpoint for one of them"
        )
    length = _within("max_length", max_length, manifest.limits.max_length)
    batch = _within("max_batch", max_batch, manifest.limits.max_batch) or DEFAULT_MAX_BATCH
    options: dict[str, Any] = {
        "threads": threads,
        "session_options": manifest.session_options,
        "vocabulary_size": manifest.model.vocab_size,
        "backend": _backend(manifest, path, Path(plugin_library) if plugin_library is not None else None, gpu),
    }
    if bundle.prefill_path is not None and manifest.prefill is not None:
        options["prefill"] = GraphSession(bundle.prefill_path, **options)
        options["prefill_tokens"] = manifest.prefill.minimum_tokens
    session = GraphSession(bundle.model_path, **options)
    tokenizer = Tokenizer(bundle.tokenizer_path, bundle.tokenizer_config, bundle.chat_template)
    end_tokens = manifest.eos_token_ids or _end_tokens(bundle.generation_config, tokenizer)
    return LanguageModel(
        session, tokenizer, max_length=length, max_batch=batch, end_tokens=end_tokens, prefill_chunk=prefill_chunk
    )


def _backend(manifest: Manifest, path: str | Path, library: Path | None, gpu: int) -> Backend:
    if manifest.target != ORT_CUDA:
        return cpu_backend(manifest.ort_cpu, library=library)
    if manifest.ort_cuda is None:
        raise BundleError(
            f"{path}: the manifest does not say what its ort-cuda graph is made of; export the bundle again"
        )
    if gpu < 0:
        raise UserError(f"gpu is {gpu}: give the number of a GPU, from 0 on")
    return cuda_backend(manifest.ort_cuda, library=library, gpu=gpu)


def _within(name: str, asked: int | None, limit: Limit) -> int | Limit:
    if asked is None:
        return limit
    if asked < 1:
        raise UserError(f"{name} is {asked}: give at least 1")
    largest: int | None = limit
    if largest is not None and asked > largest:
        raise UserError(
            f"{name} is {asked}, above the bundle's limit of {largest}: lower it or export with a larger one"
        )
    return asked


def _end_tokens(generation_config: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The end-of-sequence tokens of the generation config, else the tokenizer's."""
    found = generation_config.get("eos_token_id")
    if found is not None:
        return [int(token) for token in found] if isinstance(found, list) else [int(found)]
    text = tokenizer.special_tokens.get("eos_token")
    token = None if text is None else tokenizer.token_id(text)
    return [] if token is None else [token]


def _finished(sequence: RunningSequence, text: str) -> GeneratedSequence:
    assert sequence.finish_reason is not None
    return GeneratedSequence(sequence.prompt, tuple(sequence.tokens), text, sequence.finish_reason)
