"""An ONNX file as plain C: one function, constant weights, static memory, no allocation."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from understudy.errors import ModelError, problem
from understudy.export.c_memory import parse_array, plan_memory, read_entry, write_entry
from understudy.export.c_mirror import one_pass
from understudy.export.c_rewrites import rewrite
from understudy.export.c_tables import Tables, insert_tables, with_tables
from understudy.export.target import require_package

FUNCTION_NAME = "student_network_run"
QGEMM_NUM_INPUTS = 9
_GENERATED_NAME = "student_network"
_ENTRY = re.compile(
    rf"^void {_GENERATED_NAME}\((?P<parameters>[^)]*)\) \{{\n(?P<body>.*?)^\}}\n", re.M | re.S
)
_LOADER = re.compile(rf"^_Bool {_GENERATED_NAME}_load\([^)]*\) \{{\n.*?^\}}\n", re.M | re.S)
_WEIGHT = re.compile(r"^const EMX_UNUSED (?P<ctype>\w+) \w+(?P<dims>(?:\[\d+\])*) =", re.M)
# ONNX Runtime's names of element types.
_ELEMENT_TYPES = {
    "tensor(float)": onnx.TensorProto.FLOAT,
    "tensor(bool)": onnx.TensorProto.BOOL,
    "tensor(int8)": onnx.TensorProto.INT8,
    "tensor(uint8)": onnx.TensorProto.UINT8,
    "tensor(int16)": onnx.TensorProto.INT16,
    "tensor(uint16)": onnx.TensorProto.UINT16,
    "tensor(int32)": onnx.TensorProto.INT32,
    "tensor(int64)": onnx.TensorProto.INT64,
}


@dataclass(frozen=True)
class CNetwork:
    """C code of a network, as ``void student_network_run(const float *, float *)``.

    Attributes:
        arena_bytes: static RAM of the intermediate results.
        weight_bytes: constant data.
        operators: ONNX operators that the code computes, each once, sorted; "Table" stands for what
            is looked up.
        joined: operators are joined as ONNX Runtime does it; else int8 is computed in float32.
        averages_mirror: the network's logits are the mean of what the code gives for a picture and
            for its mirror image.
    """

    code: str
    arena_bytes: int
    weight_bytes: int
    num_nodes: int
    operators: tuple[str, ...]
    joined: bool
    averages_mirror: bool = False


def generate_network(path: Path) -> CNetwork:
    """Translate an ONNX file of one image input and logits, float32 or QDQ, to C.

    ONNX Runtime first joins operators as it would to run the file: a quantised layer between its
    quantise and dequantise nodes becomes one of integer arithmetic, an activation a part of its
    convolution, one between int8 values a table. So the C code computes what ONNX Runtime computes,
    on a quarter of the memory for int8. Where the code generator lacks a joined operator, the file
    is taken as it is. Of a network that averages over mirror images it is one pass.

    Raises:
        MissingExtraError: emx-onnx-cgen is not installed.
        ModelError: an operator is missing, named with its layer.
    """
    generator = require_package("emx_onnx_cgen.compiler", target="c", package="emx-onnx-cgen")
    failures = require_package("emx_onnx_cgen.errors", target="c", package="emx-onnx-cgen")
    whole = prepare(onnx.load(path))
    single = one_pass(whole)
    plain = whole if single is None else single
    try:
        model, tables = with_tables(join_operators(plain))
        code = _compiler(generator).compile(model)
        network = _with_static_memory(code, model, tables, joined=True)
    except failures.CompilerError:
        try:
            code = _compiler(generator).compile(plain)
            network = _with_static_memory(code, plain, {}, joined=False)
        except failures.CompilerError as error:
            raise _untranslated(plain, str(error)) from error
    return replace(network, averages_mirror=single is not None)


@functools.cache
def _compiler(generator: Any) -> Any:
    # Kept, because it parses 170 templates (3 s) before its first network.
    return generator.Compiler(
        generator.CompilerOptions(
            model_name=_GENERATED_NAME,
            restrict_arrays=False,  # results may overwrite operands
            large_temp_threshold_bytes=0,  # nothing on the heap
            large_weight_threshold=0,  # no weight file
        )
    )


def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy for one image, without metadata, its names safe inside a C comment."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    # The generator writes them into a comment, which a class name could end.
    copy.ClearField("metadata_props")
    copy.ClearField("doc_string")
    graph = copy.graph
    graph.ClearField("doc_string")
    graph.ClearField("value_info")
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    safe = _safe_names(_all_names(graph))
    for node in graph.node:
        node.name = safe.get(node.name, node.name)
        node.input[:] = [safe.get(name, name) for name in node.input]
        node.output[:] = [safe.get(name, name) for name in node.output]
        node.ClearField("doc_string")
    for named in (*graph.input, *graph.output, *graph.initializer):
        named.name = safe.get(named.name, named.name)
    return copy


def _all_names(graph: onnx.GraphProto) -> list[str]:
    names = [tensor.name for tensor in (*graph.input, *graph.initializer)]
    for node in graph.node:
        names += [node.name, *node.output]
    return names


def _safe_names(names: Iterable[str]) -> dict[str, str]:
    """Return a new name for each that has other characters than letters, digits, ``_`` and ``.``"""
    bad = [name for name in dict.fromkeys(names) if not re.fullmatch(r"[\w./:-]*", name, re.A)]
    return {name: f"{re.sub(r'[^A-Za-z0-9.]', '_', name)}_{i}" for i, name in enumerate(bad)}


def join_operators(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph as ONNX Runtime's portable optimisations leave it, with all shapes."""
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        path = Path(folder) / "joined.onnx"
        options = _session_options()
        # One level more would change layouts to this processor's own.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(path)
        _open(model, options)
        joined = onnx.load(path)
    for node in joined.graph.node:
        if node.op_type == "QGemm":
            # Left out where its result is float; the generator wants it named as empty.
            node.input.extend([""] * (QGEMM_NUM_INPUTS - len(node.input)))
    # ONNX's own shape inference does not know ONNX Runtime's operators.
    probe = onnx.ModelProto()
    probe.CopyFrom(joined)
    inner = {name for node in joined.graph.node for name in node.output if name}
    inner -= {value.name for value in joined.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(inner))
    options = _session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    joined.graph.ClearField("value_info")
    for value in _open(probe, options).get_outputs():
        element = _ELEMENT_TYPES.get(value.type)
        if value.name in inner and element is not None:
            info = onnx.helper.make_tensor_value_info(value.name, element, value.shape)
            joined.graph.value_info.append(info)
    return joined


def _session_options() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return options


def _open(model: onnx.ModelProto, options: Any) -> Any:
    return onnxruntime.InferenceSession(
        model.SerializeToString(), sess_options=options, providers=["CPUExecutionProvider"]
    )


def _with_static_memory(
    code: str, model: onnx.ModelProto, tables: Tables, *, joined: bool
) -> CNetwork:
    found = _ENTRY.search(code)
    if found is None:
        raise ModelError(
            problem(
                "the C code generator wrote no entry function of the form that is known",
                expected="emx-onnx-cgen 1.4",
                mend="Install that version.",
            )
        )
    entry = read_entry(code, found["parameters"], found["body"])
    plan = plan_memory(entry)
    header = '#include "student_network.h"\n\n#include <stdint.h>'
    code = code[: found.start()] + write_entry(entry, plan, FUNCTION_NAME) + code[found.end() :]
    code = _LOADER.sub("", code)
    names = {"Table" if node.name in tables else node.op_type for node in model.graph.node}
    operators = tuple(sorted(names))
    code = rewrite(code, operators=operators, symmetric_weights=_has_symmetric_weights(model))
    code = insert_tables(code, tables)
    weights = [parse_array(weight["ctype"], weight["dims"]) for weight in _WEIGHT.finditer(code)]
    # Global names of a generated file could meet those of the program it is linked into.
    code = re.sub(r"^extern const ", "static const ", code, flags=re.M)
    code = re.sub(r"^const EMX_UNUSED ", "static const EMX_UNUSED ", code, flags=re.M)
    code = code.replace("#include <stdint.h>", header, 1)
    return CNetwork(
        code=code,
        arena_bytes=plan.num_bytes,
        weight_bytes=sum(array.num_bytes for array in weights),
        num_nodes=len(model.graph.node),
        operators=operators,
        joined=joined,
    )


def _has_symmetric_weights(model: onnx.ModelProto) -> bool:
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    names = [n.input[5] for n in model.graph.node if n.op_type == "QLinearConv"]
    found = [constants.get(name) for name in names]
    return all(t is not None and not onnx.numpy_helper.to_array(t).any() for t in found)


def _untranslated(model: onnx.ModelProto, reason: str) -> ModelError:
    named = re.search(r"Unsupported op (?:[\w.]+\.)?(\w+)", reason)
    operator = named.group(1) if named else ""
    node = next(
        (n for n in model.graph.node if n.op_type == operator or (n.name and n.name in reason)),
        None,
    )
    what = "the network" if node is None else f"{node.op_type} {_layer_of(model.graph, node)}"
    return ModelError(
        problem(
            f"{what} cannot be translated to C ({reason.splitlines()[0]})",
            expected="operators that emx-onnx-cgen knows, on fixed shapes",
            mend="Replace the layer by standard operators, or export to another target.",
        )
    )


def _layer_of(graph: onnx.GraphProto, node: onnx.NodeProto) -> str:
    """Say where a node is: by its own weights, else by the last weights before it."""
    weights = {tensor.name for tensor in graph.initializer if "." in tensor.name}
    makers = {name: other for other in graph.node for name in other.output}
    where, seen, todo = "in layer", set(), [node]
    while todo:
        current = todo.pop(0)
        for name in current.input:
            if name in weights:
                return f"{where} {name.rpartition('.')[0]}"
            if name in makers and name not in seen:
                seen.add(name)
                todo.append(makers[name])
        where = "after layer"
    return f"({node.name})"
