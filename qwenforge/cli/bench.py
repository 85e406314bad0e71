"""``qwenforge bench``: how fast is a bundle here, and against peers in the same run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenforge.cli.arguments import add_bundle, add_plugin_library, add_threads, positive_int
from qwenforge.cli.base import Command

if TYPE_CHECKING:
    from qwenforge.bench.latency import Measurement, SubjectSpec, Workload
    from qwenforge.bundle import Bundle

PEERS = ("transformers",)


class BenchCommand(Command):
    """Measure latency, throughput and memory."""

    name = "bench"
    help = "measure latency, throughput and memory of a bundle"
    description = (
        "Time to first token, inter-token latency, tokens a second and peak memory on random prompts, greedy decoding, "
        "warm-up not counted. With --against, peers are measured in the same sitting, runs alternating, each in its "
        "own process; believe the ratios more than the absolute figures."
    )
    example = (
        "qwenforge bench ./tiny-bundle --prompt-tokens 128 --new-tokens 64\n"
        "qwenforge bench ./tiny-bundle --against transformers --checkpoint ./tiny-checkpoint --json out.json"
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_bundle(parser)
        parser.add_argument("--prompt-tokens", type=positive_int, default=128, metavar="N", help="default: 128")
        parser.add_argument("--new-tokens", type=positive_int, default=64, metavar="N", help="default: 64, at least 2")
        parser.add_argument("--batch", type=positive_int, default=1, metavar="B", help="prompts at once (default: 1)")
        parser.add_argument("--runs", type=positive_int, default=5, metavar="R", help="counted runs (default: 5)")
        parser.add_argument("--against", metavar="PEER,...", help=f"peers to measure beside it: {', '.join(PEERS)}")
        parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="the bundle's checkpoint, for the peers")
        add_threads(parser)
        add_plugin_library(parser)
        parser.add_argument(
            "--json", metavar="FILE", help="also write everything measured to FILE ('-': to stdout only)"
        )

    def run(self, args: argparse.Namespace) -> int:
        from qwenforge.bench.latency import Workload, measure
        from qwenforge.bench.report_file import check_report_file, write_report
        from qwenforge.bundle import Bundle
        from qwenforge.errors import UserError
        from qwenforge.machine import describe

        file = None if args.json in (None, "-") else Path(args.json)
        if file is not None:
            check_report_file(file)
        bundle = Bundle.open(args.bundle)
        needed, limit = args.prompt_tokens + args.new_tokens, bundle.manifest.limits.max_length
        if needed > limit:
            raise UserError(f"{needed} tokens (prompt and answer) exceed the bundle's limit of {limit}; ask for fewer.")
        if args.new_tokens < 2:
            raise UserError("--new-tokens must be at least 2: the first token is timed as TTFT, the others as ITL.")
        threads = args.threads or describe().processor.usable_threads
        workload = Workload(args.prompt_tokens, args.new_tokens, args.batch, args.runs, threads)
        specs = _specs(args, bundle, threads)
        results = _measure_with_progress(specs, workload, measure)
        report = as_json(results, workload)
        if args.json == "-":
            print(json.dumps(report, indent=1))
            return 0
        print_table(results, workload)
        if file is not None:
            write_report(file, report)
        return 0


def _specs(args: argparse.Namespace, bundle: Bundle, threads: int) -> list[SubjectSpec]:
    from qwenforge.bench.latency import SubjectSpec
    from qwenforge.errors import UserError
    from qwenforge.exporter.checkpoint import Checkpoint

    library = str(args.plugin_library) if args.plugin_library is not None else None
    options: dict[str, Any] = {"bundle": str(args.bundle), "threads": threads, "max_batch": args.batch}
    if library is not None:
        options["plugin_library"] = library
    specs = [SubjectSpec("qwenforge", options)]
    for peer in filter(None, (args.against or "").split(",")):
        if peer not in PEERS:
            raise UserError(f"no peer is called {peer!r}; known peers: {', '.join(PEERS)}.")
        if args.checkpoint is None:
            raise UserError(
                f"--against {peer} needs --checkpoint DIR: the checkpoint that the bundle was exported from."
            )
        if Checkpoint.open(args.checkpoint).fingerprint() != bundle.manifest.source.fingerprint:
            raise UserError(
                f"{args.bundle} was not exported from {args.checkpoint}, so comparing them says nothing; give "
                "--checkpoint the one it was exported from, or export again."
            )
        options = {"checkpoint": str(args.checkpoint), "threads": threads, "dtype": bundle.manifest.dtype}
        specs.append(SubjectSpec(peer, options))
    return specs


def _measure_with_progress(specs: list[SubjectSpec], workload: Workload, measure: Any) -> list[Measurement]:
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        results: list[Measurement] = measure(specs, workload, progress=status.update)
    return results


def as_json(results: list[Measurement], workload: Workload) -> dict[str, Any]:
    """Everything measured, with the ratios to the first subject."""
    from dataclasses import asdict

    first = results[0]
    return {
        "workload": asdict(workload),
        "subjects": [
            asdict(result)
            | {
                "ratio_to_first": {
                    "ttft": result.ttft_ms.median / first.ttft_ms.median,
                    "itl_p50": result.itl_ms["p50"] / first.itl_ms["p50"],
                    "tokens_per_second": result.tokens_per_second.median / first.tokens_per_second.median,
                    "peak_rss": result.peak_rss_bytes / first.peak_rss_bytes,
                }
            }
            for result in results
        ],
    }


def print_table(results: list[Measurement], workload: Workload) -> None:
    """The figures as a table, one row a subject; ratios are to the first."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    title = (
        f"{workload.prompt_tokens} prompt + {workload.new_tokens} new tokens, batch {workload.batch}, "
        f"{workload.runs} runs, {workload.threads} threads: median [min-max]"
    )
    table = Table(title=escape(title))
    for column in ("engine", "TTFT ms", "ITL ms p50 / p90 / p99", "tokens/s", "peak RSS MB", "TTFT, tok/s ratio"):
        table.add_column(column, justify="left" if column == "engine" else "right", no_wrap=True)
    first = results[0]
    for result in results:
        ttft, rate = result.ttft_ms, result.tokens_per_second
        table.add_row(
            result.description,
            f"{ttft.median:.1f} [{ttft.low:.1f}-{ttft.high:.1f}]",
            " / ".join(f"{result.itl_ms[p]:.2f}" for p in ("p50", "p90", "p99")),
            f"{rate.median:.1f} [{rate.low:.1f}-{rate.high:.1f}]",
            f"{result.peak_rss_bytes / 1e6:.0f}",
            f"{ttft.median / first.ttft_ms.median:.2f}, {rate.median / first.tokens_per_second.median:.2f}",
        )
    console = Console()
    # Figures are not folded where the output is a pipe (80 columns) or a narrow terminal.
    console.width = max(console.width, 140)
    console.print(table)
