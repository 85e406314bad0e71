"""The bundle's manifest: what a bundle holds, what made it, and how to bind its graph.

``manifest.json`` is one JSON object: the fields of :class:`Manifest` and a ``checksum`` over them, so that a
manifest edited by hand or cut short is noticed. Unknown fields are refused: a reader that skipped one could run a
bundle wrongly. A change that an older reader would misread raises ``SCHEMA_VERSION``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from qwenforge.errors import BundleError

SCHEMA_VERSION: Final = 1
MANIFEST_NAME = "manifest.json"
MODEL_NAME = "model.onnx"
PREFILL_NAME = "prefill.onnx"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
ACCURACY = "accuracy.json"
ACCURACY_PAGE = "accuracy.html"
LAYER_BEFORE = "layer_before.json"
ENGINE_WEIGHTS = "weights.safetensors"
README = "README.md"
POLYGRAPHY_NETWORK = "polygraphy_network.py"
CHECKPOINT_RECIPE = "checkpoint"
"""``recipe`` of a model that its checkpoint quantizes, not its export."""
MAX_MANIFEST_BYTES = 32 * 1024 * 1024

RESERVED_NAMES = frozenset(
    {
        MODEL_NAME,
        f"{MODEL_NAME}.data",
        PREFILL_NAME,
        f"{PREFILL_NAME}.data",
        TOKENIZER,
        TOKENIZER_CONFIG,
        CHAT_TEMPLATE,
        GENERATION_CONFIG,
        ACCURACY,
        ACCURACY_PAGE,
        LAYER_BEFORE,
        ENGINE_WEIGHTS,
    }
)
"""Names that mean something in a bundle: a file of such a name that the manifest does not list was slipped in."""


_LONGEST_NAME = 1000
_SHOWN = 80
"""Characters of a name that a message repeats."""


def check_file_name(name: str) -> str:
    """``name`` itself; ValueError unless it is a relative POSIX path that stays inside its folder on every system."""
    path = PurePosixPath(name)
    # A backslash or a colon would name another folder or a drive on Windows.
    inside = not path.is_absolute() and ".." not in path.parts and str(path) == name and name not in ("", ".")
    if not inside or set(name) & set("\\:") or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ValueError(f"{name[:_SHOWN]!r} is not a plain relative file name")
    if name == MANIFEST_NAME:
        raise ValueError(f"{MANIFEST_NAME} cannot list itself")
    return name


FileName = Annotated[str, AfterValidator(check_file_name)]
Word = Annotated[str, Field(pattern=r"^[\w.-]{1,40}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1)]
TokenId = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    """Base of every part of a manifest: frozen, and closed to unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(_Part):
    """The checkpoint that the bundle was made from.

    ``path_name`` is the folder's last component only (no path of the exporting machine), ``config`` its config.json,
    ``fingerprint`` identifies its weights and ``dtype`` is the type they are stored in.
    """

    path_name: str
    model_type: str
    config: dict[str, JsonValue]
    fingerprint: str
    dtype: str


class Limits(_Part):
    """What a bundle can be asked for: ``max_length`` tokens a row (answer included), ``max_batch`` rows (None: any)."""

    max_length: Count
    max_batch: Count | None = None


class TensorSpec(_Part):
    """A graph input or output; a dimension is a number or the name of a symbol (see ``qwenforge.names``)."""

    name: Annotated[str, Field(min_length=1)]
    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)] | str, ...]


class Geometry(_Part):
    """The sizes that a runtime or a report needs; ``None`` where the architecture has no such thing."""

    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    hidden_size: Count
    vocab_size: Count
    intermediate_size: Count | None = None
    num_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Count | None = None
    shared_expert_intermediate_size: Count | None = None
    sliding_window: Count | None = None
    max_position_embeddings: Count | None = None


class LoweringRecord(_Part):
    """What a TensorRT graph was lowered for.

    ``device`` is the name given to ``--device`` and ``sm`` its compute capability, both None for an engine of every
    device that TensorRT for RTX supports; ``tensorrt`` is the oldest version whose parser takes the graph.
    ``attention`` and ``moe`` tell whether layers of TensorRT or our plugins compute them. ``weights_as`` tells where
    the weights are: in the engine, or in ``weights.safetensors``, to be bound as engine inputs. ``layout_version`` is
    that of packed weights.
    """

    device: Word | None
    sm: Count | None
    tensorrt: Word
    attention: Literal["native", "plugin", "mixed"]
    moe: Literal["none", "native", "plugin"]
    weights_as: Literal["constants", "inputs"]
    layout_version: Count


class OrtCudaRecord(_Part):
    """What a graph for ONNX Runtime on CUDA is made of.

    ``attention`` and ``moe`` tell whether ONNX Runtime's operators or our custom ops compute them; ``layout_version``
    is that of packed weights. ``device`` and ``sm`` name the GPU whose preferences decided, None for any, and ``basis``
    what the decision rests on; the graph runs on other GPUs as well.
    """

    device: Word | None
    sm: Count | None
    attention: Literal["native", "plugin"]
    moe: Literal["none", "native", "plugin"]
    layout_version: Count
    basis: str


Kernels = Literal["qwenforge", "onnxruntime"]
"""Whose ops compute an ort-cpu graph's quantized weights, attention included."""


CpuCache = Literal["fp16", "fp32"]
"""The type of an ort-cpu graph's key/value caches; with fp16 ones our kernels compute in fp32."""


class OrtCpuRecord(_Part):
    """What a graph of quantized weights for ONNX Runtime on a CPU is made of.

    ``kernels`` tells whose ops compute them: those of our library, which the runtime has to register, or ONNX
    Runtime's own. ``basis`` says what the choice rests on. ``cache`` is the type of keys and values, which only our
    kernels have in fp16; a record without it is of fp32. A bundle without the record has ONNX Runtime's.
    """

    kernels: Kernels
    basis: str
    cache: CpuCache = "fp32"


class QuantizedSites(_Part):
    """How many sites of a model are quantized in one way.

    ``weight`` is the number format of their weights, ``kept`` where these stay as they are; ``group_size`` is the
    columns of a row that share a scale, None for a whole row; ``activation`` is the format of their inputs.
    """

    weight: Word
    group_size: Count | None
    activation: Word | None
    sites: Count


class QuantizationRecord(_Part):
    """How a model is quantized, by its export or by its checkpoint, and how far it is from the unquantized one.

    ``recipe`` is the recipe's name, ``checkpoint`` where the checkpoint was quantized already; ``sites`` counts what
    was done to how many places; ``cache`` is the format of the key/value cache, None for the model's own.
    ``calibrated_on`` and ``judged_on`` name the texts. ``budget`` are the limits it was held to and ``accuracy`` what
    was measured: ``mean_kl`` and ``p99_kl`` (nats), ``perplexity_ratio`` and ``top1_agreement`` against the unquantized
    model. ``accuracy.json`` and ``accuracy.html`` have it all. Of a quantized checkpoint the weights are the model, and
    what its static scales of activations and caches change is measured; without them ``judged_on`` is None and nothing
    is.
    """

    recipe: Annotated[str, Field(min_length=1, max_length=200)]
    sites: tuple[QuantizedSites, ...]
    cache: Word | None
    calibrated_on: str | None
    judged_on: str | None
    budget: dict[str, float]
    accuracy: dict[str, float]


class PrefillRecord(_Part):
    """A second graph of the same model over the same caches, faster for many tokens at once.

    ``file`` is the graph, with the inputs and outputs of the first one; it is for steps of ``minimum_tokens`` tokens or
    more, padding counted, that ask for the logits of one token a row.
    """

    file: FileName
    minimum_tokens: Count


class ProfileRecord(_Part):
    """One optimization profile of an engine: the shapes of its dynamic inputs, at least, typically and at most."""

    name: Word
    minimum: dict[str, tuple[Count, ...]]
    typical: dict[str, tuple[Count, ...]]
    maximum: dict[str, tuple[Count, ...]]


class EngineRecord(_Part):
    """A compiled engine of the bundle, and what it runs on.

    ``device`` and ``sm`` are None for an engine of every device that TensorRT for RTX supports; ``module`` is the
    Python module that built it and ``tensorrt`` its whole version; ``driver`` is the NVIDIA driver's where a GPU took
    part. ``plugin_library`` is the version of the plugin library, None where the engine needs none. ``model_sha256`` is
    that of the model.onnx it was built from. ``options`` are those of the build, and ``peak_build_bytes`` is the
    builder process's largest resident memory, where the system tells it.
    """

    file: FileName
    target: Word
    device: Word | None
    sm: Count | None
    module: Word
    tensorrt: Word
    driver: Word | None
    plugin_library: Word | None
    layout_version: Count
    model_sha256: Sha256
    profiles: tuple[ProfileRecord, ...]
    options: dict[str, str | int | bool | None]
    layers: Count
    build_seconds: Annotated[float, Field(ge=0)]
    peak_build_bytes: Count | None
    qwenforge_version: str


class FileRecord(_Part):
    """Size and hashes of a file; see ``qwenforge.digests`` for the sampled hash."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256
    sampled_sha256: Sha256


class LinkedFileRecord(_Part):
    """A checkpoint file shared by hard link: hashing all of it would cost what ``--weights link`` saves."""

    bytes: Annotated[int, Field(ge=0)]
    header_sha256: Sha256
    sampled_sha256: Sha256


class Verification(_Part):
    """What the export compared with the source checkpoint, and what came out.

    ``max_abs_error`` and ``kl`` (nats, worst position) are over logits, ``bound`` is the limit on ``max_abs_error``,
    ``greedy_match`` tells whether all greedy tokens agreed, near ties included. ``performed=False`` records
    ``--no-verify``.
    """

    performed: bool
    method: Literal["whole-model", "layer-by-layer"] | None = None
    reference: str | None = None
    prompts: Count | None = None
    new_tokens: Count | None = None
    max_abs_error: Annotated[float, Field(ge=0)] | None = None
    kl: float | None = None
    greedy_match: bool | None = None
    bound: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _method_goes_with_performed(self) -> Verification:
        if self.performed != (self.method is not None):
            raise ValueError("a verification names its method exactly when it was performed")
        return self


class BundleFacts(_Part):
    """The part of the manifest that the exporter states; the writer adds files, hashes, versions and date."""

    source: Source
    target: Word
    dtype: Word
    weights: Literal["copy", "link"] = "copy"
    limits: Limits
    inputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]
    outputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]
    model: Geometry
    verification: Verification
    tool_versions: dict[str, str] = {}
    session_options: dict[str, str] = {}
    eos_token_ids: tuple[TokenId, ...] = ()
    bos_token_id: TokenId | None = None
    pad_token_id: TokenId | None = None
    lowering: LoweringRecord | None = None
    ort_cuda: OrtCudaRecord | None = None
    ort_cpu: OrtCpuRecord | None = None
    quantization: QuantizationRecord | None = None
    prefill: PrefillRecord | None = None
    weight_inputs: tuple[TensorSpec, ...] = ()
    engine: EngineRecord | None = None

    @model_validator(mode="after")
    def _tensor_names_are_unique(self) -> BundleFacts:
        for tensors in (self.inputs, self.outputs):
            names = [tensor.name for tensor in tensors]
            if len(set(names)) != len(names):
                raise ValueError("two inputs or two outputs have the same name")
        return self

    @model_validator(mode="after")
    def _tokens_are_in_the_vocabulary(self) -> BundleFacts:
        for token in (*self.eos_token_ids, self.bos_token_id, self.pad_token_id):
            if token is not None and token >= self.model.vocab_size:
                raise ValueError(f"token {token} is not one of the model's {self.model.vocab_size}")
        return self


class Manifest(BundleFacts):
    """The whole manifest; ``created`` is an ISO 8601 date and time in UTC."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    qwenforge_version: str
    files: dict[FileName, FileRecord]
    linked_files: dict[FileName, LinkedFileRecord] = {}

    @model_validator(mode="after")
    def _files_are_consistent(self) -> Manifest:
        if MODEL_NAME not in self.files:
            raise ValueError(f"files does not list {MODEL_NAME}")
        if self.prefill is not None and self.prefill.file not in self.files:
            raise ValueError(f"files does not list the prefill graph {self.prefill.file}")
        if self.engine is not None and self.engine.file not in self.files:
            raise ValueError(f"files does not list the engine {self.engine.file}")
        if both := set(self.files) & set(self.linked_files):
            raise ValueError(f"{min(both)} is listed both as a file and as a linked file")
        return self


def checksum(fields: Mapping[str, Any]) -> str:
    """SHA-256 of ``fields`` as JSON with sorted keys, no spaces and ASCII escapes; ``fields`` excludes the checksum."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_text(manifest: Manifest) -> str:
    """The contents of ``manifest.json`` for ``manifest``."""
    fields = manifest.model_dump(mode="json")
    first = {"schema_version": fields["schema_version"], "qwenforge_version": fields["qwenforge_version"]}
    return json.dumps({**first, **fields, "checksum": checksum(fields)}, indent=1, allow_nan=False) + "\n"


def load_manifest_json(folder: Path) -> dict[str, Any]:
    """The JSON object of the manifest in ``folder``, not validated any further.

    Raises BundleError when there is none, or it cannot be read as a JSON object.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file() or path.is_symlink():
        raise BundleError(
            f"{folder} is not a qwenforge bundle: it has no {MANIFEST_NAME}; make one with 'qwenforge export'"
        )
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
        if len(data) > MAX_MANIFEST_BYTES:
            raise BundleError(
                f"{path} is larger than {MAX_MANIFEST_BYTES} bytes, which no manifest is; export the bundle again"
            )
        fields = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}); export the bundle again") from error
    if not isinstance(fields, dict):
        raise BundleError(f"{path} is not a JSON object; export the bundle again")
    return fields


def read_manifest(folder: Path) -> Manifest:
    """The validated manifest of the bundle in ``folder``.

    Raises BundleError when it is absent, not JSON, of a newer schema, has missing, unknown or wrong fields, or does
    not agree with its own checksum.
    """
    fields = load_manifest_json(folder)
    path = folder / MANIFEST_NAME
    version = fields.get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        written_by = fields.get("qwenforge_version")
        raise BundleError(
            f"{path} has schema {version}, newer than schema {SCHEMA_VERSION} that this qwenforge reads: "
            f"update qwenforge (the bundle was written by {written_by})"
        )
    stated = fields.pop("checksum", None)
    try:
        # Strict, through JSON: "512" or true must not pass for a number.
        manifest = Manifest.model_validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        raise BundleError(f"{path}: {_first_problem(error)}; export the bundle again") from error
    except RecursionError as error:
        raise BundleError(f"{path} is nested too deeply to be a manifest; export the bundle again") from error
    if type(version) is not int:
        raise BundleError(f"{path}: schema_version is missing or no number; export the bundle again")
    if stated != checksum(fields):
        raise BundleError(
            f"{path} does not agree with its own checksum: it was changed after it was written; export the bundle again"
        )
    return manifest


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(_shown(str(part)) for part in problem["loc"] if part != "[key]")
    if problem["type"] == "missing":
        return f"the field {where} is missing"
    if problem["type"] == "extra_forbidden":
        return f"the field {where} is unknown"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}" if where else message


def _shown(name: str) -> str:
    """``name`` in a sentence: in one line and of bounded length."""
    return name if name.isprintable() and len(name) <= _SHOWN else f"{name[:_SHOWN]!r}"
