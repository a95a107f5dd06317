"""Tiny models as ONNX files."""

from pathlib import Path
from typing import Any

from batchformer_panoptic import PanopticDETR
from batchformer_panoptic.data import ClassTable
from batchformer_panoptic.deployment.onnx import describe, export_onnx
from helpers.tiny_model import NUM_CLASSES, NUM_THINGS, tiny_cfg, tiny_model

# Overrides of `tiny_cfg`: some queries are kept, some are duplicates, some pixels are void.
PANOPTIC: dict[str, Any] = {
    "MODEL__PANOPTIC__SCORE_THRESHOLD_TEST": 0.2,
    "MODEL__PANOPTIC__DUPLICATE_IOU_TEST": 0.5,
    "MODEL__PANOPTIC__MASK_THRESHOLD_TEST": 0.5,
    "MODEL__BATCHFORMER__ENABLED": True,
}
TABLE = ClassTable(
    tuple(f"class {i}" for i in range(NUM_CLASSES)),
    tuple(i < NUM_THINGS for i in range(NUM_CLASSES)),
    tuple((40 * i, 100, 200) for i in range(NUM_CLASSES)),
    tuple(10 + i for i in range(NUM_CLASSES)),
)


def description_of(
    model: PanopticDETR, outputs: str = "results", size: Any = None, **overrides: Any
) -> dict[str, Any]:
    return describe(model, tiny_cfg(**overrides), TABLE, outputs=outputs, size=size)


def exported(
    folder: Path,
    *,
    outputs: str = "results",
    size: Any = None,
    float16: bool = False,
    **overrides: Any,
) -> PanopticDETR:
    """Write model.onnx of a tiny model, and return the model in evaluation mode."""
    model = tiny_model(**overrides).eval()
    description = description_of(model, outputs, size, **overrides)
    export_onnx(model, description, folder / "model.onnx", float16=float16)
    return model
