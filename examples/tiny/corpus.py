"""Training and held-out text made of what every Python installation carries: its own documentation and sources.

Everything is read from the running interpreter's standard library, in sorted order, so that one Python release on one
platform always yields the same documents. Another release yields other text: the report of a training names its Python.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# Large, repetitive, or not meant to be read; and Windows twins whose text repeats their POSIX siblings.
SKIPPED = frozenset(
    "__pycache__ config distutils encodings ensurepip idlelib lib-dynload lib2to3 msilib nturl2path ntpath pydoc_data "
    "site-packages dist-packages test tests this tkinter turtle turtledemo venv".split()
)
# The public names of modules whose Python text lives in a private or platform-specific file.
PUBLIC_NAMES = {
    "posixpath": "os.path",
    "_pydecimal": "decimal",
    "_pydatetime": "datetime",
    "_pyio": "io",
    "_collections_abc": "collections.abc",
}
# Modules written in C: their documentation is read from the live objects.
COMPILED = {
    "builtins": "",
    "math": "math.",
    "itertools": "itertools.",
    "posix": "os.",
    "sys": "sys.",
    "time": "time.",
    "zlib": "zlib.",
    "binascii": "binascii.",
    "_operator": "operator.",
}
# Withheld from training altogether; in every Python since 3.10, and without a twin elsewhere in the library.
HELD_OUT_MODULES = frozenset(
    "bisect calendar colorsys fnmatch graphlib heapq pprint sched shelve statistics string textwrap wave zipapp".split()
)
HELD_OUT_TOPIC_SHARE = 16  # one topic of the language reference in this many is held out
HELD_OUT_BYTES = 60_000
MAX_SOURCE_CHARACTERS = 700
MIN_PARAGRAPH_CHARACTERS = 60  # shorter paragraphs are stock phrases that any two texts may share
LICENCE_FILE = re.compile(r"(^|/)LICEN[SC]E[^/]*$")


@dataclass(frozen=True)
class Entry:
    """One documented thing: its public dotted ``name``, ``signature`` ("" for modules), docstring and source."""

    name: str
    kind: str
    signature: str
    documentation: str
    source: str
    module: str

    def text(self) -> str:
        """The entry as a page of plain documentation."""
        if self.kind == "module":
            return f"{self.name}\n\n{self.documentation}"
        indented = "\n".join(f"    {line}" if line else "" for line in self.documentation.splitlines())
        return f"{self.name}{self.signature}\n\n{indented}"


@dataclass(frozen=True)
class Corpus:
    """``training`` documents by kind, ``entries`` to make chat samples from, and ``held_out`` documents."""

    training: dict[str, list[str]]
    entries: list[Entry]
    held_out: list[str]


def build_corpus(seed: int) -> Corpus:
    """Collect the documents; those whose text also occurs in the held-out part are dropped from training."""
    entries = _unique([*_compiled_entries(), *_library_entries()])
    topics = _topics()
    held_entries = [entry.text() for entry in entries if entry.module in HELD_OUT_MODULES]
    held_topics = [text for index, text in enumerate(topics) if index % HELD_OUT_TOPIC_SHARE == 7]
    held_out = _within(_shuffled(held_entries + held_topics, seed), HELD_OUT_BYTES)

    withheld = {paragraph for text in held_out for paragraph in _paragraphs(text)}
    kept = [entry for entry in entries if entry.module not in HELD_OUT_MODULES]
    kept = [entry for entry in kept if withheld.isdisjoint(_paragraphs(entry.text()))]
    kept_topics = [text for index, text in enumerate(topics) if index % HELD_OUT_TOPIC_SHARE != 7]
    training = {
        "documentation": [entry.text() for entry in kept],
        "language reference": [text for text in kept_topics if withheld.isdisjoint(_paragraphs(text))],
        "source": [entry.source for entry in kept if entry.source],
        "licences": _licences(),
    }
    return Corpus(training, kept, held_out)


def _library_entries() -> Iterator[Entry]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in SKIPPED or part.startswith(("_sysconfigdata", "config-")) for part in parts):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        module = PUBLIC_NAMES.get(module, module)
        if any(part.startswith("_") for part in module.split(".")):
            continue
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        documentation = ast.get_docstring(tree)
        if documentation:
            yield Entry(module, "module", "", documentation, "", module)
        yield from _tree_entries(tree, module, module, text.splitlines())


def _tree_entries(tree: ast.Module | ast.ClassDef, prefix: str, module: str, lines: list[str]) -> Iterator[Entry]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            documentation = ast.get_docstring(node)
            if documentation:
                bases = ", ".join(ast.unparse(base) for base in node.bases)
                signature = f"({bases})" if bases else ""
                yield Entry(f"{prefix}.{node.name}", "class", signature, documentation, "", module)
            yield from _tree_entries(node, f"{prefix}.{node.name}", module, lines)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            documentation = ast.get_docstring(node)
            if documentation:
                source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                short = source if len(source) <= MAX_SOURCE_CHARACTERS else ""
                signature = f"({ast.unparse(node.args)})"
                kind = "method" if isinstance(tree, ast.ClassDef) else "function"
                yield Entry(f"{prefix}.{node.name}", kind, signature, documentation, short, module)


def _compiled_entries() -> Iterator[Entry]:
    for module_name, prefix in COMPILED.items():
        module = importlib.import_module(module_name)
        public = prefix.rstrip(".") or module_name
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or (isinstance(value, type) and issubclass(value, BaseException)):
                continue
            if callable(value):
                yield from _object_entry(f"{prefix}{name}", value, public)
            if isinstance(value, type):
                for attribute, member in sorted(vars(value).items()):
                    if not attribute.startswith("_") and callable(member):
                        yield from _object_entry(f"{prefix}{name}.{attribute}", member, public)


def _object_entry(name: str, value: object, module: str) -> Iterator[Entry]:
    documentation = inspect.getdoc(value)
    if documentation:
        try:
            signature = str(inspect.signature(value))  # type: ignore[arg-type]
        except (TypeError, ValueError):  # many compiled callables carry no signature; their docstring spells it
            signature = ""
        # A default whose repr is an address differs from run to run.
        if " at 0x" not in signature + documentation:
            yield Entry(name, "class" if isinstance(value, type) else "function", signature, documentation, "", module)


def _topics() -> list[str]:
    """The language reference that ``help("topic")`` shows, a text a topic."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return [text.strip("\n") for _, text in sorted(topics.items())]


def _licences() -> list[str]:
    """Python's licence and pip's, from wherever this installation keeps them."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [library / "LICENSE.txt"]
    for distribution in metadata.distributions(name="pip"):
        files = sorted(str(file) for file in distribution.files or [])
        paths += [Path(str(distribution.locate_file(file))) for file in files if LICENCE_FILE.search(file)]
    return list(dict.fromkeys(path.read_text(encoding="utf-8") for path in paths if path.is_file()))


def _unique(entries: list[Entry]) -> list[Entry]:
    """The first of each name and of each documentation, with the held-out modules ahead of all others."""
    ordered = sorted(entries, key=lambda entry: entry.module not in HELD_OUT_MODULES)
    by_text = {entry.documentation: entry for entry in reversed(ordered)}
    by_name = {entry.name: entry for entry in reversed(list(by_text.values()))}
    return [entry for entry in ordered if by_name.get(entry.name) is entry]


def _paragraphs(text: str) -> set[str]:
    joined = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return {paragraph for paragraph in joined if len(paragraph) >= MIN_PARAGRAPH_CHARACTERS}


def _shuffled(texts: list[str], seed: int) -> list[str]:
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _within(texts: list[str], limit: int) -> list[str]:
    """As many of ``texts``, in order, as fit in ``limit`` bytes of UTF-8 with a blank line between two."""
    kept: list[str] = []
    size = 0
    for text in texts:
        length = len(text.encode()) + 2
        if size + length <= limit:
            kept.append(text)
            size += length
    return kept
