"""From a checkpoint folder to a verified bundle: the whole pipeline in order.

read -> trace one layer of each kind -> fuse -> copy to full depth -> lower -> stream weights -> verify -> commit
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import onnx_ir as ir

from qwenforge.bundle_writer import BundleWriter
from qwenforge.engine.accuracy_page import accuracy_page
from qwenforge.engine.accuracy_report import QuantizationOutcome
from qwenforge.engine.bundle_facts import bundle_facts, generation_config, reference_name, tensor_spec
from qwenforge.engine.bundle_readme import POLYGRAPHY_SCRIPT, tensorrt_readme
from qwenforge.engine.cpu_kernels import choose_kernels
from qwenforge.engine.export_requirements import (
    context_length,
    require_cuda_kernels,
    require_fused,
    require_weight_inputs,
)
from qwenforge.engine.ort_cpu_graphs import TWIN_NAME, lower_quantized, save_graphs
from qwenforge.engine.prompts import verification_prompts
from qwenforge.engine.quantization_request import QuantizationRequest, require_device, require_target
from qwenforge.engine.quantized_export import QuantizedExport, kept_work_folder
from qwenforge.engine.refusal_report import refuse_beyond_budget, require_place_for_report, withdraw_refusal
from qwenforge.engine.stage_clock import Progress, StageClock
from qwenforge.engine.static_scales import (
    ScaledExport,
    ScalesOutcome,
    ScalesRequest,
    UsableScales,
    checkpoint_record,
    judged_record,
    require_scales,
    usable_scales,
)
from qwenforge.engine.verification import VerificationReport, verify
from qwenforge.errors import UnsupportedError, UserError
from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.exporter.external_data import link_checkpoint_files, save_model
from qwenforge.exporter.instantiate import instantiate
from qwenforge.exporter.safetensors_writer import write_safetensors
from qwenforge.exporter.trace import trace
from qwenforge.graph_passes.lower import lower
from qwenforge.graph_passes.lower.tensorrt_signature import TENSORRT_MAX_LENGTH, split_weight_inputs
from qwenforge.graph_passes.pipeline import Step, optimize
from qwenforge.lowering_choice import LoweringChoice, choose
from qwenforge.manifest import (
    ACCURACY_PAGE,
    ENGINE_WEIGHTS,
    GENERATION_CONFIG,
    LAYER_BEFORE,
    MODEL_NAME,
    POLYGRAPHY_NETWORK,
    PREFILL_NAME,
    README,
    TOKENIZER,
    Kernels,
    Limits,
    LoweringRecord,
    OrtCpuRecord,
    OrtCudaRecord,
)
from qwenforge.ort_cuda_choice import OrtCudaChoice
from qwenforge.reference_logits import ReferenceLogits
from qwenforge.targets import resolve_dtype
from qwenforge.tensorrt_choice import TensorRTChoice, needs_plugins

DEFAULT_MAX_LENGTH = 32768
"""Longest context of a bundle unless asked otherwise; the model's own limit when that is shorter."""
TENSORRT_MAX_BATCH = 8
"""The largest batch of a TensorRT engine's profiles unless asked otherwise."""
_DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class ExportReport:
    """What an export made.

    Attributes:
        bundle: its folder.
        target, dtype: what it was lowered to.
        steps: the graph passes and their matches on the traced template.
        nodes: nodes of the final graph.
        data_bytes: bytes of weights written.
        linked_bytes: bytes of weights referred to in the checkpoint's files.
        seconds: wall time of each stage.
        verification: the comparison with transformers; None when it was turned off.
        lowering: what a TensorRT graph was lowered for; None for other targets.
        ort_cuda: what an ort-cuda graph is made of; None for other targets.
        ort_cpu: whose kernels compute an ort-cpu graph's quantized weights, why, and in which caches; None where
            there was no choice.
        quantization: how it was quantized and what that cost; None where it was not.
        static_scales: what a quantized checkpoint's scales of activations and caches did; None where none are applied.
        scales_left_out: what of them is not applied, and why, a sentence each.
    """

    bundle: Path
    target: str
    dtype: str
    steps: list[Step]
    nodes: int
    data_bytes: int
    linked_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    verification: VerificationReport | None = None
    lowering: LoweringRecord | None = None
    ort_cuda: OrtCudaRecord | None = None
    ort_cpu: OrtCpuRecord | None = None
    quantization: QuantizationOutcome | None = None
    static_scales: ScalesOutcome | None = None
    scales_left_out: tuple[str, ...] = ()


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    target: str = "ort-cpu",
    dtype: str | None = None,
    weights: str = "copy",
    max_length: int | None = None,
    max_batch: int | None = None,
    verify_result: bool = True,
    verify_passes: bool = False,
    choice: LoweringChoice | None = None,
    dequantize: bool = False,
    quantization: QuantizationRequest | None = None,
    static_scales: ScalesRequest | None = None,
    kernels: Kernels | None = None,
    cache: Literal["fp32"] | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Export ``checkpoint`` to the bundle folder ``output``.

    Args:
        checkpoint: a Hugging Face folder (config.json, safetensors, tokenizer files).
        output: the bundle; replaced atomically if it is one already.
        target: one of ``qwenforge.targets``.
        dtype: ``fp32``, ``fp16`` or ``bf16``; by default what the target runs best.
        weights: ``copy`` streams them into the bundle, ``link`` refers to the checkpoint's bytes where the layout
            and dtype are the same.
        max_length: longest context; by default the model's own limit, at most 32768, and 4096 for TensorRT.
        max_batch: largest batch, recorded in the manifest; None for any, and for 8 with TensorRT.
        verify_result: compare with transformers before the bundle appears.
        verify_passes: also compare the graph before and after every pass.
        choice: how to lower for a GPU (``lowering_choice.choose``); by default what that makes of ``target`` alone.
        dequantize: store the weights of a checkpoint that is quantized already in ``dtype``.
        quantization: how to quantize, and what the result is held to; None leaves weights in ``dtype``.
        static_scales: what becomes of a quantized checkpoint's scales of activations and caches; by default they are
            applied where the target can use them.
        kernels: whose compute quantized weights on ort-cpu, ``qwenforge`` or ``onnxruntime``; by default ours where
            they are installed and made for this processor (:func:`~qwenforge.engine.cpu_kernels.choose_kernels`).
        cache: ``fp32`` keeps key/value caches in fp32 with our CPU kernels, which have them in fp16 otherwise.
        progress: told what is going on.

    Raises:
        UserError: the checkpoint is damaged or unsupported, the output is not replaceable, or the result is wrong
            or misses its budget.
    """
    clock = StageClock(progress)
    source = Checkpoint.open(Path(checkpoint))
    if choice is None:
        choice = choose(target)
    tensorrt = choice if isinstance(choice, TensorRTChoice) else None
    chosen = resolve_dtype(target, dtype, choice.device if choice is not None else None)
    if dequantize and source.quantized is None:
        raise UserError(f"--dequantize is for quantized checkpoints, and {source.folder} is none; leave it out.")
    # What is widened is rounded once, as a whole, like any other weight.
    source = source.widened() if dequantize else source.with_scales_in(_DTYPES[chosen])
    scales = static_scales or ScalesRequest()
    require_scales(source, scales)
    length = context_length(source, max_length, DEFAULT_MAX_LENGTH if tensorrt is None else TENSORRT_MAX_LENGTH)
    if tensorrt is not None and max_batch is None:
        max_batch = TENSORRT_MAX_BATCH
    if weights not in ("copy", "link"):
        raise UserError(f"--weights is copy or link, not {weights}.")
    if weights == "link" and choice is not None:
        raise UserError(f"--weights link does not go with --target {target}, which packs the weights; leave it out.")
    if weights == "link" and quantization is not None:
        raise UserError("--weights link refers to the checkpoint's bytes, which --quantize changes; leave it out.")
    if quantization is not None and source.quantized is not None:
        raise UserError(
            f"{source.folder} holds {source.quantized.format.summary} weights already; leave --quantize out, or give "
            "the unquantized checkpoint."
        )
    if tensorrt is not None and tensorrt.weights_as == "inputs":
        require_weight_inputs(
            source, quantized=quantization is not None or (source.quantized is not None and not source.is_widened)
        )
    if quantization is not None:
        import matplotlib  # noqa: F401  (the report's plots need it: missing, it is missed now and not after hours)

        if choice is not None and choice.device is not None:
            require_device(quantization.recipe, choice.device)
        require_target(quantization.recipe, target, choice)
        require_place_for_report(Path(output))
    activations = quantization is not None and quantization.recipe.activation is not None
    # Codes of 8-bit floats have no kernel on a CPU at all, which the lowering says.
    codes = source.quantized is not None and not source.is_widened and source.quantized.format.weight_format != "fp8"
    ort_cpu = choose_kernels(
        kernels,
        cache=cache,
        target=target,
        dtype=chosen,
        weights=weights,
        weight_only=codes or (quantization is not None and not activations),
    )
    with ExitStack() as stack:
        # Outermost, so that whatever goes wrong inside leaves calibration's state to be taken up again.
        work = None if quantization is None else stack.enter_context(kept_work_folder(quantization, Path(output)))
        writer = stack.enter_context(BundleWriter(output))
        clock.start("trace")
        traced = trace(source, _DTYPES[chosen])
        writer.add_json(LAYER_BEFORE, _layer_nodes(traced.model))
        clock.start("fuse")
        result = optimize(traced.model, target="portable", verify=verify_passes, positions=length)
        require_fused(result.model, traced, source)
        clock.start("instantiate")

        def build() -> ir.Model:
            return instantiate(result.model, traced, source)

        def verified(path: Path, twin: Path | None = None) -> VerificationReport:
            clock.start("verify against transformers")
            tokenizer = source.tokenizer_files.get(TOKENIZER)
            prompts = verification_prompts(tokenizer, source.config.vocab_size, length // 2)
            return verify(
                source, path, _DTYPES[chosen], prompts, max_length=length, twin=twin, progress=clock.steps_done
            )

        report = quantized = outcome = scaled = scaled_outcome = stored_record = None
        usable = UsableScales(None)
        unquantized_bytes = 0
        if quantization is None or work is None:
            portable = build()
            usable = usable_scales(
                source,
                portable,
                scales,
                target=target,
                dtype=_DTYPES[chosen],
                choice=choice,
            )
            if source.quantized is not None and not source.is_widened:
                stored_record = checkpoint_record(portable, usable.plan)
            if usable.plan is not None:
                if kernels == "qwenforge":
                    raise UnsupportedError(
                        "--kernels qwenforge multiplies unquantized activations, and the checkpoint's static scales "
                        "are to be applied; add --static-scales ignore, or leave --kernels out."
                    )
                if cache is not None:
                    raise UnsupportedError(
                        f"--cache {cache} is for qwenforge's CPU kernels, and the checkpoint's static scales are to be "
                        "applied, which those do not; add --static-scales ignore, or leave --cache out."
                    )
                ort_cpu = None
                folder = TemporaryDirectory(prefix=f".{Path(output).name}.", dir=Path(output).absolute().parent)
                scaled = ScaledExport(
                    source,
                    usable.plan,
                    scales,
                    dtype=_DTYPES[chosen],
                    max_length=length,
                    folder=Path(stack.enter_context(folder)),
                    progress=clock.tell,
                )
                clock.start("write weights alone")
                alone = scaled.save_weights_alone(portable)
                report = verified(alone) if verify_result else None
                portable = scaled.applied(build())
        else:
            quantized = QuantizedExport(
                quantization,
                source,
                build,
                dtype=_DTYPES[chosen],
                max_length=length,
                work_folder=work,
                progress=clock.tell,
            )
            quantized.read_texts()
            clock.start("write unquantized")
            unquantized_bytes = quantized.save_unquantized()
            report = verified(quantized.unquantized) if verify_result else None
            clock.start("calibrate")
            portable = quantized.calibrated()
        clock.start("lower")
        capacity = length if tensorrt is not None else None
        graphs = twin = None
        with _naming_dequantize(source):
            ours = ort_cpu is not None and ort_cpu.kernels == "qwenforge"
            if target == "ort-cpu" and (quantization is not None or ours):
                if ours and quantization is None and verify_result:
                    twin = lower(portable.clone(), target)
                optimized_for = quantization.optimize if quantization is not None else "latency"
                graphs = lower_quantized(
                    portable,
                    optimized_for,
                    kernels=ort_cpu.kernels if ort_cpu is not None else "onnxruntime",
                    cache=ort_cpu.cache if ort_cpu is not None else "fp32",
                )
                final = graphs.decode
                if ort_cpu is not None:
                    ort_cpu = ort_cpu.model_copy(update={"cache": graphs.cache})
            else:
                final = lower(portable, target, weights=weights, choice=choice, capacity=capacity)
        if isinstance(choice, OrtCudaChoice):
            require_cuda_kernels(final)
        bound = split_weight_inputs(final) if tensorrt is not None and tensorrt.weights_as == "inputs" else {}
        weight_inputs = tuple(tensor_spec(value) for value in final.graph.inputs if value.name in bound)
        clock.start("write weights")
        links = (
            link_checkpoint_files(writer.directory, list(source.weight_files.values())) if weights == "link" else None
        )
        if graphs is not None:
            both = save_graphs(graphs, writer.directory, twin=twin, progress=clock.bytes_done)
            saved, written = both.decode, [file for file in both.files if file.path.suffix == ".data"]
        else:
            saved = save_model(final, writer.directory / MODEL_NAME, progress=clock.bytes_done, link=links)
            written = [saved.data] if saved.data is not None else []
        _drop_unused_links(writer.directory, saved.linked_bytes, links)
        if bound:
            path = writer.directory / ENGINE_WEIGHTS
            written.append(write_safetensors(path, bound, progress=clock.bytes_done))
        data_bytes = sum(file.bytes for file in written)
        if quantized is not None:
            clock.start("measure accuracy")
            judged = [MODEL_NAME] + ([PREFILL_NAME] if graphs is not None and graphs.prefill is not None else [])
            outcome = quantized.judge(
                [writer.directory / name for name in judged],
                target=target,
                dtype=chosen,
                unquantized_bytes=unquantized_bytes,
                quantized_bytes=data_bytes,
                session_options=graphs.session_options if graphs is not None else {},
            )
            refuse_beyond_budget(outcome, Path(output))
            writer.add_text(ACCURACY_PAGE, accuracy_page(outcome))
        elif scaled is not None:
            clock.start("measure accuracy")
            applied = scaled.applied(build())
            scaled_outcome = scaled.judge(writer.directory / MODEL_NAME, applied, {})
            stored_record = judged_record(stored_record, scaled_outcome) if stored_record is not None else None
        elif verify_result:
            place = writer.directory / TWIN_NAME
            report = verified(writer.directory / MODEL_NAME, place if twin is not None else None)
            for path in (place, place.with_name(f"{TWIN_NAME}.data")):
                path.unlink(missing_ok=True)
        clock.start("finish")
        for name, path in source.tokenizer_files.items():
            writer.add_file(path, name)
        writer.add_json(GENERATION_CONFIG, generation_config(source))
        _add_accuracy(writer, chosen, report, outcome, scaled_outcome, usable.left_out)
        facts = bundle_facts(
            source, final, target, chosen, weights, Limits(max_length=length, max_batch=max_batch), report
        )
        if isinstance(choice, OrtCudaChoice):
            facts = facts.model_copy(update={"ort_cuda": _ort_cuda(choice, final)})
        if ort_cpu is not None:
            facts = facts.model_copy(update={"ort_cpu": ort_cpu})
        if graphs is not None:
            facts = facts.model_copy(update={"prefill": graphs.record, "session_options": graphs.session_options})
        recorded = outcome.record() if outcome is not None else stored_record
        if recorded is not None:
            facts = facts.model_copy(update={"quantization": recorded})
        if tensorrt is not None:
            record = _lowering(tensorrt, final)
            facts = facts.model_copy(update={"lowering": record, "weight_inputs": weight_inputs})
            writer.add_text(README, tensorrt_readme(facts))
            if needs_plugins(record):
                writer.add_text(POLYGRAPHY_NETWORK, POLYGRAPHY_SCRIPT)
        bundle = writer.commit(facts, known_sha256={file.path.name: file.sha256 for file in written})
    withdraw_refusal(Path(output))
    return ExportReport(
        bundle=bundle,
        target=target,
        dtype=chosen,
        steps=result.steps,
        nodes=final.graph.num_nodes(),
        data_bytes=data_bytes,
        linked_bytes=saved.linked_bytes,
        seconds=clock.finish(),
        verification=report,
        lowering=facts.lowering,
        ort_cuda=facts.ort_cuda,
        ort_cpu=facts.ort_cpu,
        quantization=outcome,
        static_scales=scaled_outcome,
        scales_left_out=usable.left_out,
    )


def _lowering(choice: TensorRTChoice, model: ir.Model) -> LoweringRecord:
    operators = {node.op_type for node in model.graph}
    mixed = choice.attention == "native" and "QwenForgeAttention" in operators
    return choice.record(routed=bool(operators & {"QwenForgeMoE", "TRT_MoE"}), mixed=mixed)


def _ort_cuda(choice: OrtCudaChoice, model: ir.Model) -> OrtCudaRecord:
    return choice.record(routed=bool({"QwenForgeMoE", "MoE"} & {node.op_type for node in model.graph}))


def _layer_nodes(model: ir.Model) -> list[dict[str, Any]]:
    """The traced nodes of the first layer, for ``inspect --html``'s before and after."""
    found = []
    for node in model.graph:
        if "model.layers.0'" in node.metadata_props.get("pkg.torch.onnx.name_scopes", ""):
            found.append(
                {
                    "op": node.op_type,
                    "inputs": [value.name for value in node.inputs if value is not None],
                    "outputs": [value.name for value in node.outputs],
                    "name": node.name,
                }
            )
    return found


def _drop_unused_links(folder: Path, linked_bytes: int, links: object) -> None:
    if links is None or linked_bytes:
        return
    import shutil

    shutil.rmtree(folder / "weights", ignore_errors=True)
    raise UnsupportedError(
        "--weights link found no tensor whose bytes can be used as they are: the checkpoint's dtype differs from the "
        "bundle's. Use --weights copy, or choose --dtype as stored."
    )


def _add_accuracy(
    writer: BundleWriter,
    dtype: str,
    report: VerificationReport | None,
    outcome: QuantizationOutcome | None,
    scaled: ScalesOutcome | None,
    left_out: Sequence[str],
) -> None:
    quantization: dict[str, Any] = {} if outcome is None else {"quantization": outcome.to_json()}
    if scaled is not None:
        quantization["static_scales"] = scaled.to_json()
    if left_out:
        quantization["static_scales_left_out"] = list(left_out)
    if report is None:
        writer.add_accuracy({"verified": False, **quantization})
        return
    references = [
        ReferenceLogits.from_logits(prompt, [len(prompt) - 1], logits[None]) for prompt, logits in report.references
    ]
    writer.add_accuracy(
        {
            "verified": True,
            "reference": reference_name(dtype),
            "method": report.method,
            "prompts": report.prompts,
            "new_tokens": report.new_tokens,
            "positions": report.positions,
            "positions_beyond_bound": report.strays,
            "max_abs_error": report.max_abs_error,
            "max_abs_error_in_fp32": report.graph_error,
            "bound": report.bound,
            "mean_kl": report.mean_kl,
            "max_kl": report.max_kl,
            "token_disagreements": report.token_disagreements,
            "near_ties": report.near_ties,
            **quantization,
        },
        references,
    )


@contextmanager
def _naming_dequantize(source: Checkpoint) -> Iterator[None]:
    """Add the way out to what a lowering refuses of a checkpoint that is quantized already."""
    try:
        yield
    except UnsupportedError as error:
        if source.quantized is None or source.is_widened:
            raise
        raise UnsupportedError(
            f"{str(error).rstrip('.')}; the checkpoint holds {source.quantized.format.summary} weights, which "
            "--dequantize stores in the model's own dtype instead."
        ) from error
