"""``qwenforge run``: generate text with a bundle."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from qwenforge.cli.arguments import add_bundle, add_json, add_plugin_library, add_threads, positive_int
from qwenforge.cli.base import EXIT_DONE, Command
from qwenforge.errors import UserError
from qwenforge.runtime.stopping import DEFAULT_MAX_NEW_TOKENS

if TYPE_CHECKING:
    from qwenforge.runtime import TokenEvent


class Run(Command):
    """Streams text to the terminal, or prints one JSON object when it is done."""

    name: ClassVar[str] = "run"
    help: ClassVar[str] = "generate text with a bundle"
    description: ClassVar[str] = (
        "Continue texts, or answer a chat message, with a bundle made by 'qwenforge export'. Text appears as it is "
        "generated. The best token is always chosen unless --temperature is given. Bundles for ort-cpu and portable "
        "run on the CPU, those for ort-cuda on an NVIDIA GPU with onnxruntime-gpu."
    )
    example: ClassVar[str] = """
qwenforge run ./qwen2-bundle --prompt "Once upon a time" --max-new-tokens 64
qwenforge run ./qwen2-bundle --chat "Why is the sky blue?" --temperature 0.7 --top-p 0.8 --seed 1
git log -1 | qwenforge run ./qwen2-bundle --prompt - --json
"""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add_bundle(parser)
        what = parser.add_mutually_exclusive_group(required=True)
        what.add_argument(
            "--prompt", action="append", metavar="TEXT", help="text to continue; repeat for a batch; - reads stdin"
        )
        what.add_argument("--chat", metavar="TEXT", help="a user's message to answer, through the chat template")
        parser.add_argument("--system", metavar="TEXT", help="the chat's system message")
        parser.add_argument(
            "--max-new-tokens",
            type=positive_int,
            default=DEFAULT_MAX_NEW_TOKENS,
            metavar="N",
            help=f"generate at most N tokens (default: {DEFAULT_MAX_NEW_TOKENS})",
        )
        parser.add_argument("--temperature", type=float, metavar="T", help="sample at temperature T (default: greedy)")
        parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K best tokens")
        parser.add_argument(
            "--top-p", type=float, metavar="P", help="sample from the best tokens of total probability P"
        )
        parser.add_argument(
            "--min-p", type=float, metavar="M", help="sample from tokens at least M times as likely as the best"
        )
        parser.add_argument(
            "--repetition-penalty",
            type=float,
            default=1.0,
            metavar="R",
            help="make seen tokens less likely (default: 1, off)",
        )
        parser.add_argument(
            "--stop", action="append", default=[], metavar="S", help="end the text before S; repeat for several"
        )
        parser.add_argument("--seed", type=int, metavar="N", help="make sampling reproducible")
        parser.add_argument("--n", type=positive_int, default=1, metavar="N", help="samples a prompt (default: 1)")
        add_threads(parser)
        add_plugin_library(parser)
        add_json(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Load, generate, print."""
        prompts = _prompts(args)

        from qwenforge.runtime import load

        model = load(args.bundle, threads=args.threads, plugin_library=args.plugin_library)
        options = {
            name: getattr(args, name)
            for name in (
                "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed", "n"
            )
        }  # fmt: skip
        if args.json:
            print(json.dumps(model.generate(prompts, **options).to_dict()))
            return EXIT_DONE
        sequences = (1 if args.chat is not None else len(prompts)) * args.n
        full = _print_stream(model.stream(prompts, **options), sequences, args.n)
        for sequence in full:
            print(
                f"qwenforge: {_title(sequence, args.n)} ended because prompt and answer reached the bundle's "
                f"{model.max_length} tokens; export with a larger --max-length for more",
                file=sys.stderr,
            )
        return EXIT_DONE


def _prompts(args: argparse.Namespace) -> Any:
    """The chat, or the texts; standard input is read for a text ``-``, its last line end dropped."""
    if args.chat is not None:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        return [*system, {"role": "user", "content": args.chat}]
    if args.system is not None:
        raise UserError("--system needs --chat: a plain --prompt has no system message")
    if args.prompt.count("-") > 1:
        raise UserError("--prompt - is given more than once: standard input can be read only once")
    return [_read_stdin() if text == "-" else text for text in args.prompt]


def _read_stdin() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding} text: convert it first") from error


def _print_stream(events: Iterable[TokenEvent], sequences: int, samples: int) -> list[int]:
    """Print the sequences one after the other, each as soon as the one before it is complete.

    Returns:
        the sequences that ended because the cache was full.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write any character; a terminal of another encoding shows the others as '?'.
        sys.stdout.reconfigure(errors="replace")
    waiting: defaultdict[int, list[str]] = defaultdict(list)
    ended: set[int] = set()
    full: list[int] = []
    shown = 0
    if sequences > 1:
        print(f"--- {_title(0, samples)}")
    for event in events:
        waiting[event.sequence].append(event.text)
        if event.finish_reason is not None:
            ended.add(event.sequence)
        if event.finish_reason == "capacity":
            full.append(event.sequence)
        while shown < sequences:
            print("".join(waiting.pop(shown, [])), end="", flush=True)
            if shown not in ended:
                break
            print(flush=True)
            shown += 1
            if shown < sequences:
                print(f"--- {_title(shown, samples)}")
    return sorted(full)


def _title(sequence: int, samples: int) -> str:
    prompt = f"prompt {sequence // samples + 1}"
    return prompt if samples == 1 else f"{prompt}, sample {sequence % samples + 1}"
