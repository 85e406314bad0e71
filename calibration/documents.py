"""Reading calibration documents: plain text, JSONL, a Hugging Face dataset's folder, or the sample that we ship.

A record has a field ``text``, or ``messages``, a conversation that the model's chat template writes out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from qwenforge.chat_template import Message
from qwenforge.errors import UserError

Chat = Sequence[Message]
Document = str | Chat
Render = Callable[[Chat, str], str]

SAMPLE = "sample.jsonl"
"""The built-in sample, beside this file; what it is made of and its licence are in ``sample.LICENSE.txt``."""

_BATCH = 256


def read_documents(path: Path | None) -> Iterator[tuple[str, Document]]:
    """The documents of ``path`` in order, each with where it came from; of the built-in sample when that is None.

    Args:
        path: a text file (one document), a ``.jsonl`` file (one a line), a ``.parquet`` or ``.arrow`` file, or a folder
            of such files, as ``datasets.save_to_disk`` writes it. Parquet and Arrow need pyarrow.

    Raises:
        UserError: the file is missing, empty or damaged; a line or record is named by its number.
    """
    if path is None:
        with resources.as_file(resources.files("qwenforge.calibration").joinpath(SAMPLE)) as sample:
            yield from _json_lines(sample)
        return
    if not path.exists():
        raise UserError(f"the calibration data {path} does not exist: give a text file, a .jsonl file or a dataset")
    if path.is_dir():
        yield from _folder(path)
    elif path.stat().st_size == 0:
        raise UserError(f"the calibration data {path} is empty: give a file with text in it")
    elif path.suffix == ".jsonl":
        yield from _json_lines(path)
    elif path.suffix in (".parquet", ".arrow"):
        yield from _table(path)
    else:
        yield str(path), _text(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the calibration data {path} is not UTF-8 text (byte {error.start}): convert it, or name JSON lines "
            ".jsonl, Parquet .parquet and Arrow .arrow"
        ) from error
    except OSError as error:
        raise UserError(f"the calibration data {path} cannot be read: {error.strerror or error}") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Document]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{where} is not JSON ({error}): correct or remove that line") from error
                yield where, _document(record, where)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the calibration data {path} cannot be read as UTF-8 lines ({error})") from error


def _folder(path: Path) -> Iterator[tuple[str, Document]]:
    """Files of a dataset's folder; of several splits the one called train, else the first."""
    splits = path / "dataset_dict.json"
    if splits.is_file():
        try:
            names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
            path = path / ("train" if "train" in names else names[0])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{splits} does not list the dataset's splits: save the dataset again") from error
    files = sorted(file for file in path.rglob("*") if file.suffix in (".arrow", ".parquet"))
    if not files:
        raise UserError(f"the folder {path} holds no .arrow or .parquet file: give a dataset saved with save_to_disk")
    for file in files:
        yield from _table(file)


def _table(path: Path) -> Iterator[tuple[str, Document]]:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            f"reading {path} needs pyarrow: run 'pip install pyarrow', or convert the data to .jsonl"
        ) from error
    count = 0
    try:
        for batch in _batches(path):
            for record in batch.to_pylist():
                count += 1
                where = f"{path}, record {count}"
                yield where, _document(record, where)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): save the dataset again") from error


def _batches(path: Path) -> Iterator[Any]:
    """The table's record batches, few records in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".parquet":
        yield from pyarrow.parquet.ParquetFile(path).iter_batches(_BATCH)
        return
    with pyarrow.memory_map(str(path)) as source:  # datasets writes streams, Feather is a file
        try:
            yield from pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(source)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))


def _document(record: object, where: str) -> Document:
    if isinstance(record, Mapping):
        text, messages = record.get("text"), record.get("messages")
        if isinstance(text, str):
            return text
        if isinstance(messages, Sequence) and messages and all(_is_message(each) for each in messages):
            return list(messages)
    raise UserError(
        f"{where} has neither a 'text' nor 'messages', a list of objects with 'role' and 'content': correct it"
    )


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value
