"""The part of an export that quantizes: from the fused graph to a quantized portable one, and the gate behind it.

texts -> unquantized portable model on disk -> verified -> calibrated -> plan applied -> (lowered, written) -> judged

The unquantized model lies in the work folder, because it is read three times: by the comparison with transformers, by
calibration and by the gate. The folder goes with a successful export; after a failure or an interruption it stays, and
the same command takes up calibration where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from qwenforge.calibration import fluency
from qwenforge.calibration.calibrate import CalibrationResult, calibrate
from qwenforge.calibration.data import ROW_LENGTH, ROWS, CalibrationData, load_calibration_data
from qwenforge.calibration.heldout import HeldOutText, load_heldout
from qwenforge.calibration.progress import Progress as CalibrationProgress
from qwenforge.calibration.recipes import Recipe
from qwenforge.calibration.sensitivity import Frontier, Level, levels_of, milder_recipe, mixed_plan, overrides_of
from qwenforge.calibration.tokenizer_match import tokenizer_doubts
from qwenforge.engine.accuracy_report import QuantizationOutcome
from qwenforge.engine.accuracy_run import measure
from qwenforge.engine.auto_search import search_choice
from qwenforge.engine.quantization_request import QuantizationRequest
from qwenforge.engine.verification import fits_whole
from qwenforge.engine.window_runner import WindowRunner
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
        self._recipe = request.recipe
        self._warnings: tuple[str, ...] = ()
        self._frontier: Frontier | None = None
        self._plan: QuantizationPlan
        self._data: CalibrationData | None
        self._text: HeldOutText
        self._result: CalibrationResult

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

    def read_texts(self) -> None:
        """Read the text to calibrate on and the text to judge by: what is wrong with them is told before hours of work.

        Raises:
            UserError: a text is unusable.
        """
        request, source = self.request, self._source
        self._data = data = self._calibration_data()
        self._text = load_heldout(
            request.heldout_data,
            source.tokenizer_files,
            vocab_size=source.config.vocab_size,
            max_length=self._max_length,
            calibration=data.tokens if data is not None else None,
        )

    def calibrated(self) -> ir.Model:
        """The quantized portable model: calibrated, taking up what an earlier run left, and with ``--auto`` searched.

        Raises:
            UserError: the model makes nothing of the text, or no choice holds the budget.
        """
        request = self.request
        result = self._calibrate(request.recipe, self._data)
        self._result = result
        self._warnings = (*self._tokenizer_doubts(), *result.warnings)
        self._plan = result.plan
        if request.auto:
            self._search(self._text)
        return self._quantized(self._plan)

    def judge(
        self,
        lowered: Sequence[Path],
        *,
        target: str,
        dtype: str,
        unquantized_bytes: int,
        quantized_bytes: int,
        session_options: Mapping[str, str],
    ) -> QuantizationOutcome:
        """Compare each of the ``lowered`` graphs, beside its data, with the unquantized model.

        Raises:
            VerificationError: the budget is missed (see :meth:`QuantizationOutcome.missed`), or a logit is not finite.
        """
        half = self._dtype != ir.DataType.FLOAT
        with TemporaryDirectory(prefix="pieces-", dir=self.work_folder) as pieces:
            run = measure(
                self.unquantized,
                lowered,
                self._quantized(self._plan),
                self._text,
                whole=fits_whole(self._source),
                upcast_reference=half,
                # ONNX Runtime has no bf16 kernels on the CPU; in fp16 the model runs as it will.
                upcast_quantized=self._dtype == ir.DataType.BFLOAT16,
                session_options=session_options,
                work_folder=Path(pieces),
                progress=self._progress,
            )
        doubts = fluency.judge(
            math.log(run.distributions.reference_perplexity),
            self._text.windows,
            self._source.config.vocab_size,
            self._text.source,
            require_prediction=False,
        )
        return QuantizationOutcome(
            model=self._source.folder.resolve().name,
            target=target,
            dtype=dtype,
            recipe=self._recipe,
            plan=self._plan,
            run=run,
            budget=self.request.budget,
            unquantized_bytes=unquantized_bytes,
            quantized_bytes=quantized_bytes,
            calibrated_on=self._data.source if self._data is not None else None,
            coverage={each.site: each.tokens for each in self._result.coverage},
            warnings=(*doubts, *self._warnings),
            frontier=self._frontier,
        )

    def _calibration_data(self) -> CalibrationData | None:
        request = self.request
        if not request.recipe.needs_data and request.calibration_data is None:
            return None
        return load_calibration_data(
            request.calibration_data,
            self._source.tokenizer_files,
            vocab_size=self._source.config.vocab_size,
            rows=request.calibration_rows or ROWS,
            row_length=min(ROW_LENGTH, self._max_length),
        )

    def _tokenizer_doubts(self) -> list[str]:
        source = self._source
        ends = source.generation_config.get("eos_token_id")
        given = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return tokenizer_doubts(
            source.tokenizer_files, source.config.vocab_size, {*source.config.eos_token_ids, *map(int, given)}
        )

    def _calibrate(self, recipe: Recipe, data: CalibrationData | None) -> CalibrationResult:
        # A folder for each recipe and text: a second attempt with other settings must not meet the first one's state.
        settings = recipe.to_json() + (data.fingerprint() if data is not None else "")
        folder = self.work_folder / f"calibration-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
        return calibrate(self._build(), recipe, data, work_folder=folder, progress=self._calibrating)

    def _calibrating(self, progress: CalibrationProgress) -> None:
        """Pass on calibration's progress, its speed and the time that is left."""
        speed = f", {progress.tokens_per_second:.0f} tokens/s" if progress.tokens_per_second else ""
        left = f", {progress.seconds_left:.0f} s left" if progress.seconds_left is not None else ""
        part = f"piece {progress.piece + 1}/{progress.pieces}"
        self._progress(f"calibrate {part}{speed}{left}", progress.done / max(1, progress.total))

    def _search(self, text: HeldOutText) -> None:
        """Choose on half of the held-out windows which groups to leave in higher precision; judge on the other half."""
        choosing, self._text = text.halves()
        recipe = self.request.recipe
        levels = levels_of(recipe)
        plans: dict[Level, QuantizationPlan] = {"recipe": self._plan}
        if len(levels) > 2:
            plans[levels[1]] = self._calibrate(milder_recipe(recipe), None).plan
        with TemporaryDirectory(prefix="search-", dir=self.work_folder) as folder:
            self._frontier = search_choice(
                lambda: WindowRunner.from_file(self.unquantized, whole=False, upcast=self._dtype != ir.DataType.FLOAT),
                self._quantized,
                plans,
                levels,
                choosing.windows,
                self.request.budget,
                work_folder=Path(folder),
                progress=self._progress,
            )
        self._plan = mixed_plan(plans, self._frontier.choice)
        self._recipe = recipe.override(*overrides_of(self._frontier.choice))

    def _quantized(self, plan: QuantizationPlan) -> ir.Model:
        """A new portable model with ``plan`` applied; its weights are lazy."""
        model = self._build()
        apply_plan(model, plan)
        return model


@contextmanager
def kept_work_folder(request: QuantizationRequest, output: Path) -> Iterator[Path]:
    """The work folder, made if need be; deleted, unless the user named it, when nothing was raised inside.

    Raises:
        UserError: as raised inside, with the folder's name added; or the folder cannot be made.
    """
    folder = request.work_folder or default_work_folder(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the work folder {folder} ({error.strerror}); give --work-folder.") from error
    try:
        yield folder
    except UserError as error:
        if not any(folder.iterdir()):
            folder.rmdir()
            raise
        resumes = f"; what was calibrated is kept in {folder}, where the next export takes it up."
        raise type(error)(str(error).rstrip(".") + resumes) from error
    if request.work_folder is None:
        shutil.rmtree(folder)


def default_work_folder(output: Path) -> Path:
    """Where calibration keeps its state unless told otherwise: hidden beside the bundle."""
    return output.with_name(f".{output.name}.quantization")
