"""Which of the libraries that qwenforge can use are installed, and whether they work.

What is wanted is read from qwenforge's own package metadata, so pyproject.toml stays the one place that says it.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, metadata

DISTRIBUTION = "qwenforge"
_MODULE_OF = {"onnx-ir": "onnx_ir", "pyyaml": "yaml", "onnxruntime-gpu": "onnxruntime"}
_INSTEAD_OF = {"onnxruntime": "onnxruntime-gpu"}
"""A distribution that brings the same module and more; with both installed, the one installed last is in effect."""
_REQUIREMENT = re.compile(
    r"""(?P<name>[\w.-]+) (?:\[[\w,\s-]+\])? \s* (?:>=\s*(?P<minimum>[\w.]+))? [^;]*
    (?:;.*extra\s*==\s*['"](?P<extra>\w+)['"])? .*""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Package:
    """One library.

    Attributes:
        name: of its distribution.
        extra: the optional group of qwenforge that asks for it; empty when it is always needed.
        minimum: the oldest version that will do; empty for any.
        version: installed version; empty when it is not installed.
        problem: why it cannot be used; empty when it can.
    """

    name: str
    extra: str
    minimum: str
    version: str
    problem: str

    @property
    def usable(self) -> bool:
        """Whether it is installed, new enough and imports."""
        return not self.problem


def survey() -> tuple[Package, ...]:
    """Look up and import every library that qwenforge asks for; torch makes this take seconds."""
    found = []
    for requirement in metadata.requires(DISTRIBUTION) or []:
        name, minimum, extra = parse_requirement(requirement)
        if extra != "dev":
            found.append(inspect_package(name, minimum, extra))
    return tuple(found)


def parse_requirement(text: str) -> tuple[str, str, str]:
    """Name, minimum version and extra of a requirement such as ``torch>=2.9; extra == 'export'``."""
    match = _REQUIREMENT.fullmatch(text)
    if match is None:
        raise ValueError(f"cannot read the requirement {text!r} of {DISTRIBUTION}")
    return match["name"], match["minimum"] or "", match["extra"] or ""


def inspect_package(name: str, minimum: str, extra: str) -> Package:
    """Whether ``name`` is installed, at least ``minimum``, and can be imported."""
    version = installed_version(name)
    if not version:
        return Package(name, extra, minimum, version="", problem="not installed")
    if minimum and _release(version) < _release(minimum):
        return Package(name, extra, minimum, version, problem=f"{version} is older than {minimum}")
    try:
        import_module(_MODULE_OF.get(name, name))
    except (ImportError, OSError) as error:
        return Package(name, extra, minimum, version, problem=f"does not import: {error}")
    return Package(name, extra, minimum, version, problem="")


def installed_version(name: str) -> str:
    """The version of the distribution ``name``, or of the one that stands in for it; empty when neither is there."""
    for distribution in (name, _INSTEAD_OF.get(name)):
        if distribution is not None:
            with suppress(metadata.PackageNotFoundError):
                return metadata.version(distribution)
    return ""


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version starts with: (2, 13, 0) for ``2.13.0+cpu``."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
