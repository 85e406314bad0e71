"""``qwenforge plan``: what fits on a device and how fast it could be, before any work."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenforge.cli.arguments import add_json, positive_int
from qwenforge.cli.base import EXIT_DONE, EXIT_USER_ERROR, Command
from qwenforge.cli.pages import write_page
from qwenforge.devices import DEVICES

if TYPE_CHECKING:
    from qwenforge.engine.planning.plan import Plan, RecipePlan


class PlanCommand(Command):
    """Compare recipes for a checkpoint, or an official model by name, on one device."""

    name = "plan"
    help = "say what fits on a device and how fast it could be"
    description = (
        "From a checkpoint's config.json alone, or an official model's name, say for every weight format how much "
        "memory it takes on a device, how many devices, how fast it could be at best and what limits it, and which "
        "format and lowering we would choose. A checkpoint that is quantized already is counted as it is. Nothing is "
        "read but its configuration. Exits 1 when nothing fits."
    )
    example = "qwenforge plan qwen2-72b --device h200 --max-length 8192 --max-batch 4"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare CHECKPOINT, --device and the workload."""
        parser.add_argument("checkpoint", metavar="CHECKPOINT|MODEL", help="a checkpoint folder, or such as qwen2-7b")
        parser.add_argument("--device", required=True, metavar="D", help=f"one of {', '.join(DEVICES)}")
        parser.add_argument("--tensorrt", metavar="X.Y", help="TensorRT version (default: the device's newest)")
        parser.add_argument("--max-length", type=positive_int, default=4096, metavar="N", help="tokens (default: 4096)")
        parser.add_argument("--max-batch", type=positive_int, default=1, metavar="B", help="rows (default: 1)")
        parser.add_argument(
            "--prompt-tokens", type=positive_int, default=512, metavar="N", help="of TTFT (default: 512)"
        )
        parser.add_argument("--kv-cache", choices=("fp16", "fp8", "int8"), default="fp16", help="default: fp16")
        parser.add_argument("--html", type=Path, metavar="F", help="also write one self-contained page with a plot")
        add_json(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Print the plan; UserError when the model or the device is unknown or cannot do what is asked."""
        from qwenforge.devices import get_device
        from qwenforge.engine.planning.known_models import model_config, stored_format
        from qwenforge.engine.planning.plan import Workload, make_plan

        name, config = model_config(args.checkpoint)
        stored = stored_format(args.checkpoint, config)
        workload = Workload(args.max_length, args.max_batch, args.prompt_tokens, args.kv_cache)
        plan = make_plan(config, get_device(args.device), workload, tensorrt=args.tensorrt, stored=stored)
        if args.html is not None:
            from qwenforge.engine.planning.plan_html import render_page

            write_page(args.html, render_page(name, plan))
        if args.json:
            print(json.dumps(as_json(name, plan), indent=1))
        else:
            _print(name, plan)
        return EXIT_DONE if plan.chosen is not None else EXIT_USER_ERROR


def as_json(name: str, plan: Plan) -> dict[str, Any]:
    """What ``--json`` prints: bytes, seconds and reasons."""
    return {
        "model": name,
        "parameters": plan.parameters.total,
        "device": plan.device.name,
        "tensorrt": plan.tensorrt,
        "workload": vars(plan.workload),
        "usable_bytes": plan.usable_bytes,
        "export_host_bytes": plan.export_bytes,
        "recipes": [_recipe_json(recipe) for recipe in plan.recipes],
        "refused": plan.refused,
        "chosen": plan.chosen.recipe.name if plan.chosen is not None else None,
        "reason": plan.reason,
        "lowering": plan.lowering,
    }


def _recipe_json(plan: RecipePlan) -> dict[str, Any]:
    return {
        "name": plan.recipe.name,
        "weight_bytes": plan.weight_bytes,
        "kv_cache_bytes": plan.cache_bytes,
        "workspace_bytes": plan.workspace_bytes,
        "devices": plan.devices,
        "bytes_per_device": plan.device_bytes,
        "build_host_bytes": {"constants": plan.build_bytes_constants, "inputs": plan.build_bytes_inputs},
        "ttft_seconds": plan.ttft.seconds,
        "ttft_limit": plan.ttft.limit,
        "itl_seconds": plan.itl.seconds,
        "itl_limit": plan.itl.limit,
    }


def _print(name: str, plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    work, gigabyte = plan.workload, 1e9
    title = f"{name} ({plan.parameters.total / 1e9:.2f} B parameters) on {plan.device.product}"
    caption = (
        f"batch {work.max_batch}, {work.max_length} tokens a row, TTFT of {work.prompt_tokens}; times are lower bounds"
    )
    table = Table(title=title, caption=caption)
    for heading in (
        "recipe",
        "weights GB",
        "KV GB",
        "workspace",
        "each GB",
        "devices",
        "build GB",
        "TTFT ms",
        "ITL ms",
    ):
        table.add_column(heading, justify="left" if heading == "recipe" else "right", no_wrap=True)
    for recipe in plan.recipes:
        table.add_row(
            recipe.recipe.name + (" *" if recipe is plan.chosen else ""),
            f"{recipe.weight_bytes / gigabyte:.2f}",
            f"{recipe.cache_bytes / gigabyte:.2f}",
            f"{recipe.workspace_bytes / gigabyte:.2f}",
            f"{recipe.device_bytes / gigabyte:.2f}",
            str(recipe.devices) if recipe.devices else "does not fit",
            f"{recipe.build_bytes_inputs / gigabyte:.0f}-{recipe.build_bytes_constants / gigabyte:.0f}",
            f"{recipe.ttft.seconds * 1e3:.3g} ({_SHORT[recipe.ttft.limit]})",
            f"{recipe.itl.seconds * 1e3:.3g} ({_SHORT[recipe.itl.limit]})",
        )
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 140)
    console.print(table)
    for recipe_name, reason in plan.refused.items():
        console.print(f"not {recipe_name}: {reason}")
    console.print(f"memory: {plan.usable_bytes / gigabyte:.1f} GB of a device are usable; ", end="")
    console.print(f"an export takes at most {plan.export_bytes / gigabyte:.1f} GB of host memory")
    console.print(f"choice: {plan.reason}" + (" (*)" if plan.chosen is not None else ""))
    console.print(f"lowering for TensorRT {plan.tensorrt}: {plan.lowering}")


_SHORT = {"memory bandwidth": "bandwidth", "arithmetic": "arithmetic"}
