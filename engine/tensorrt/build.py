"""From a bundle's graph to an engine in the bundle.

check what can be checked -> parse -> profiles and configuration -> build -> record
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenforge import __version__
from qwenforge.bundle import Bundle
from qwenforge.bundle_update import attach_engine, remove_dead_scratch, scratch_path
from qwenforge.devices import Device, get_device
from qwenforge.engine.native_library import NativeLibrary
from qwenforge.engine.tensorrt import timing_cache
from qwenforge.engine.tensorrt.compatibility import export_command, require_build_device
from qwenforge.engine.tensorrt.gpu import LocalGpu, local_gpu
from qwenforge.engine.tensorrt.logger import make_logger
from qwenforge.engine.tensorrt.memory import MemoryNeed, memory_need, require_memory
from qwenforge.engine.tensorrt.modules import MODULES, import_tensorrt, numbers, require_version
from qwenforge.engine.tensorrt.options import BuildOptions
from qwenforge.engine.tensorrt.parser_errors import build_problem, parse_problem
from qwenforge.engine.tensorrt.plugin_library import find_plugin_library, register
from qwenforge.engine.tensorrt.profiles import profile_shapes
from qwenforge.engine.tensorrt.progress import Progress, make_monitor
from qwenforge.errors import GraphError, UnsupportedError, UserError
from qwenforge.machine import describe, high_water_mark
from qwenforge.manifest import MODEL_NAME, EngineRecord, LoweringRecord, ProfileRecord
from qwenforge.tensorrt_choice import RTX_SMS, TENSORRT_RTX, needs_plugins

_ALIASED = "ALIASED_PLUGIN_IO_10_03"


@dataclass(frozen=True)
class BuildReport:
    """The engine of a bundle.

    Attributes:
        bundle: its folder.
        record: what the manifest says of it.
        engine_bytes: its size.
        built: False where the bundle held just this engine already.
        memory_bound: what the build was expected to take of host memory at most, in bytes.
        warnings: TensorRT's.
    """

    bundle: Path
    record: EngineRecord
    engine_bytes: int
    built: bool
    memory_bound: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Job:
    """One build, decided: what to build, with what and for what."""

    bundle: Bundle
    lowering: LoweringRecord
    target: str
    device: Device | None
    options: BuildOptions
    profiles: list[ProfileRecord]
    module: Any
    gpu: LocalGpu | None
    library: NativeLibrary | None
    cache: Path | None
    memory: MemoryNeed


def build_engine(
    bundle: Path,
    options: BuildOptions | None = None,
    *,
    gpu: Callable[[], LocalGpu | None] = local_gpu,
    progress: Progress = lambda what, done: None,
) -> BuildReport:
    """Build the engine of a bundle and put it there; the bundle is as before when anything goes wrong.

    Args:
        bundle: the folder of a bundle that was exported for ``tensorrt`` or ``tensorrt-rtx``.
        options: see :class:`BuildOptions`.
        gpu: finds the GPU to build on.
        progress: called with what is being done; what it raises stops the build.

    Raises:
        UserError: something is missing or does not go together; one sentence that says what to do.
        KeyboardInterrupt: interrupted; nothing was left behind.
    """
    job = _decide(Bundle.open(bundle), options or BuildOptions(), gpu())
    remove_dead_scratch(bundle)
    if not job.options.rebuild and (report := _up_to_date(job)) is not None:
        return report
    started = time.perf_counter()
    progress("parse", 0.0)
    logger = make_logger(job.module)
    engine, layers = _Interruptible(progress).run(lambda cancelled, tell: _compile(job, logger, cancelled, tell))
    progress("write", 0.0)
    scratch = scratch_path(bundle)
    try:
        _write(scratch, engine)
        record = EngineRecord(
            file="engine.plan",
            target=job.target,
            device=job.device.name if job.device is not None else None,
            sm=job.device.sm if job.device is not None else None,
            module=MODULES[job.target],
            tensorrt=job.module.__version__,
            driver=job.gpu.driver if job.gpu is not None else None,
            plugin_library=job.library.version if job.library is not None else None,
            layout_version=job.lowering.layout_version,
            model_sha256=job.bundle.manifest.files[MODEL_NAME].sha256,
            profiles=tuple(job.profiles),
            options=job.options.recorded(),
            layers=layers,
            build_seconds=round(time.perf_counter() - started, 3),
            peak_build_bytes=high_water_mark("self"),
            qwenforge_version=__version__,
        )
        manifest = attach_engine(job.bundle, scratch, record)
    finally:
        scratch.unlink(missing_ok=True)
    assert manifest.engine is not None
    return BuildReport(
        bundle,
        manifest.engine,
        manifest.files[manifest.engine.file].bytes,
        True,
        job.memory.host,
        tuple(logger.warnings),
    )


def _decide(bundle: Bundle, options: BuildOptions, gpu: LocalGpu | None) -> _Job:
    """Everything that can be refused before any work."""
    manifest, lowering = bundle.manifest, bundle.manifest.lowering
    if lowering is None:
        raise UserError(
            f"{bundle.path} was exported for {manifest.target}, which has no engine to build: export the checkpoint "
            "with --target tensorrt --device D, or --target tensorrt-rtx."
        )
    target = manifest.target
    if options.target is not None and options.target != target:
        raise UserError(
            f"{bundle.path} was exported for {target}: export the checkpoint with --target {options.target}, or leave "
            "--target out."
        )
    options.check(target)
    device = _device(bundle, lowering, options.device)
    profiles = profile_shapes(manifest, options.sizes)
    require_build_device(target, device, gpu, str(bundle.path))
    need = memory_need(manifest, *profiles[0].maximum["input_ids"], rtx=target == TENSORRT_RTX)
    if options.check_memory:
        at_hand = gpu is not None and target != TENSORRT_RTX
        require_memory(
            need, describe().available_bytes, device, gpu.memory_bytes if gpu is not None and at_hand else None
        )
    library = find_plugin_library(options.plugin_library) if needs_plugins(lowering) else None
    module = import_tensorrt(target)
    version = ".".join(str(number) for number in numbers(module.__version__)[:2])
    require_version(target, module.__version__, lowering, export_command(target, lowering.device, version))
    cache = options.timing_cache
    if target == TENSORRT_RTX:
        cache = None  # it has no timings to keep: kernels are chosen on the device
        if not hasattr(module, "ComputeCapability"):
            device = None  # this module cannot leave devices out
    elif cache == Path():
        assert device is not None
        cache = timing_cache.default_path(device.name, device.sm, module.__version__, gpu.driver if gpu else None)
    return _Job(bundle, lowering, target, device, options, profiles, module, gpu, library, cache, need)


def _device(bundle: Bundle, lowering: LoweringRecord, asked: str | None) -> Device | None:
    """The device to build for: the bundle's, or one that its graph was lowered for just as well."""
    if asked is None:
        return get_device(lowering.device) if lowering.device is not None else None
    device = get_device(asked)
    if lowering.tensorrt == "rtx":
        if device.sm not in RTX_SMS:
            raise UnsupportedError(
                f"TensorRT for RTX does not run on {asked} (SM {device.sm}): export the checkpoint with "
                f"{export_command('tensorrt', asked, None)}."
            )
        if lowering.sm is None or lowering.sm == device.sm:
            return device
    elif device.sm == lowering.sm:
        device.require_tensorrt(lowering.tensorrt)
        return device
    raise UserError(
        f"{bundle.path} was lowered for {lowering.device} (SM {lowering.sm}), not for {asked} (SM {device.sm}): export "
        f"the checkpoint with {export_command(bundle.manifest.target, asked, None)}."
    )


def _up_to_date(job: _Job) -> BuildReport | None:
    """The report of the engine that is there, when a build would give the same."""
    record = job.bundle.manifest.engine
    if record is None:
        return None
    same = (
        record.target == job.target
        and record.device == (job.device.name if job.device is not None else None)
        and record.tensorrt == job.module.__version__
        and record.driver == (job.gpu.driver if job.gpu is not None else None)
        and record.plugin_library == (job.library.version if job.library is not None else None)
        and record.model_sha256 == job.bundle.manifest.files[MODEL_NAME].sha256
        and record.profiles == tuple(job.profiles)
        and record.options == job.options.recorded()
        and record.qwenforge_version == __version__
    )
    if not same:
        return None
    size = job.bundle.manifest.files[record.file].bytes
    return BuildReport(job.bundle.path, record, size, False, job.memory.host)


def _compile(job: _Job, logger: Any, cancelled: threading.Event, progress: Progress) -> tuple[Any, int]:
    """Parse and build; the serialized engine and the number of the network's layers."""
    trt = job.module
    builder = trt.Builder(logger)
    if job.library is not None:
        register(trt, job.library)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    # From the file: a graph with its weights may be larger than a protobuf can be.
    if not parser.parse_from_file(str(job.bundle.model_path.resolve())):
        raise GraphError(parse_problem(parser, logger.errors, trt.__version__))
    config = builder.create_builder_config()
    _configure(job, config)
    for record in job.profiles:
        profile = builder.create_optimization_profile()
        for name in record.minimum:
            profile.set_shape(name, record.minimum[name], record.typical[name], record.maximum[name])
        config.add_optimization_profile(profile)
    timing_cache.attach(config, job.cache)
    monitor = make_monitor(trt, progress, cancelled)
    config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        if cancelled.is_set():
            raise KeyboardInterrupt
        raise GraphError(build_problem(logger.errors, trt.__version__))
    timing_cache.save(config, job.cache)
    return engine, network.num_layers


def _network_flags(trt: Any) -> int:
    """Strongly typed; TensorRT 11 and RTX know no other network."""
    if numbers(trt.__version__)[0] == 10:
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 0


def _configure(job: _Job, config: Any) -> None:
    trt, options = job.module, job.options
    if job.library is not None and job.lowering.attention != "native":
        config.set_preview_feature(getattr(trt.PreviewFeature, _ALIASED), True)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if options.hardware_compatible != "none":
        levels = {"ampere+": "AMPERE_PLUS", "same-cc": "SAME_COMPUTE_CAPABILITY"}
        level = getattr(trt.HardwareCompatibilityLevel, levels[options.hardware_compatible], None)
        if level is None:
            raise UnsupportedError(
                f"TensorRT {trt.__version__} has no --hardware-compatible {options.hardware_compatible}; leave it out."
            )
        config.hardware_compatibility_level = level
    if job.target == TENSORRT_RTX and job.device is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{job.device.sm}"), 0)


class _Interruptible:
    """Runs work in a thread while the main thread waits for it, so that Ctrl-C is noticed within a step of the builder.

    ``progress`` is only ever called in the caller's thread; what it raises stops the work too.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._cancelled = threading.Event()
        self._latest: tuple[str, float] = ("parse", 0.0)

    def run(self, work: Callable[[threading.Event, Progress], tuple[Any, int]]) -> tuple[Any, int]:
        results: list[tuple[Any, int]] = []
        failures: list[BaseException] = []
        # Not Thread.join: interrupted, it takes the thread for finished (Python 3.11), and the process would end under
        # the builder's feet.
        done = threading.Event()

        def target() -> None:
            try:
                results.append(work(self._cancelled, self._remember))
            except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
                failures.append(error)
            finally:
                done.set()

        threading.Thread(target=target, name="tensorrt-build").start()
        stopped: BaseException | None = None
        while not done.is_set():
            try:
                done.wait(0.1)
                if stopped is None:
                    self._progress(*self._latest)
            except BaseException as error:  # noqa: BLE001 - raised again below, once the builder has stopped
                stopped = stopped or error
                self._cancelled.set()
        if stopped is not None:
            raise stopped
        if failures:
            raise failures[0]
        return results[0]

    def _remember(self, what: str, done: float) -> None:
        self._latest = (what, done)


def _write(path: Path, engine: Any) -> None:
    try:
        with path.open("wb") as file:
            file.write(memoryview(engine))
    except OSError as error:
        raise UserError(
            f"the engine cannot be written beside the bundle, to {path.parent} ({error.strerror}): free space, or give "
            "it write permission."
        ) from error
