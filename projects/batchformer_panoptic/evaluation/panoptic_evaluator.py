"""Evaluator of panoptic quality that keeps counts instead of predictions."""

import bisect
import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from panopticapi.evaluation import PQStat
from panopticapi.utils import id2rgb
from tabulate import tabulate

from ..data.images import write_image
from ..data.io import write_json
from ..errors import UserError
from .panoptic_ground_truth import PanopticGroundTruth
from .panoptic_quality import PanopticCounts, Segments, count_image

logger = logging.getLogger(__name__)

RESULTS_NAME = "panoptic_results.json"

# Samplers that give every process the same number of images repeat at most one image per process,
# as its last one. The counts of this many last images are kept separate to remove repetitions.
_NUM_RECENT = 16

# Predictions to look at: number of images in each role, and their longest side in pixels.
_NUM_EXAMPLES, _EXAMPLE_SIDE = 4, 512


class _Example(NamedTuple):
    """A prediction to look at, at most 512 pixels high and wide."""

    rank: tuple[float, str]  # the lowest ranks are kept
    image_id: int | str
    pq: float | None  # of the image, 0 to 1; None without any segment that counts
    segment_map: np.ndarray  # (h, w) integers
    segments_info: list[dict[str, Any]]  # id, category_id (of the data set), score or None


class _Examples:
    """A few predictions to look at: of the first images, and of the worst and best ones.

    Args:
        first_ids: ids of the first images. They are the same in every evaluation.
    """

    def __init__(self, first_ids: Iterable[int | str]) -> None:
        self._first_ids = list(first_ids)
        self._of_role: dict[str, list[_Example]] = {"first": [], "worst": [], "best": []}

    def offer(
        self,
        image_id: int | str,
        pq: float | None,
        segment_map: np.ndarray,
        segments_info: list[dict[str, Any]],
    ) -> None:
        """Keep a copy of a prediction, reduced in size, in each role that it has so far."""
        values: dict[str, float] = {} if pq is None else {"worst": pq, "best": -pq}
        if image_id in self._first_ids:
            values["first"] = self._first_ids.index(image_id)
        for role, value in values.items():
            rank = (value, str(image_id))
            if self._is_wanted(role, rank):
                small, segments = _reduced(segment_map, segments_info)
                self._insert(role, _Example(rank, image_id, pq, small, segments))

    def merge(self, other: "_Examples") -> None:
        """Add the examples of another process."""
        for role, examples in other._of_role.items():
            for example in examples:
                if self._is_wanted(role, example.rank):
                    self._insert(role, example)

    def roles(self) -> Iterator[tuple[str, _Example]]:
        """Yield role and example; of few images, the worst are not repeated as the best ones."""
        worst = {example.image_id for example in self._of_role["worst"]}
        for role, examples in self._of_role.items():
            for example in examples:
                if role != "best" or example.image_id not in worst:
                    yield role, example

    def _is_wanted(self, role: str, rank: tuple[float, str]) -> bool:
        kept = [example.rank for example in self._of_role[role]]
        return rank not in kept and (len(kept) < _NUM_EXAMPLES or rank < kept[-1])

    def _insert(self, role: str, example: _Example) -> None:
        kept = self._of_role[role]
        bisect.insort(kept, example, key=lambda other: other.rank)
        del kept[_NUM_EXAMPLES:]


def _reduced(
    segment_map: np.ndarray, segments_info: list[dict[str, Any]]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return a smaller copy of a map, and the segments that are left in it."""
    factor = min(1.0, _EXAMPLE_SIDE / max(segment_map.shape))
    height, width = (max(1, round(factor * side)) for side in segment_map.shape)
    small = cv2.resize(
        segment_map.astype(np.int32), (width, height), interpolation=cv2.INTER_NEAREST
    )
    left = set(np.unique(small).tolist())
    return small, [info for info in segments_info if info["id"] in left]


class _ProcessCounts(NamedTuple):
    """Counts of one process, the images they belong to, and its examples."""

    counts: PanopticCounts  # of the images in ``settled``
    settled: set[int | str]  # image ids
    recent: list[tuple[int | str, PanopticCounts]]
    examples: _Examples


class PanopticEvaluator(DatasetEvaluator):
    """Panoptic quality with panopticapi's numbers, image by image and without intermediate files.

    The counts of an image are added as soon as it is predicted, so that memory does not grow with
    predictions: only ids of finished images and the annotations are kept per image. Every image
    counts once. One that a process sees again is skipped, and so are the repetitions at the end of
    a process by samplers that pad to equal shares.

    A model output must have ``panoptic_seg``: an (H, W) integer segment map at the original size
    (0 is void) and a list of segments with ``id`` and contiguous ``category_id``. It is not
    modified.
    """

    def __init__(
        self, dataset_name: str, output_dir: str | None = None, *, allow_subset: bool = False
    ) -> None:
        """Read the annotation JSON of the data set.

        Args:
            dataset_name: a registered panoptic data set with one id space for things and stuff.
            output_dir: for ``panoptic_results.json`` and the predictions in ``examples``; None: no
                file is written.
            allow_subset: accept that images of the data set are not evaluated.
        """
        self._truth = PanopticGroundTruth(MetadataCatalog.get(dataset_name))
        self._output_dir = output_dir
        self._allow_subset = allow_subset
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._counts = PanopticCounts()
        self._settled: set[int | str] = set()
        self._recent: deque[tuple[int | str, PanopticCounts]] = deque()
        self._examples = _Examples(itertools.islice(self._truth.images, _NUM_EXAMPLES))

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Count a batch.

        Args:
            inputs: the model's inputs, of which ``image_id`` is read.
            outputs: the model's outputs, of which ``panoptic_seg`` is read.
        """
        for image_input, output in zip(inputs, outputs, strict=True):
            image_id = image_input["image_id"]
            if image_id in self._settled or any(image_id == recent for recent, _ in self._recent):
                continue
            segment_map, segments_info = self._read_output(image_id, output)
            counts = self._count(image_id, segment_map, segments_info)
            self._recent.append((image_id, counts))
            if self._output_dir is not None:
                self._examples.offer(image_id, counts.mean_pq(), segment_map, segments_info)
            if len(self._recent) > _NUM_RECENT:
                settled_id, settled = self._recent.popleft()
                self._settled.add(settled_id)
                self._counts += settled

    def _read_output(
        self, image_id: int | str, output: Mapping[str, Any]
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Copy a prediction to numpy (H, W) and to segments with data set category ids."""
        if image_id not in self._truth.images:
            raise UserError(
                f"image {image_id} is not annotated in {self._truth.json_file}; evaluate on the "
                "data set that the images come from"
            )
        if "panoptic_seg" not in output:
            raise UserError(
                "the model predicts no panoptic segments, which panoptic quality needs: use a "
                "model that predicts masks"
            )
        panoptic_seg: tuple[torch.Tensor, list[dict[str, Any]] | None] = output["panoptic_seg"]
        segment_map, segments_info = panoptic_seg
        if segments_info is None:
            raise UserError(
                f"the prediction for image {image_id} has no segments_info: ids made of category "
                "and label_divisor are not supported; use Detectron2's COCOPanopticEvaluator"
            )
        converted = [
            {
                "id": int(segment["id"]),
                "category_id": self._dataset_id(image_id, segment),
                "score": segment.get("score"),
            }
            for segment in segments_info
        ]
        return segment_map.cpu().numpy(), converted

    def _dataset_id(self, image_id: int | str, segment: Mapping[str, Any]) -> int:
        dataset_id = self._truth.dataset_ids.get(int(segment["category_id"]))
        if dataset_id is None:
            raise UserError(
                f"predicted segment {segment['id']} of image {image_id} has the class "
                f"{segment['category_id']}, but the data set {self._truth.name} has the classes 0 "
                f"to {len(self._truth.dataset_ids) - 1}; evaluate on a data set with the model's "
                "classes"
            )
        return dataset_id

    def _count(
        self, image_id: int | str, segment_map: np.ndarray, segments_info: list[dict[str, Any]]
    ) -> PanopticCounts:
        image = self._truth.images[image_id]
        height, width = segment_map.shape
        return count_image(
            segment_map,
            Segments.from_segments_info(segments_info),
            self._truth.read_segment_map(image, (height, width)),
            image.segments,
            image_name=f"{image.png_name} (id {image_id})",
        )

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Sum over processes, report, and write the file; every process has to call it.

        Returns:
            ``{"panoptic_seg": {"PQ", "SQ", "RQ", "PQ_th", ..., "RQ_st"}}`` in percent on the main
            process, without the groups that have no class in the images; empty elsewhere.

        Raises:
            UserError: images of the data set were not evaluated, or several processes evaluated
                the same images.
        """
        comm.synchronize()
        parts = comm.gather(
            _ProcessCounts(self._counts, self._settled, list(self._recent), self._examples)
        )
        if not comm.is_main_process():
            return OrderedDict()
        counts, evaluated, examples = _merge(parts)
        self._check_complete(evaluated)
        quality = PanopticQuality.from_counts(counts.pq, self._truth.categories)
        logger.info("Panoptic quality on %d images:\n%s", len(evaluated), quality.group_table())
        logger.info("Panoptic quality per class:\n%s", quality.class_table())
        if self._output_dir is not None:
            self._write_results(Path(self._output_dir), quality, counts, len(evaluated), examples)
        return OrderedDict(panoptic_seg=quality.to_metrics())

    def _check_complete(self, evaluated: set[int | str]) -> None:
        missing = [image_id for image_id in self._truth.images if image_id not in evaluated]
        if not missing:
            return
        message = (
            f"{len(missing)} of the {len(self._truth.images)} images of {self._truth.name} were "
            f"not evaluated, the first with the id {missing[0]}"
        )
        if not self._allow_subset:
            raise UserError(f"{message}; run the model on the whole data set or allow a subset")
        logger.warning("%s: the panoptic quality is that of a subset", message)

    def _write_results(
        self,
        folder: Path,
        quality: "PanopticQuality",
        counts: PanopticCounts,
        num_images: int,
        examples: _Examples,
    ) -> None:
        """Write the predictions of the examples, and a JSON with everything that was measured."""
        rows: list[dict[str, Any]] = []
        for number, (role, example) in enumerate(examples.roles()):
            name = f"examples/{number:02d}_{role}.png"
            write_image(folder / name, id2rgb(example.segment_map))
            row = {"role": role, "image_id": example.image_id, "pq": example.pq, "png": name}
            rows.append({**row, "segments_info": example.segments_info})
        errors = sorted(counts.errors.items(), key=lambda item: (-item[1], str(item[0])))
        content = {
            "dataset": self._truth.name,
            "num_images": num_images,
            "num_images_of_dataset": len(self._truth.images),
            **quality.to_json(),
            "errors": [{**error._asdict(), "count": count} for error, count in errors],
            "examples": rows,
        }
        write_json(folder / RESULTS_NAME, content, indent=1)


def _merge(
    parts: Sequence[_ProcessCounts],
) -> tuple[PanopticCounts, set[int | str], _Examples]:
    """Add up the counts of all processes, every image once; also return ids and examples."""
    total = PanopticCounts()
    evaluated: set[int | str] = set()
    for part in parts:
        repeated = evaluated & part.settled
        if repeated:
            raise UserError(
                f"several processes evaluated the same {len(repeated)} images, such as "
                f"{min(repeated, key=str)}; give the test loader a sampler that splits the "
                "data set (Detectron2's InferenceSampler)"
            )
        evaluated |= part.settled
        total += part.counts
    for part in parts:
        for image_id, counts in part.recent:
            if image_id not in evaluated:
                evaluated.add(image_id)
                total += counts
        parts[0].examples.merge(part.examples)
    return total, evaluated, parts[0].examples


# ---------------------------------------------------------------------------
# Averages over classes
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupQuality:
    """Averages over the classes of a group that occur in the images; values from 0 to 1."""

    pq: float
    sq: float
    rq: float
    num_classes: int


@dataclass(frozen=True)
class ClassQuality:
    """Quality of one class; the three ratios (0 to 1) are None when the class never occurs."""

    name: str
    category_id: int  # of the data set
    is_thing: bool
    pq: float | None
    sq: float | None
    rq: float | None
    tp: int
    fp: int
    fn: int


@dataclass(frozen=True)
class PanopticQuality:
    """Result of one evaluation. A group is None when none of its classes occurs."""

    all: GroupQuality | None
    things: GroupQuality | None
    stuff: GroupQuality | None
    per_class: tuple[ClassQuality, ...]

    @classmethod
    def from_counts(
        cls, counts: PQStat, categories: Mapping[int, Mapping[str, Any]]
    ) -> "PanopticQuality":
        """Average counts with panopticapi's formulas.

        Args:
            counts: contributions of all images, per data set category id.
            categories: COCO panoptic category (``name``, ``isthing``) per data set category id.
        """
        return cls(
            all=_group_quality(counts, categories, None),
            things=_group_quality(counts, categories, True),
            stuff=_group_quality(counts, categories, False),
            per_class=_class_qualities(counts, categories),
        )

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values for JSON; ratios are from 0 to 1, missing ones are None."""
        return asdict(self)

    def to_metrics(self) -> dict[str, float]:
        """Convert to Detectron2's metric names in percent; a missing group is left out.

        Detectron2 formats and stores every metric as a number, so None is not possible.
        """
        metrics: dict[str, float] = {}
        for suffix, group in (("", self.all), ("_th", self.things), ("_st", self.stuff)):
            if group is not None:
                metrics["PQ" + suffix] = 100 * group.pq
                metrics["SQ" + suffix] = 100 * group.sq
                metrics["RQ" + suffix] = 100 * group.rq
        return metrics

    def group_table(self) -> str:
        """Format the groups as a table in percent, "n/a" for a missing one."""
        rows: list[list[str]] = []
        for label, group in (("All", self.all), ("Things", self.things), ("Stuff", self.stuff)):
            values = (None, None, None) if group is None else (group.pq, group.sq, group.rq)
            size = 0 if group is None else group.num_classes
            rows.append([label, *map(_percent, values), str(size)])
        return _table(rows, ["", "PQ", "SQ", "RQ", "#classes"])

    def class_table(self) -> str:
        """Format the classes as a table in percent, "n/a" for classes that never occur."""
        rows = [
            [row.name, "thing" if row.is_thing else "stuff"]
            + [_percent(value) for value in (row.pq, row.sq, row.rq)]
            + [str(number) for number in (row.tp, row.fp, row.fn)]
            for row in self.per_class
        ]
        return _table(rows, ["class", "kind", "PQ", "SQ", "RQ", "TP", "FP", "FN"])


def _group_quality(
    counts: PQStat, categories: Mapping[int, Mapping[str, Any]], things: bool | None
) -> GroupQuality | None:
    members = {
        category_id: category
        for category_id, category in categories.items()
        if things is None or (category["isthing"] == 1) == things
    }
    # panopticapi divides by the number of classes that occur.
    if not any(_occurs(counts, category_id) for category_id in members):
        return None
    average, _ = counts.pq_average(members, isthing=things)
    return GroupQuality(
        float(average["pq"]), float(average["sq"]), float(average["rq"]), int(average["n"])
    )


def _class_qualities(
    counts: PQStat, categories: Mapping[int, Mapping[str, Any]]
) -> tuple[ClassQuality, ...]:
    rows: list[ClassQuality] = []
    for category_id, category in categories.items():
        pq = sq = rq = None
        if _occurs(counts, category_id):
            _, per_class = counts.pq_average({category_id: category}, isthing=None)
            pq, sq, rq = (float(per_class[category_id][key]) for key in ("pq", "sq", "rq"))
        of_class = counts[category_id]
        rows.append(
            ClassQuality(
                name=str(category["name"]),
                category_id=category_id,
                is_thing=category["isthing"] == 1,
                pq=pq,
                sq=sq,
                rq=rq,
                tp=int(of_class.tp),
                fp=int(of_class.fp),
                fn=int(of_class.fn),
            )
        )
    return tuple(rows)


def _occurs(counts: PQStat, category_id: int) -> bool:
    of_class = counts[category_id]
    return of_class.tp + of_class.fp + of_class.fn > 0


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.3f}"


def _table(rows: list[list[str]], headers: list[str]) -> str:
    # Numbers are text already; without disable_numparse, tabulate parses class names like "1e3".
    alignment = ["left" if header in ("", "class", "kind") else "right" for header in headers]
    return tabulate(
        rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=alignment
    )
