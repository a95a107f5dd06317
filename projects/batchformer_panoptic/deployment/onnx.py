"""Export to ONNX, for ONNX Runtime and other engines, and to a ``.pt2`` file for PyTorch itself."""

import json
import shutil
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ..data import ClassTable
from ..data.io import write_atomically
from ..errors import UserError, one_line
from ..modeling.panoptic_detr import PanopticDETR
from . import runtime
from .graph import BoxBatch, RawModel, RawOutputs, ResultModel
from .merging import SegmentBatch, check_merge

OPSET = 20
RUNTIME_NAME = "predict.py"
# Operators of --float16. Coordinates, position encodings and softmax would lose too much.
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
# Sizes of the example; all of them are variables of the graph.
_BATCH, _SIZE = 2, (192, 256)


def export_program(
    model: PanopticDETR, *, outputs: str = "results", size: Sequence[int] | None = None
) -> ExportedProgram:
    """Export a model to a graph of PyTorch operators.

    Args:
        model: in evaluation mode, on the CPU; not changed.
        outputs: "results" for segments or boxes, "raw" for the predictions of all queries.
        size: (height, width) of the only accepted images; None: any batch, and any multiples of
            the model's ``size_divisibility``, which keep the sizes of maps simple expressions.

    Raises:
        UserError: the merge of the config has no form as a graph, the size is no such multiple, or
            the backbone needs a size.
    """
    height, width = size or _SIZE
    divisor = model.size_divisibility
    if height % divisor or width % divisor:
        raise UserError(
            f"--size is {height} {width}; this model needs multiples of {divisor}, to which images "
            "are padded"
        )
    if size is None and any(type(module).__name__.endswith("Same") for module in model.modules()):
        raise UserError(
            "the backbone pads by the size of its input, as TensorFlow does, so that a graph for "
            "all sizes cannot be made: give --size HEIGHT WIDTH"
        )
    sizes = torch.tensor([[height, width]] * _BATCH)
    images = torch.zeros(_BATCH, len(model.pixel_mean), height, width)
    dynamic = Dim.DYNAMIC
    of_images: dict[int, Any] = {0: dynamic}
    if size is None:
        rows, columns = (divisor * Dim(name, min=2) for name in ("rows", "columns"))
        of_images |= {2: rows, 3: columns} if divisor > 1 else {2: dynamic, 3: dynamic}
    inputs: tuple[Tensor, ...] = (images, sizes)
    shapes: tuple[dict[int, Any], ...] = (of_images, {0: dynamic})
    if outputs == "results":
        if model.mask_head is not None:
            check_merge(model.inference_options.merge)
        threshold = torch.tensor(model.inference_options.panoptic.score_threshold)
        inputs, shapes = (*inputs, sizes.clone(), threshold), (*shapes, {0: dynamic}, {})
        graph: torch.nn.Module = ResultModel(model)
    else:
        graph = RawModel(model)
    with torch.no_grad():
        return torch.export.export(graph.eval(), inputs, dynamic_shapes=shapes, strict=False)


def output_names(model: PanopticDETR, outputs: str) -> list[str]:
    """Names of the outputs of a graph, in order."""
    if outputs == "results":
        return list((BoxBatch if model.mask_head is None else SegmentBatch)._fields)
    there = {"boxes": model.transformer.predicts_boxes, "masks": model.mask_head is not None}
    return [name for name in RawOutputs._fields if there.get(name, True)]


def describe(
    model: PanopticDETR,
    cfg: CfgNode,
    table: ClassTable,
    *,
    outputs: str,
    size: Sequence[int] | None,
) -> dict[str, Any]:
    """What a program needs to know to use a graph; the metadata of exported files."""
    options = model.inference_options
    boxes_only = model.mask_head is None
    description = {
        "version": version("batchformer-panoptic"),
        "transformer": cfg.MODEL.DETR.TRANSFORMER_NAME,
        "outputs": outputs,
        "format": cfg.INPUT.FORMAT,
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "normalized_in_graph": True,
        "size_divisor": model.size_divisibility,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "score_threshold": (
            options.instance_score_threshold if boxes_only else options.panoptic.score_threshold
        ),
        "last_logit_is_no_object": model.scoring.num_outputs > model.scoring.num_classes,
        "classes": table.to_json(),
    }
    if not boxes_only:
        description["merge"] = cfg.MODEL.PANOPTIC.MERGE_TEST
        description["thresholds"] = options.panoptic._asdict()
    return description | ({"size": list(size)} if size else {})


def export_onnx(
    model: PanopticDETR,
    description: dict[str, Any],
    path: Path,
    *,
    float16: bool = False,
) -> None:
    """Write an ONNX file and, beside it, the program that runs it.

    Args:
        model: in evaluation mode, on the CPU.
        description: of :func:`describe`; it decides about outputs and size.
        path: the file.
        float16: weights and products in float16; inputs, outputs, scores and the merge stay in
            float32.

    Raises:
        UserError: a package of the extra "onnx" is missing, or see :func:`export_program`.
    """
    onnx, slimmer, _ = map(_import, ("onnx", "onnxslim", "onnxscript"))  # torch needs the last one
    outputs = description["outputs"]
    program = export_program(model, outputs=outputs, size=description.get("size"))
    names = ["images", "image_sizes", "output_sizes", "score_threshold"]
    exported = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=names if outputs == "results" else names[:2],
        output_names=output_names(model, outputs),
    )
    assert exported is not None
    content = exported.model_proto
    content = slimmer.slim(_with_float16(content) if float16 else content)
    onnx.helper.set_model_props(
        content, {runtime.METADATA_KEY: json.dumps(description, ensure_ascii=False)}
    )
    write_atomically(str(path), lambda name: onnx.save(content, name))
    shutil.copyfile(runtime.__file__, path.parent / RUNTIME_NAME)


def export_pt2(model: PanopticDETR, description: dict[str, Any], path: Path) -> None:
    """Write a ``.pt2`` file, which ``torch.export.load`` reads without this package.

    Its extra file ``description.json`` holds the description.
    """
    program = export_program(model, outputs=description["outputs"], size=description.get("size"))
    extra = {"description.json": json.dumps(description, ensure_ascii=False)}
    write_atomically(str(path), lambda name: torch.export.save(program, name, extra_files=extra))


def _with_float16(content: Any) -> Any:
    """Compute the products of the network, and store their weights, in float16.

    Converters of whole graphs also round everything between operations, coordinates included.
    """
    onnx = _import("onnx")
    graph, half = content.graph, onnx.TensorProto.FLOAT16
    weights = {weight.name: weight for weight in graph.initializer}
    nodes: list[Any] = []
    converted: set[str] = set()
    for node in graph.node:
        is_network = any("/model." in p.value for p in node.metadata_props if p.key == "namespace")
        nodes.append(node)
        if node.op_type not in _PRODUCTS or not is_network:
            continue
        for name in set(node.input) - converted - {""}:
            if name in weights:
                values = onnx.numpy_helper.to_array(weights[name]).astype(np.float16)
                graph.initializer.append(onnx.numpy_helper.from_array(values, f"{name}_half"))
            else:
                cast = onnx.helper.make_node("Cast", [name], [f"{name}_half"], to=half)
                nodes.insert(-1, cast)
            converted.add(name)
        (output,) = node.output
        node.input[:] = [name and f"{name}_half" for name in node.input]
        node.output[:] = [f"{output}_product"]
        cast = onnx.helper.make_node("Cast", node.output, [output], to=onnx.TensorProto.FLOAT)
        nodes.append(cast)
    del graph.node[:]
    graph.node.extend(nodes)
    return content


def _import(name: str) -> Any:
    """Import a package of the extra "onnx"."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"the export to ONNX needs {name}, which cannot be imported ({one_line(error)}): "
            "pip install 'batchformer-panoptic[onnx]'"
        ) from error
