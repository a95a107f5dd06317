"""Merges and draws 100 masks of a large photograph; writes the memory that this takes, in MiB.

python tests/helpers/large_photograph.py MERGE HEIGHT WIDTH
"""

import resource
import sys

import numpy as np
import torch
from torch.nn import functional as F

from batchformer_panoptic.data import ClassTable
from batchformer_panoptic.modeling.postprocessing.masks import ImageMasks
from batchformer_panoptic.modeling.postprocessing.panoptic import (
    MERGES,
    PanopticOptions,
    merge_panoptic,
)
from batchformer_panoptic.visualization import draw_result

QUERIES, CLASSES = 100, 10


def peak() -> int:
    """Largest memory of this process so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(merge: str, height: int, width: int) -> None:
    table = ClassTable.from_json(
        [{"id": i, "name": f"class {i}", "isthing": i % 2} for i in range(CLASSES)]
    )
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(QUERIES, 1, 8, 10, generator=generator) * 4
    logits = F.interpolate(coarse, size=(200, 267), mode="bilinear")[:, 0]
    image = np.full((height, width, 3), 99, dtype=np.uint8)
    sizes = {"padded_size": (800, 1088), "image_size": (800, 1066), "output_size": (height, width)}
    start = peak()
    result = merge_panoptic(
        ImageMasks(logits, **sizes),
        torch.rand(QUERIES, generator=generator),
        torch.randint(CLASSES, (QUERIES,), generator=generator),
        merge=MERGES[merge],
        thing_class_ids=table.thing_class_ids,
        options=PanopticOptions(duplicate_iou=0.9, overlap_threshold=0.0),
    )
    assert len(result[1]) > 10, result[1]
    merged = peak()
    draw_result(image, {"panoptic_seg": result}, table, scale=1.0)
    sys.stdout.write(f"{(merged - start) >> 10} {(peak() - start) >> 10}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
