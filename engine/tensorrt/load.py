"""An engine of a bundle, loaded on its GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwenforge.bundle import Bundle
from qwenforge.engine.tensorrt.compatibility import require_engine
from qwenforge.engine.tensorrt.gpu import LocalGpu, local_gpu
from qwenforge.engine.tensorrt.logger import make_logger
from qwenforge.engine.tensorrt.modules import import_tensorrt
from qwenforge.engine.tensorrt.plugin_library import find_plugin_library, register
from qwenforge.errors import UserError


def load_engine(bundle: Bundle, *, gpu: Callable[[], LocalGpu | None] = local_gpu) -> tuple[Any, Any]:
    """NVIDIA's module and the bundle's engine (its ``ICudaEngine``); a stripped engine is refitted from the graph.

    Raises:
        UserError: there is no engine, it is not for this GPU or version, or TensorRT does not take it.
    """
    record = bundle.manifest.engine
    found = gpu()
    if record is not None and found is None:
        raise UserError("TensorRT loads an engine on its GPU only, and none is visible here.")
    module = import_tensorrt(record.target if record is not None else bundle.manifest.target)
    library = find_plugin_library(None) if record is not None and record.plugin_library is not None else None
    record = require_engine(bundle, found, module.__version__, library.version if library is not None else None)
    logger = make_logger(module)
    if library is not None:
        register(module, library)
    engine = module.Runtime(logger).deserialize_cuda_engine((bundle.path / record.file).read_bytes())
    if engine is None:
        raise UserError(f"TensorRT {module.__version__} does not load {record.file}: {' '.join(logger.errors[:1])}")
    if record.options.get("strip_weights"):
        _refit(module, engine, bundle, logger)
    return module, engine


def _refit(module: Any, engine: Any, bundle: Bundle, logger: Any) -> None:
    """Give a stripped engine the weights of the bundle's graph."""
    refitter = module.Refitter(engine, logger)
    parsed = module.OnnxParserRefitter(refitter, logger).refit_from_file(str(bundle.model_path.resolve()))
    if not parsed or not refitter.refit_cuda_engine():
        raise UserError(
            f"TensorRT {module.__version__} does not take the weights of {bundle.model_path} for the stripped engine "
            f"({' '.join(logger.errors[:1])}): build it again with --rebuild and without --strip-weights."
        )
