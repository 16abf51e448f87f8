"""ExecuTorch for phones and embedded Linux: a ``.pte`` whose operators XNNPACK runs."""

from __future__ import annotations

import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from understudy.artifacts import write_bytes
from understudy.errors import UnderstudyError
from understudy.export.executorch_int8 import quantize
from understudy.export.onnx_file import portable_copy
from understudy.export.target import Artifact, ExportSource, Precision, require_package
from understudy.export.tracing import (
    cannot_export,
    check_float_layers,
    layer_of,
    module_name,
    quiet,
    trace,
)

PRECISIONS: tuple[Precision, ...] = ("float32", "int8")
RUNS_HERE = True
FILE_NAME = "student.pte"

# How the lowering says that it has no operator.
_NO_OPERATOR = re.compile(
    r"Operator torch\._ops\.([\w.]+) is not (?:in )?Core ATen|Missing out variants: \{'([\w:.]+)'"
)
_ATEN = torch.ops.aten


def export(source: ExportSource, folder: Path, *, precision: Precision) -> Artifact:
    """Write ``student.pte``.

    It takes one image: with an open batch size the global mean, and with it the classifier, would
    not go to XNNPACK.

    Raises:
        MissingExtraError, ModelError: as ``Target.export``.
        InputError: int8 without calibration images, or an unknown float layer.
    """
    calibration_NCHW = source.calibration("executorch") if precision == "int8" else None
    model = portable_copy(source.model)
    check_float_layers(model, source.float_layers)
    with quiet():
        # Before anything is traced: it registers the operators that the lowering uses.
        require_package("executorch.exir", target="executorch", package="executorch")
        example_NCHW = torch.full((2, *source.image_shape), 0.5)
        any_batch = calibration_NCHW is not None
        traced_NCHW = example_NCHW if any_batch else example_NCHW[:1]
        program = trace(model, traced_NCHW, target="executorch", any_batch=any_batch)
        graph = program.module()
        _simplify(graph)
        if calibration_NCHW is not None:
            graph = quantize(graph, source)
        _split_addcmul(graph)
        captured = trace(graph, example_NCHW[:1], target="executorch")
        content, facts = _lower(captured, model, example_NCHW)
    write_bytes(folder / FILE_NAME, content)
    return Artifact("executorch", precision, folder, (FILE_NAME,), batch="one", facts=facts)


def _simplify(graph: GraphModule) -> None:
    """Rewrite what XNNPACK could run but in another form; the values stay the same."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _ATEN._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
        elif node.target is _ATEN.to.dtype and _dtype(node.args[0]) == _dtype(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif (features := _averaged(node)) is not None:
            _average_with_dimensions(graph, node, features)
    _unshare(graph)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()


def _unshare(graph: GraphModule) -> None:
    """Give every run of a layer constants of its own.

    The lowering folds a batch norm into the weight before it, in place: the next run of the layer,
    which has another batch norm, would begin with the folded weight.
    """
    seen: set[str] = set()
    for node in list(graph.graph.nodes):
        if node.target not in (_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.linear.default):
            continue
        for position, constant in enumerate(node.args[1:3], start=1):
            if not isinstance(constant, Node) or constant.op != "get_attr":
                continue
            name = str(constant.target)
            if name in seen:
                value = attrgetter(name)(graph)
                name = f"own_{position}_of_{node.name}"
                graph.register_parameter(name, nn.Parameter(value.detach().clone()))
                with graph.graph.inserting_before(node):
                    own = graph.graph.get_attr(name)
                own.meta = dict(constant.meta)
                node.update_arg(position, own)
            seen.add(name)


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def _averaged(node: Any) -> Any:
    """Return the features NCHW whose global mean NC a node is; None for any other node."""
    total = node
    if node.target is _ATEN.div.Tensor and isinstance(node.args[0], Node):
        # A sum over the pixels, divided by their number.
        total = node.args[0]
    if total.target is not (_ATEN.mean.dim if total is node else _ATEN.sum.dim_IntList):
        return None
    features = total.args[0]
    value = features.meta["val"]
    if value.ndim != 4 or value.dtype != torch.float32 or node.meta["val"].ndim != 2:
        return None
    if sorted(dim % 4 for dim in total.args[1]) != [2, 3]:
        return None
    num_pixels = value.shape[2] * value.shape[3]
    return features if total is node or node.args[1] == num_pixels else None


def _average_with_dimensions(graph: GraphModule, node: Any, features: Any) -> None:
    """Give a global mean as one of shape [N, C, 1, 1], made flat: XNNPACK has only that."""
    with graph.graph.inserting_before(node):
        mean = graph.graph.call_function(_ATEN.mean.dim, (features, [-1, -2], True))
        flat = graph.graph.call_function(_ATEN.flatten.using_ints, (mean, 1))
    stack = node.meta.get("nn_module_stack")
    mean.meta = {"nn_module_stack": stack, "val": features.meta["val"].mean((-1, -2), True)}
    flat.meta = {"nn_module_stack": stack, "val": node.meta["val"]}
    node.replace_all_uses_with(flat)
    graph.graph.erase_node(node)


def _split_addcmul(graph: GraphModule) -> None:
    """Give shift + pixels * scale as two operators: it would be split with a copy of the factor 1.

    After quantisation, so that the normalisation of the pixels stays in float32.
    """
    for node in list(graph.graph.nodes):
        if node.target is not _ATEN.addcmul.default or node.kwargs.get("value", 1) != 1:
            continue
        base, first, second = node.args
        with graph.graph.inserting_before(node):
            product = graph.graph.call_function(_ATEN.mul.Tensor, (first, second))
            total = graph.graph.call_function(_ATEN.add.Tensor, (base, product))
        for new in (product, total):
            new.meta = {"nn_module_stack": node.meta.get("nn_module_stack")}
        node.replace_all_uses_with(total)
        graph.graph.erase_node(node)
    graph.recompile()


def _lower(
    captured: ExportedProgram, model: nn.Module, example_NCHW: Tensor
) -> tuple[bytes, dict[str, Any]]:
    """Return the file and its facts."""
    exir = require_package("executorch.exir", target="executorch", package="executorch")
    partition = require_package(
        "executorch.backends.xnnpack.partition.xnnpack_partitioner",
        target="executorch",
        package="executorch",
    )
    try:
        edge = exir.to_edge_transform_and_lower(
            captured, partitioner=[partition.XnnpackPartitioner()]
        )
        facts = _facts(edge.exported_program())
        lowered = edge.to_executorch()
    # The lowering's passes raise whatever they run into.
    except Exception as error:
        if isinstance(error, UnderstudyError):
            raise
        found = _NO_OPERATOR.search(str(error))
        operator = "" if found is None else (found[1] or found[2])
        layer = ""
        if operator:
            # The model's own program: quantisation has moved its layers about.
            own = trace(model, example_NCHW[:1], target="executorch")
            layer = layer_of(own, operator)
        raise cannot_export(
            "executorch", reason=str(error), layer=layer, operator=operator
        ) from error
    _check_kernels(lowered.exported_program())
    return bytes(lowered.buffer), facts


def _facts(program: ExportedProgram) -> dict[str, Any]:
    """Return what part XNNPACK runs; the rest goes to ExecuTorch's plain portable kernels."""
    outside, num_inside = [], 0
    for node in program.graph.nodes:
        if node.op == "get_attr":
            delegate = getattr(program.graph_module, str(node.target))
            inner = delegate.original_module.graph.nodes
            num_inside += sum(_is_operator(inner_node) for inner_node in inner)
        elif _is_operator(node):
            layer = module_name(node)
            outside.append(f"{_operator_name(node)}{f' in {layer}' if layer else ''}")
    return {
        "num_operators": num_inside + len(outside),
        "num_delegated": num_inside,
        "delegated_share": num_inside / max(1, num_inside + len(outside)),
        "not_delegated": outside,
        "num_delegates": sum(node.op == "get_attr" for node in program.graph.nodes),
    }


def _is_operator(node: Any) -> bool:
    return node.op == "call_function" and hasattr(node.target, "_schema")


def _operator_name(node: Any) -> str:
    return str(node.target._schema.name)


def _check_kernels(program: ExportedProgram) -> None:
    """Raise ModelError for an operator that the runtime has no kernel of."""
    runtime = require_package("executorch.runtime", target="executorch", package="executorch")
    known = runtime.Runtime.get().operator_registry.operator_names
    for node in program.graph.nodes:
        if not _is_operator(node):
            continue
        schema = node.target._schema
        name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
        if name not in known:
            raise cannot_export(
                "executorch", reason="", layer=module_name(node), operator=schema.name
            )
