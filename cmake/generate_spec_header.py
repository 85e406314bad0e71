"""Turns an op.yaml into the C++ constant of type OpSpec that the plugin's sources are written against.

    python cmake/generate_spec_header.py moe build/plugins/generated/moe_spec.h

CMake runs this; it needs PyYAML and pydantic, and this project neither installed nor on the path.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402 - the path above comes first

from qwenforge.op_spec import NAMESPACE, Attribute, OpSpec, Tensor, TypeChoice  # noqa: E402

DATA_TYPES = {"float32": "kFLOAT", "float16": "kHALF", "bfloat16": "kBF16", "int32": "kINT32", "int8": "kINT8"}
C_TYPES = {"int": "int32_t", "float": "float"}
MEMBERS = {"int": "integer", "float": "real"}
OPERATORS = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.Mod: "%",
    ast.LtE: "<=",
    ast.Lt: "<",
    ast.Eq: "==",
}


def header(folder: str, spec: OpSpec) -> str:
    """The text of ``<folder>_spec.h``."""
    sizes = run_time_sizes(spec)
    lines = [
        f"// Generated from plugins/{folder}/op.yaml; change that file instead.",
        "",
        "#pragma once",
        "",
        '#include "common/op_spec.h"',
        "",
        "#include <limits>",
        "",
        f"namespace qwenforge::{folder}_spec",
        "{",
        "",
        *_indices("Attribute", [attribute.name for attribute in spec.attributes]),
        *_indices("Size", sizes),
        *_indices("Input", [tensor.name for tensor in spec.inputs]),
        *_indices("Output", [tensor.name for tensor in spec.outputs]),
        *_typed_attributes(spec),
        *_tables(spec, sizes),
        f"}} // namespace qwenforge::{folder}_spec",
        "",
    ]
    return "\n".join(lines)


def run_time_sizes(spec: OpSpec) -> list[str]:
    """The names of dimensions that are no attributes, in the order in which the inputs bring them."""
    attributes = {attribute.name for attribute in spec.attributes}
    sizes = dict.fromkeys(
        str(dimension)
        for tensor in spec.inputs
        for dimension in tensor.shape
        if str(dimension).isidentifier() and dimension not in attributes
    )
    for tensor in spec.outputs:
        for dimension in tensor.shape:
            if str(dimension).isidentifier() and dimension not in attributes and dimension not in sizes:
                raise ValueError(f"{spec.name}: no input brings {dimension}, which the shape of {tensor.name} names")
    return list(sizes)


def cpp_expression(expression: str | int, spec: OpSpec) -> str:
    """An expression of an op.yaml in C++, over the array ``attributes``."""
    types = {attribute.name: attribute.type for attribute in spec.attributes}

    def convert(node: ast.expr) -> str:
        match node:
            case ast.Constant(value=int() as number):
                return f"int64_t{{{number}}}"
            case ast.Name(id=name) if types.get(name) == "int":
                return f"int64_t{{attributes[Attribute::{_constant(name)}].integer}}"
            case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]) if (
                type(op) in OPERATORS
            ):
                return f"({convert(left)} {OPERATORS[type(op)]} {convert(right)})"
        raise ValueError(f"{spec.name}: {ast.unparse(node)!r} is not an expression over its integer attributes")

    return convert(ast.parse(str(expression), mode="eval").body)


def _indices(name: str, members: list[str]) -> list[str]:
    rows = [f"        {_constant(member)} = {index}," for index, member in enumerate(members)]
    return [f"struct {name}", "{", "    enum : int32_t", "    {", *rows, "    };", "};", ""]


def _typed_attributes(spec: OpSpec) -> list[str]:
    members = [f"    {C_TYPES[attribute.type]} {_camel(attribute.name)};" for attribute in spec.attributes]
    values = [f"        attributes[{i}].{MEMBERS[a.type]}," for i, a in enumerate(spec.attributes)]
    return [
        "struct Attributes",
        "{",
        *members,
        "};",
        "",
        "inline Attributes typed(AttributeValue const* attributes) noexcept",
        "{",
        "    return {",
        *values,
        "    };",
        "}",
        "",
    ]


def _tables(spec: OpSpec, sizes: list[str]) -> list[str]:
    lines = _array("AttributeSpec", "kAttributes", [_attribute(attribute) for attribute in spec.attributes])
    lines += _array("char const*", "kSizes", [_text(size) for size in sizes])
    for variable, types in spec.types.items():
        values = [f"nvinfer1::DataType::{DATA_TYPES[name]}" for name in types]
        lines += _array("nvinfer1::DataType", f"kTypesOf{variable}", values)
    variables = [f"{{{_text(name)}, kTypesOf{name}, {len(types)}}}" for name, types in spec.types.items()]
    lines += _array("TypeVariableSpec", "kTypeVariables", variables)
    for tensor in [*spec.inputs, *spec.outputs]:
        dimensions = [_dimension(dimension, spec, sizes) for dimension in tensor.shape]
        lines += _array("DimensionSpec", f"kShapeOf{_constant(tensor.name)[1:]}", dimensions)
        lines += _array("TypeSpec", f"kTypeOf{_constant(tensor.name)[1:]}", _types(tensor, spec))
    lines += _array("TensorSpec", "kInputs", [_tensor(tensor, spec) for tensor in spec.inputs])
    lines += _array("TensorSpec", "kOutputs", [_tensor(tensor, spec) for tensor in spec.outputs])
    requirements = [
        f"{{{_function('bool', cpp_expression(item.holds, spec))}, {_text(item.message)}}}"
        for item in spec.requirements
    ]
    lines += _array("RequirementSpec", "kRequirements", requirements) if requirements else []
    counts = {
        "kMaxAttributes": len(spec.attributes),
        "kMaxSizes": len(sizes),
        "kMaxTypeVariables": len(spec.types),
        "kMaxTensors": len(spec.inputs) + len(spec.outputs),
    }
    lines += [f'static_assert({count} <= {bound}, "raise {bound}");' for bound, count in counts.items()]
    lines += [
        "",
        "inline constexpr OpSpec kSpec{",
        f"    {_text(spec.name)}, {_text(spec.version)}, {_text(NAMESPACE)},",
        f"    kAttributes, {len(spec.attributes)},",
        f"    kSizes, {len(sizes)},",
        f"    kTypeVariables, {len(spec.types)},",
        f"    kInputs, {len(spec.inputs)},",
        f"    kOutputs, {len(spec.outputs)},",
        f"    {'kRequirements' if requirements else 'nullptr'}, {len(requirements)},",
        "};",
        "",
    ]
    return lines


def _attribute(attribute: Attribute) -> str:
    limit = "int32_t" if attribute.type == "int" else "float"
    minimum = f"std::numeric_limits<{limit}>::lowest()" if attribute.minimum is None else repr(attribute.minimum)
    maximum = f"std::numeric_limits<{limit}>::max()" if attribute.maximum is None else repr(attribute.maximum)
    kind = "AttributeType::kInt" if attribute.type == "int" else "AttributeType::kFloat"
    parts = [_text(attribute.name), _text(attribute.meaning), kind, minimum, maximum, str(attribute.multiple_of or 1)]
    return f"{{{', '.join(parts)}}}"


def _dimension(dimension: str | int, spec: OpSpec, sizes: list[str]) -> str:
    if dimension in sizes:
        return f"{{{_text(str(dimension))}, Size::{_constant(str(dimension))}, nullptr}}"
    return f"{{{_text(str(dimension))}, -1, {_function('int64_t', cpp_expression(dimension, spec))}}}"


def _types(tensor: Tensor, spec: OpSpec) -> list[str]:
    chosen = tensor.type
    if isinstance(chosen, TypeChoice):
        (attribute,) = (attribute for attribute in spec.attributes if attribute.name == chosen.attribute)
        if (attribute.minimum, attribute.maximum) != (0, len(chosen.values) - 1):
            raise ValueError(f"{spec.name}: {tensor.name} needs a type for every value of {attribute.name}")
    names = chosen.values if isinstance(chosen, TypeChoice) else [chosen]
    variables = list(spec.types)
    return [
        f"{{{variables.index(name)}, nvinfer1::DataType::kFLOAT}}"
        if name in variables
        else f"{{-1, nvinfer1::DataType::{DATA_TYPES[name]}}}"
        for name in names
    ]


def _tensor(tensor: Tensor, spec: OpSpec) -> str:
    chosen = f"Attribute::{_constant(tensor.type.attribute)}" if isinstance(tensor.type, TypeChoice) else "-1"
    present = "nullptr"
    if tensor.present_if is not None:
        present = _function("bool", f"{cpp_expression(tensor.present_if, spec)} != 0")
    aliases = "-1" if tensor.aliases is None else f"Input::{_constant(tensor.aliases)}"
    name = _constant(tensor.name)[1:]
    shape = f"kShapeOf{name}, {len(tensor.shape)}"
    return f"{{{_text(tensor.name)}, kTypeOf{name}, {chosen}, {shape}, {present}, {aliases}}}"


def _function(result: str, body: str) -> str:
    unused = "" if "attributes" in body else "/*attributes*/"
    parameter = f"AttributeValue const* {unused or 'attributes'}"
    return f"[]({parameter}) noexcept -> {result} {{ return {body}; }}"


def _array(element: str, name: str, rows: list[str]) -> list[str]:
    qualifier = "constexpr" if element != "char const*" else "constexpr char const*"
    declared = element if element != "char const*" else "const"
    return [f"inline {qualifier} {declared} {name}[]{{", *[f"    {row}," for row in rows], "};", ""]


def _text(value: str) -> str:
    # JSON's escapes are C++'s, as long as the text is ASCII.
    return json.dumps(value.encode("ascii").decode())


def _constant(name: str) -> str:
    return "k" + "".join(part.capitalize() for part in name.split("_"))


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def main(arguments: list[str]) -> None:
    folder, output = arguments[0], Path(arguments[1])
    text = (ROOT / "plugins" / folder / "op.yaml").read_text(encoding="utf-8")
    spec = OpSpec.model_validate(yaml.safe_load(text))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(header(folder, spec), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
