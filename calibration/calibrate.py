"""Calibration of a whole model: a recipe, a portable graph and text become a quantization plan.

The graph is cut into pieces, one a layer, which run one after the other on all calibration rows. No more than one
piece's weights and one row's activations are in memory: weights are read from the checkpoint when their piece comes,
and what later pieces read lies on disk. Each layer is given what the *unquantized* layers before it make.

After each piece its results are committed to the work folder; a calibration that is killed and run again goes on there,
and ends with the same bits: rows run one at a time and in order, sums are taken in that order, and the number of ONNX
Runtime's threads is that of the first run.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwenforge.calibration import fluency
from qwenforge.calibration.activations import Activation
from qwenforge.calibration.data import CalibrationData
from qwenforge.calibration.expert_site import ExpertCalibration
from qwenforge.calibration.experts import Experts
from qwenforge.calibration.layer import LayerCalibration
from qwenforge.calibration.outliers import outlier_warnings
from qwenforge.calibration.piece_run import PieceRun, PieceValues
from qwenforge.calibration.pieces import RunnablePiece, split_by_site
from qwenforge.calibration.places import Place, find_places
from qwenforge.calibration.progress import Listener, Meter
from qwenforge.calibration.ranges import scale_of
from qwenforge.calibration.recipes import Recipe, require_matches
from qwenforge.calibration.spill import SpilledValue
from qwenforge.calibration.work_folder import (
    Coverage,
    Outlier,
    PieceResult,
    StoredValue,
    WorkFolder,
    identity_of,
    stored_threads,
)
from qwenforge.errors import UserError
from qwenforge.exporter import weights
from qwenforge.graph_passes.infra import weight
from qwenforge.graph_passes.quantize.plan import CachePlan, QuantizationPlan
from qwenforge.graph_passes.quantize.sites import CacheSite, ExpertSite, LinearSite, Sites, find_sites

Array = npt.NDArray[Any]

CPU: tuple[str, ...] = ("CPUExecutionProvider",)


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration found.

    Attributes:
        plan: what the graph passes apply; its numbers lie in the work folder until the plan is saved elsewhere.
        coverage: the tokens of each expert, layer by layer; empty for dense models and without data.
        outliers: channels far larger than others.
        warnings: what a user should know, a sentence each.
        mean_loss: of the unquantized model on the calibration text, nats a token; None without data.
        tokens: of the calibration data.
        seconds: that this run took; what an earlier run did is not in it.
    """

    plan: QuantizationPlan
    coverage: tuple[Coverage, ...]
    outliers: tuple[Outlier, ...]
    warnings: tuple[str, ...]
    mean_loss: float | None
    tokens: int
    seconds: float


def calibrate(
    model: ir.Model,
    recipe: Recipe,
    data: CalibrationData | None = None,
    *,
    work_folder: Path,
    progress: Listener | None = None,
    providers: Sequence[str] = CPU,
    threads: int | None = None,
    require_prediction: bool = True,
) -> CalibrationResult:
    """Calibrate ``model`` as ``recipe`` says.

    Args:
        model: a portable model of full depth with lazy weights, of any exporter; it is not changed.
        recipe: what is asked for.
        data: text; None will do where ``recipe.needs_data`` is false.
        work_folder: for what is kept between runs and for activations, made if needed. It needs room for two layers'
            inputs of every token and one layer's weights in fp32; delete it when the plan was applied or saved.
        progress: told of every step.
        providers: ONNX Runtime's, in order of preference.
        threads: of ONNX Runtime; by default those of the run that is gone on with, or one a processor.
        require_prediction: refuse text that the model predicts no better than chance; False for random weights.

    Raises:
        UserError: the recipe needs text, an override matches nothing, a weight or an activation is not finite, the text
            means nothing to the model, or the work folder is another calibration's or full.
        GraphError: the graph is not of the portable form.
    """
    start = time.monotonic()
    if data is None and recipe.needs_data:
        raise UserError(f"the recipe {recipe.name} needs calibration text: give some, or use the built-in sample")
    sites = find_sites(model)
    require_matches(recipe, [*sites.linear, *sites.experts])
    threads = threads or stored_threads(work_folder) or _processors()
    settings = {
        "threads": threads,
        "providers": ",".join(providers),
        "onnxruntime": _version("onnxruntime", "onnxruntime-gpu"),
        "numpy": np.__version__,
    }
    folder = WorkFolder(work_folder, identity_of(model, recipe, data, settings))
    run = _Run(model, sites, recipe, data, folder, list(providers), threads)
    results = run.all_pieces(progress, require_prediction=require_prediction)
    return _result(recipe, sites, data, results, folder, time.monotonic() - start)


class _Run:
    """One run over all pieces."""

    def __init__(
        self,
        model: ir.Model,
        sites: Sites,
        recipe: Recipe,
        data: CalibrationData | None,
        folder: WorkFolder,
        providers: Sequence[str],
        threads: int,
    ) -> None:
        self._sites = sites
        self._recipe = recipe
        self._data = data
        self._folder = folder
        self._providers = providers
        self._threads = threads
        self._pieces = split_by_site(model, sites)
        self._probe = model.clone()  # smoothing by ones is tried out on it
        self._probe_sites = find_sites(self._probe)
        self._values: dict[str, SpilledValue] = {}
        self._last_reader = {
            str(value.name): index for index, piece in enumerate(self._pieces) for value in piece.graph.inputs
        }

    def all_pieces(self, progress: Listener | None, *, require_prediction: bool) -> list[PieceResult]:
        """The results of every piece, done now or by an earlier run."""
        meter = Meter(progress, len(self._pieces), self._data.tokens.size if self._data is not None else 1)
        results = []
        for index in range(len(self._pieces)):
            meter.begin(index)
            done = self._folder.committed(index)
            if done is not None:
                meter.skip()
                result = done
            else:
                self._delete_what_is_not_read()  # what an interrupted run left of this piece, too
                result = self._piece(index, meter)
            made = {name: self._folder.stored_value(each) for name, each in result.values.items()}
            self._values = {
                name: value for name, value in (self._values | made).items() if self._is_read_after(name, index)
            }
            if result.mean_loss is not None and self._data is not None:
                result.warnings += tuple(self._judge(result.mean_loss, require_prediction))
            results.append(result)
        self._delete_what_is_not_read()
        return results

    def _judge(self, mean_loss: float, require_prediction: bool) -> list[str]:
        assert self._data is not None
        head = next((site for site in self._sites.linear.values() if site.role == "vocabulary"), None)
        vocab_size = weights.dims(head.weight)[1] if head is not None else int(self._data.tokens.max()) + 1
        return fluency.judge(
            mean_loss, self._data.tokens, vocab_size, self._data.source, require_prediction=require_prediction
        )

    def _piece(self, index: int, meter: Meter) -> PieceResult:
        piece = self._pieces[index]
        made = {value.name for node in piece.graph for value in node.outputs}
        linear = [site for site in self._sites.linear.values() if site.node.outputs[0].name in made]
        experts = [site for site in self._sites.experts.values() if site.node.outputs[0].name in made]
        caches = [site for site in self._sites.caches.values() if site.node.outputs[0].name in made]
        if len(experts) > 1:
            raise ValueError(f"{len(experts)} expert sites in one piece")
        values = self._run_piece(index, linear, experts, caches, meter) if self._data is not None else None
        layer = LayerCalibration(
            self._recipe,
            linear,
            self._experts(experts[0], values) if experts else None,
            self._places(caches),
            self._inputs(linear, values),
        )
        result = layer.run(meter.tell)
        if values is not None:
            for cache in caches if self._recipe.cache is not None else ():
                self._cache_scales(cache, values.largest, layer)
                result.caches += (cache.name,)
            result.mean_loss = values.mean_loss
            result.values = {
                name: StoredValue(file=value.path.name, shape=value.shape or (), dtype=value.dtype or "")
                for name, value in values.spilled.items()
                if self._is_read_after(name, index)
            }
        self._folder.commit(index, result, layer.tensors)
        return result

    def _run_piece(
        self,
        index: int,
        linear: Sequence[LinearSite],
        experts: Sequence[ExpertSite],
        caches: Sequence[CacheSite],
        meter: Meter,
    ) -> PieceValues:
        assert self._data is not None
        piece = self._pieces[index]
        made = {str(value.name) for node in piece.graph for value in node.outputs}
        kept: dict[str, str] = {}
        for site in linear:
            if self._recipe.choose(site.name, site.role).weight is not None:
                kept.setdefault(_input(site.node, 0), f"the input of {site.name}")
        for each in experts:
            for name in _expert_inputs(each):
                kept.setdefault(name, f"the input of {each.name}")
        for name in sorted(made):
            if self._is_read_after(name, index):
                kept.setdefault(name, f"the value {name}")
        kept = {name: reader for name, reader in kept.items() if name in made}  # the rest is there already
        present = [str(value.name) for cache in caches for value in cache.node.outputs[1:3]]
        meter.tell("loading")
        runnable = RunnablePiece(
            piece, list(kept), self._folder.folder, threads=self._threads, providers=self._providers
        )
        try:
            run = PieceRun(
                piece,
                runnable,
                self._data.tokens,
                self._values,
                kept,
                present if self._recipe.cache is not None else [],
                self._folder.new_value,
            )
            return run.run(meter)
        finally:
            runnable.close()

    def _inputs(self, linear: Sequence[LinearSite], values: PieceValues | None) -> dict[str, Activation]:
        """What the quantized sites read; sites that read one value share it."""
        if values is None:
            return {}
        known: dict[str, Activation] = {}
        return {
            site.name: self._activation(_input(site.node, 0), values, known)
            for site in linear
            if self._recipe.choose(site.name, site.role).weight is not None
        }

    def _activation(self, name: str, values: PieceValues, known: dict[str, Activation]) -> Activation:
        if name not in known:
            assert self._data is not None
            own = name in values.spilled
            spilled = values.spilled[name] if own else self._values[name]
            known[name] = Activation(spilled, values.rows if own else len(self._data.tokens))
        return known[name]

    def _experts(self, site: ExpertSite, values: PieceValues | None) -> ExpertCalibration:
        tokens = logits = None
        if values is not None:
            tokens, logits = (self._activation(name, values, {}) for name in _expert_inputs(site))
        return ExpertCalibration(self._recipe, site.name, Experts(site, tokens, logits))

    def _places(self, caches: Sequence[CacheSite]) -> list[Place]:
        if self._recipe.smoothing is None:
            return []
        found = [find_places(self._probe, self._probe_sites, cache.layer) for cache in caches]
        return [place for places, _ in found for place in places]

    def _cache_scales(self, cache: CacheSite, largest: Mapping[str, Array], layer: LayerCalibration) -> None:
        assert self._recipe.cache is not None
        keys, values = (largest[str(output.name)] for output in cache.node.outputs[1:3])
        divisors = layer.row_divisors.get(f"model.layers.{cache.layer}.self_attn.v_proj")
        if divisors is not None:
            values = values / divisors.reshape(values.shape)
        to_scale = np.vectorize(lambda value: scale_of(float(value), self._recipe.cache or "int8"), otypes=[np.float32])
        layer.tensors[f"{cache.name}.key_scales"] = to_scale(keys)
        layer.tensors[f"{cache.name}.value_scales"] = to_scale(values.max(1))

    def _is_read_after(self, name: str, index: int) -> bool:
        return self._last_reader.get(name, -1) > index

    def _delete_what_is_not_read(self) -> None:
        self._folder.keep_only({value.path.name for value in self._values.values()})


def _input(node: ir.Node, index: int) -> str:
    value = node.inputs[index]
    assert value is not None
    return str(value.name)


def _expert_inputs(site: ExpertSite) -> tuple[str, str]:
    """The names of the tokens and of the router's logits."""
    return _input(site.node, 0), _input(site.node, 1)


def _result(
    recipe: Recipe,
    sites: Sites,
    data: CalibrationData | None,
    results: Sequence[PieceResult],
    folder: WorkFolder,
    seconds: float,
) -> CalibrationResult:
    outliers = tuple(each for result in results for each in result.outliers)
    warnings = [*(data.warnings if data is not None else ())]
    warnings += [sentence for result in results for sentence in result.warnings]
    warnings += outlier_warnings(outliers)
    if sites.unknown:
        example = sites.unknown[0]
        matrix = weight(example.inputs[1])
        shape = list(weights.dims(matrix)) if matrix is not None else []
        warnings.append(
            f"{len(sites.unknown)} products by constants are of no known role and stay as they are, such as node "
            f"{example.name} by {shape}"
        )
    caches = {name for result in results for name in result.caches}
    plan = QuantizationPlan(
        recipe=recipe.name,
        sites={name: choice for result in results for name, choice in result.sites.items()},
        caches={name: CachePlan(format=recipe.cache) for name in sites.caches if name in caches and recipe.cache},
        smoothed=tuple(name for result in results for name in result.smoothed),
        tensors=folder.tensors(len(results)),
    )
    return CalibrationResult(
        plan=plan,
        coverage=tuple(each for result in results for each in result.coverage),
        outliers=outliers,
        warnings=tuple(warnings),
        mean_loss=next((result.mean_loss for result in reversed(results) if result.mean_loss is not None), None),
        tokens=data.tokens.size if data is not None else 0,
        seconds=seconds,
    )


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(*packages: str) -> str:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
