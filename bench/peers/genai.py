"""onnxruntime-genai: its environment, and its graph from its own model builder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from qwenforge.bench.peers import environments
from qwenforge.errors import UserError

WORKER = Path(__file__).with_name("genai_worker.py")
"""Serves measurements inside the environment; see :mod:`qwenforge.bench.worker` for the protocol."""

_BUILDER_NEEDS = ("torch", "transformers", "onnx", "onnx-ir")


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with onnxruntime-genai, made in ``folder`` unless it is there.

    What its model builder needs besides is installed in the versions that run here.

    Raises:
        UserError: the packages cannot be installed.
    """
    needed = environments.as_here(_BUILDER_NEEDS)
    return environments.environment(
        folder,
        imports="onnxruntime_genai, onnx_ir, torch, transformers",
        # torch alone and first, so that resolving the others cannot choose another build of it.
        installs=(needed[:1], ["onnxruntime-genai", *needed[1:]]),
        failure=f"{{packages}} cannot be installed in {folder}; install them in an environment of your own and name "
        "its interpreter with --peer-python",
    )


def version(python: Path) -> str:
    """The version of onnxruntime-genai, and of the onnxruntime under it."""
    code = "import importlib.metadata as m; print(*(m.version(n) for n in ('onnxruntime-genai', 'onnxruntime')))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return f"onnxruntime-genai {found[0]} over onnxruntime {found[1]}"


def build(
    python: Path,
    checkpoint: Path,
    folder: Path,
    *,
    threads: int,
    precision: str = "fp32",
    options: tuple[str, ...] = (),
) -> Path:
    """Build the CPU graph of ``checkpoint`` into ``folder`` unless it is there; returns ``folder``.

    Args:
        python: the interpreter of :func:`environment`.
        checkpoint: a Hugging Face folder.
        folder: what the builder writes.
        threads: intra-op threads, written into its ``genai_config.json``.
        precision: ``fp32``, ``int8`` or ``int4``.
        options: ``--extra_options`` of the builder, such as ``prune_lm_head=true``.

    Raises:
        UserError: the builder fails.
    """
    settings = folder / "genai_config.json"
    if not settings.is_file():
        command = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(folder)]
        command += ["-p", precision, "-e", "cpu", "-c", str(folder.with_name(f"{folder.name}-cache"))]
        command += ["--extra_options", *options] if options else []
        # The builder's log goes to our stderr; nothing may be looked up outside the machine.
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        if subprocess.run(command, stdout=sys.stderr, env=offline).returncode:
            raise UserError(f"onnxruntime-genai's model builder fails on {checkpoint}; its messages are above")
    config = json.loads(settings.read_text())
    session = config["model"]["decoder"]["session_options"]
    session["intra_op_num_threads"] = threads
    settings.write_text(json.dumps(config, indent=1))
    return folder
