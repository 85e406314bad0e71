"""The part of an export that quantizes: from the fused graph to a quantized portable one, and the gate behind it.

unquantized portable model on disk -> verified -> calibrated -> plan applied -> (lowered and written) -> judged

The unquantized model lies in the work folder, because it is read three times: by the comparison with transformers, by
calibration and by the gate. The folder goes with a successful export; after a failure or an interruption it stays, and
the same command takes up calibration where it stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from qwenforge.calibration.calibrate import CalibrationResult, calibrate
from qwenforge.calibration.data import ROW_LENGTH, ROWS, load_calibration_data
from qwenforge.calibration.heldout import HeldOutText, load_heldout
from qwenforge.engine.accuracy_run import AccuracyRun, measure
from qwenforge.engine.quantization_request import QuantizationRequest
from qwenforge.engine.verification import fits_whole
from qwenforge.errors import UserError
from qwenforge.exporter.checkpoint import Checkpoint
from qwenforge.exporter.external_data import save_model
from qwenforge.graph_passes.quantize.apply import apply_plan
from qwenforge.graph_passes.quantize.plan import QuantizationPlan
from qwenforge.manifest import MODEL_NAME

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done, 0..1."""


class QuantizedExport:
    """One export's quantization, in steps.

    Args:
        request: what is asked for.
        source: the checkpoint.
        build: makes a new unquantized portable model with lazy weights.
        dtype: the model's.
        max_length: the bundle's context.
        work_folder: holds the unquantized model and calibration's state.
        progress: told what is going on.
    """

    def __init__(
        self,
        request: QuantizationRequest,
        source: Checkpoint,
        build: Callable[[], ir.Model],
        *,
        dtype: ir.DataType,
        max_length: int,
        work_folder: Path,
        progress: Progress,
    ) -> None:
        self.request = request
        self.work_folder = work_folder
        self.unquantized = work_folder / "unquantized" / MODEL_NAME
        self._source = source
        self._build = build
        self._dtype = dtype
        self._max_length = max_length
        self._progress = progress

    def save_unquantized(self) -> int:
        """Write the unquantized portable model, unless this very model is there already; returns its weights' bytes."""
        stamp = self.unquantized.with_name("made_of.json")
        made_of = {
            "fingerprint": self._source.fingerprint(),
            "dtype": self._dtype.name,
            "max_length": self._max_length,
        }
        try:
            known = json.loads(stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        if known.get("made_of") == made_of:
            return int(known["bytes"])
        folder = self.unquantized.parent
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

        def written(done: int, total: int, name: str) -> None:
            self._progress(f"write unquantized: {name}", done / max(1, total))

        saved = save_model(self._build(), self.unquantized, progress=written)
        size = saved.data.bytes if saved.data is not None else 0
        # Last, so that a stamp vouches for a whole model.
        stamp.write_text(json.dumps({"made_of": made_of, "bytes": size}) + "\n", encoding="utf-8")
        return size

    def calibrate(self) -> tuple[CalibrationResult, HeldOutText]:
        """Calibrate the unquantized model, taking up what an earlier run left, and read the text to judge it by.

        Raises:
            UserError: a text is unusable, or the model is.
        """
        source, request = self._source, self.request
        vocabulary = source.config.vocab_size
        data = None
        if request.recipe.needs_data or request.calibration_data is not None:
            data = load_calibration_data(
                request.calibration_data,
                source.tokenizer_files,
                vocab_size=vocabulary,
                rows=request.calibration_rows or ROWS,
                row_length=min(ROW_LENGTH, self._max_length),
            )
        # Before hours of calibration, not after.
        text = load_heldout(
            request.heldout_data,
            source.tokenizer_files,
            vocab_size=vocabulary,
            max_length=self._max_length,
            calibration=data.tokens if data is not None else None,
        )
        result = calibrate(self._build(), request.recipe, data, work_folder=self.work_folder, progress=self._progress)
        return result, text

    def quantized(self, plan: QuantizationPlan) -> ir.Model:
        """A new portable model with ``plan`` applied; its weights are lazy."""
        model = self._build()
        apply_plan(model, plan)
        return model

    def measure(self, plan: QuantizationPlan, lowered: Path, text: HeldOutText) -> AccuracyRun:
        """Compare the ``lowered`` model, beside its data, with the unquantized one.

        Raises:
            VerificationError: a logit is not finite.
        """
        half = self._dtype != ir.DataType.FLOAT
        with TemporaryDirectory(prefix="pieces-", dir=self.work_folder) as pieces:
            return measure(
                self.unquantized,
                lowered,
                self.quantized(plan),
                text,
                whole=fits_whole(self._source),
                upcast_reference=half,
                # ONNX Runtime has no bf16 kernels on the CPU; in fp16 the model runs as it will.
                upcast_quantized=self._dtype == ir.DataType.BFLOAT16,
                work_folder=Path(pieces),
                progress=self._progress,
            )


@contextmanager
def kept_work_folder(asked: Path | None, output: Path) -> Iterator[Path]:
    """The work folder, made if need be; deleted, unless the user named it, when nothing was raised inside.

    Raises:
        UserError: as raised inside, with the folder's name added; or the folder cannot be made.
    """
    folder = asked if asked is not None else default_work_folder(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the work folder {folder} ({error.strerror}); give --work-folder.") from error
    try:
        yield folder
    except UserError as error:
        resumes = f"; what was calibrated is kept in {folder}, where the next export takes it up."
        raise type(error)(str(error).rstrip(".") + resumes) from error
    if asked is None:
        shutil.rmtree(folder)


def default_work_folder(output: Path) -> Path:
    """Where calibration keeps its state unless told otherwise: hidden beside the bundle."""
    return output.with_name(f".{output.name}.quantization")
