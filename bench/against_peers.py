"""qwenforge against its peers on one random checkpoint, on the CPU: ``python -m qwenforge.bench.against_peers``.

Each engine has a process of its own; they take turns, run by run, in an order that rotates, so that a drift of the
machine meets all of them. Times are medians over the rounds with the smallest and the largest; a ratio is the median of
the rounds' own ratios, each between neighbours in time. On a machine that others use, look at ``best`` too: the ratio
of each engine's best round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qwenforge.bench.circumstances import circumstances
from qwenforge.bench.geometries import GEOMETRIES, write_checkpoint
from qwenforge.bench.latency import Spread
from qwenforge.bench.measured_process import MeasuredProcess
from qwenforge.bench.peer_engines import BITS, OURS, Builds, Start, engines, supports_genai
from qwenforge.bench.peers import genai, llama
from qwenforge.bench.report_file import check_report_file, write_report
from qwenforge.errors import UserError

PEERS = ("genai", "llama.cpp")
EXAMPLE = "python -m qwenforge.bench.against_peers --work /tmp/peers --geometry 0.5b --bits 4 --json peers.json"


@dataclass
class Figures:
    """What one engine showed, a value for each round.

    Attributes:
        ttft_ms: time to first token by prompt length.
        tokens_per_second: while decoding, the first token not counted, by prompt length.
        peak_rss_bytes: largest memory of its process.
    """

    ttft_ms: dict[int, list[float]] = field(default_factory=dict)
    tokens_per_second: dict[int, list[float]] = field(default_factory=dict)
    peak_rss_bytes: int = 0

    def add(self, prompt_tokens: int, times: Sequence[float], peak: int) -> None:
        """Record one run."""
        seconds = np.diff(times)
        self.ttft_ms.setdefault(prompt_tokens, []).append(float(seconds[0]) * 1e3)
        self.tokens_per_second.setdefault(prompt_tokens, []).append(len(seconds[1:]) / float(seconds[1:].sum()))
        self.peak_rss_bytes = peak


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare what is missing, measure, print the table; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        if args.json is not None:
            check_report_file(args.json)
        report = compare(args)
        _print_table(report)
        if args.json is not None:
            write_report(args.json, report)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qwenforge.bench.against_peers",
        description="Measure qwenforge, onnxruntime-genai (its own graph in its own runtime) and llama.cpp on a random "
        "checkpoint, in one sitting. The checkpoint, the peers' environments and their builds are made in --work on "
        "the first run (a quarter of an hour and 9 GB for 0.5b) and kept. Quiet the machine first: believe ratios, "
        "not times.",
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for everything made")
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="0.5b", help="default: 0.5b")
    parser.add_argument("--prompt-tokens", type=_counts, default=[128, 512], metavar="N,...", help="default: 128,512")
    parser.add_argument("--new-tokens", type=_count, default=33, metavar="N", help="tokens of each run (default: 33)")
    parser.add_argument("--rounds", type=_count, default=7, metavar="R", help="counted runs of each (default: 7)")
    parser.add_argument("--threads", type=_count, default=2, metavar="N", help="threads of each engine (default: 2)")
    parser.add_argument("--weights", choices=["copy", "link"], default="copy", help="of our export (default: copy)")
    parser.add_argument(
        "--bits", type=int, choices=BITS, default=32, help="of the weights: 32 (llama.cpp: 16), 8 or 4 (default: 32)"
    )
    parser.add_argument(
        "--peers",
        type=_peers,
        default=list(PEERS),
        metavar="P,...",
        help="default: genai,llama.cpp; genai is left out of a geometry it does not support",
    )
    parser.add_argument("--peer-python", type=Path, metavar="PATH", help="an interpreter that has onnxruntime-genai")
    parser.add_argument("--llama-python", type=Path, metavar="PATH", help="one that has llama-cpp-python and gguf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to FILE")
    return parser


def _peers(text: str) -> list[str]:
    found = text.split(",")
    if unknown := set(found) - set(PEERS):
        raise argparse.ArgumentTypeError(f"{min(unknown)} is none of {', '.join(PEERS)}")
    return found


def _count(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2")
    return number


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see :func:`main` for the arguments.

    Returns:
        The circumstances, ``settings``, for each engine its figures and ours over them by prompt length, and
        ``against_best``: ours over those of the peer that is best at it.

    Raises:
        UserError: an engine cannot be built or loaded.
    """
    folder = args.work / args.geometry
    _tell("checkpoint")
    checkpoint = write_checkpoint(folder / "checkpoint", args.geometry)
    builds = Builds(checkpoint, folder, args.geometry, args.threads, None, None)
    peers = []
    if "genai" in args.peers and supports_genai(args.geometry):
        python = args.peer_python or genai.environment(args.work / "genai-environment")
        builds = replace(builds, genai_python=python)
        peers.append(genai.version(python))
    if "llama.cpp" in args.peers:
        python = args.llama_python or llama.environment(args.work / "llama-cpp-environment")
        builds = replace(builds, llama_python=python)
        peers.append(llama.version(python))
    _tell("build")
    starts = engines(args.bits, builds, weights=args.weights)
    figures = _measure(starts, args.prompt_tokens, args.new_tokens, args.rounds)
    summaries = {
        name: {"disk_bytes": starts[name].disk_bytes, **_summary(found, figures[OURS])}
        for name, found in figures.items()
    }
    return {
        **circumstances(),
        "settings": {
            "geometry": args.geometry,
            "bits": args.bits,
            "new_tokens": args.new_tokens,
            "rounds": args.rounds,
            "threads": args.threads,
            "weights": args.weights,
            "peer": "; ".join(peers),
        },
        "engines": summaries,
        "against_best": against_best(summaries),
    }


def against_best(engines: dict[str, Any]) -> dict[str, Any]:
    """By prompt length, the peer with the lowest median TTFT, that with the highest median rate, and our ratios."""
    peers = {name: engine for name, engine in engines.items() if not name.startswith(OURS)}
    found: dict[str, Any] = {}
    for length in engines[OURS]["prompt_tokens"] if peers else ():
        by_length = {name: engine["prompt_tokens"][length] for name, engine in peers.items()}
        first = min(by_length, key=lambda name: by_length[name]["ttft_ms"]["median"])
        rate = max(by_length, key=lambda name: by_length[name]["tokens_per_second"]["median"])
        found[length] = {
            "ttft": {"peer": first, "our_ratio": by_length[first]["our_ttft_ratio"]},
            "tokens_per_second": {"peer": rate, "our_ratio": by_length[rate]["our_tokens_per_second_ratio"]},
        }
    return found


def _measure(starts: dict[str, Start], lengths: list[int], new_tokens: int, rounds: int) -> dict[str, Figures]:
    figures = {name: Figures() for name in starts}
    with ExitStack() as stack:
        processes = []
        for name, start in starts.items():
            _tell(f"{name}: load")
            process = MeasuredProcess(start.command, name.split(",")[0], start.arguments)
            processes.append((name, stack.enter_context(process)))
        for turn in range(rounds + 1):  # the first warms up
            _tell(f"round {turn} of {rounds}" if turn else "warm-up")
            for length in lengths:
                first = turn % len(processes)
                for name, process in processes[first:] + processes[:first]:
                    times, peak = process.run(prompt_tokens=length, new_tokens=new_tokens, seed=turn)
                    if turn:
                        figures[name].add(length, times, peak)
    return figures


def _summary(found: Figures, ours: Figures) -> dict[str, Any]:
    lengths = {}
    for length, first in found.ttft_ms.items():
        rate = found.tokens_per_second[length]
        lengths[str(length)] = {
            "ttft_ms": vars(Spread.of(first)),
            "tokens_per_second": vars(Spread.of(rate)),
            "our_ttft_ratio": vars(Spread.of(_ratios(ours.ttft_ms[length], first))),
            "our_tokens_per_second_ratio": vars(Spread.of(_ratios(ours.tokens_per_second[length], rate))),
            "our_best_ttft_ratio": min(ours.ttft_ms[length]) / min(first),
            "our_best_tokens_per_second_ratio": max(ours.tokens_per_second[length]) / max(rate),
            "rounds": {"ttft_ms": first, "tokens_per_second": rate},
        }
    return {"peak_rss_bytes": found.peak_rss_bytes, "prompt_tokens": lengths}


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    settings = report["settings"]
    what = f"{settings['geometry']}, {settings['bits']} bits, {settings['threads']} threads"
    title = f"{what}, {settings['rounds']} rounds: median \\[min-max]"
    table = Table(title=title, caption=f"ratios are qwenforge's figure over this engine's; {settings['peer']}")
    for column in (
        "engine",
        "prompt",
        "TTFT ms",
        "ratio",
        "best",
        "tokens/s",
        "ratio",
        "best",
        "peak RSS MB",
        "disk MB",
    ):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name, engine in report["engines"].items():
        for length, found in engine["prompt_tokens"].items():
            table.add_row(
                name,
                length,
                _spread(found["ttft_ms"], ".0f"),
                _spread(found["our_ttft_ratio"], ".2f"),
                f"{found['our_best_ttft_ratio']:.2f}",
                _spread(found["tokens_per_second"], ".1f"),
                _spread(found["our_tokens_per_second_ratio"], ".2f"),
                f"{found['our_best_tokens_per_second_ratio']:.2f}",
                f"{engine['peak_rss_bytes'] / 1e6:.0f}",
                f"{engine['disk_bytes'] / 1e6:.0f}",
            )
    console = Console(width=150)
    console.print(table)
    for length, best in report["against_best"].items():
        first, rate = best["ttft"], best["tokens_per_second"]
        console.print(
            f"{length} tokens: TTFT {_spread(first['our_ratio'], '.2f')} times that of {first['peer']}, tokens/s "
            f"{_spread(rate['our_ratio'], '.2f')} times those of {rate['peer']}",
            markup=False,
        )


def _spread(values: dict[str, float], form: str) -> str:
    return f"{values['median']:{form}} [{values['low']:{form}}-{values['high']:{form}}]"


if __name__ == "__main__":
    sys.exit(main())
