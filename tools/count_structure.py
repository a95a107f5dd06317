"""Counts of the package's structure: files, their lengths, comments, files entered by one step.

    python tools/count_structure.py

The last count traces one training step of the quickstart's Conditional-DETR (forward, backward,
optimiser) on random images. A file counts as entered if at least one of its functions is called.
"""

import argparse
import io
import statistics
import sys
import threading
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import batchformer_panoptic  # before Detectron2, whose import would warn

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from batchformer_panoptic.engine import load_config
from batchformer_panoptic.engine.solver import build_optimizer
from batchformer_panoptic.errors import command

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(batchformer_panoptic.__file__).resolve().parent
QUICKSTART = ROOT / "configs" / "quickstart" / "batchformer_conditional_detr_shapes.yaml"
SHORT = 60  # lines; a file below this should have a reason to exist
NUM_CLASSES, NUM_THINGS = 7, 4  # those of the quickstart data set


class Counts(NamedTuple):
    """Counts over the Python files of a folder.

    Attributes:
        lines: the lines of each file, by path relative to the folder.
        comment_lines: lines with nothing but a comment.
    """

    lines: dict[str, int]
    comment_lines: int

    @property
    def short_files(self) -> list[str]:
        """Files below `SHORT` lines."""
        return [name for name, count in self.lines.items() if count < SHORT]

    @property
    def comment_share(self) -> float:
        """Comment lines among all lines, 0 to 1."""
        return self.comment_lines / sum(self.lines.values())


def count_files(folder: Path) -> Counts:
    lines, comments = {}, 0
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines[path.relative_to(folder).as_posix()] = len(text.splitlines())
        comments += sum(
            token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
        )
    return Counts(lines, comments)


def quickstart_model() -> tuple[CfgNode, nn.Module]:
    """The quickstart's Conditional-DETR with random weights, in training mode, on the CPU."""
    cfg = load_config(str(QUICKSTART), ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.DETR.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.PANOPTIC.THING_CLASS_IDS = list(range(NUM_THINGS))
    torch.manual_seed(0)
    return cfg, build_model(cfg).train()


def random_batch(num_images: int = 2, size: int = 64) -> list[dict[str, Any]]:
    """Images of noise; the left half of each is one segment, the right half another."""
    half = size // 2
    segment_map = torch.zeros(size, size, dtype=torch.int16)
    segment_map[:, half:] = 1
    boxes = torch.tensor([[0, 0, half, size], [half, 0, size, size]], dtype=torch.float32)
    batch = []
    for image_id in range(num_images):
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.tensor([image_id % NUM_THINGS, NUM_THINGS])
        batch.append(
            {
                "image": torch.randint(0, 256, (3, size, size), dtype=torch.uint8),
                "instances": instances,
                "segment_map": segment_map,
                "height": size,
                "width": size,
                "image_id": image_id,
                "file_name": f"random_{image_id}.png",
            }
        )
    return batch


@contextmanager
def entered_files(folder: Path) -> Iterator[set[str]]:
    """Collect the files below a folder whose functions are called while the context is open."""
    entered: set[str] = set()
    prefix = str(folder) + "/"

    def record(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(prefix):
            entered.add(frame.f_code.co_filename.removeprefix(prefix))

    # Autograd may call Python from threads of its own.
    threading.setprofile(record)
    previous = sys.getprofile()
    sys.setprofile(record)
    try:
        yield entered
    finally:
        sys.setprofile(previous)
        threading.setprofile(None)


def files_of_training_step() -> list[str]:
    """Package files that one training step of that model enters, sorted."""
    cfg, model = quickstart_model()
    optimizer = build_optimizer(cfg, model)
    batch = random_batch()
    with entered_files(PACKAGE) as entered:
        losses: dict[str, Tensor] = model(batch)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    return sorted(entered)


@command
def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    counts = count_files(PACKAGE)
    lengths = list(counts.lines.values())
    step = files_of_training_step()
    print(f"package files: {len(lengths)}")
    print(f"files below {SHORT} lines: {len(counts.short_files)}")
    print(f"lines of a file, median / max: {statistics.median(lengths):g} / {max(lengths)}")
    print(f"comment lines: {100 * counts.comment_share:.1f} %")
    print(f"package files entered by one training step: {len(step)}")
    for name in step:
        print(f"  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
