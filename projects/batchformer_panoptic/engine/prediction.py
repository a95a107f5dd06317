"""Predictions for programs: the result of one image, and a folder with the results of many.

H, W: size of the photograph; S: segments.
"""

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util

from ..data import ClassTable
from ..data.images import ImageArray, write_image
from ..data.io import read_coco_json, write_atomically, write_json, writing
from ..data.segment_maps import segment_extents, write_segment_map
from ..deployment.runtime import PredictedSegment
from ..errors import UserError, one_line
from ..visualization import draw_result, legend, legend_entries


class Prediction:
    """The segments of one photograph.

    Attributes:
        image_bgr: the photograph, (H, W, 3) uint8.
        table: the classes.
        segment_map: (H, W) int32, the id of the segment of each pixel; 0 is void. None for a model
            that predicts boxes only.

    Args:
        image_bgr: kept, not copied.
        result: of the model for this image, in Detectron2's format, with ``panoptic_seg`` or else
            ``instances``.
        table: the classes that the class ids of the result refer to.
    """

    def __init__(self, image_bgr: ImageArray, result: Mapping[str, Any], table: ClassTable) -> None:
        self.image_bgr = image_bgr
        self.table = table
        self.segment_map: npt.NDArray[np.int32] | None = None
        self._result = result
        if "panoptic_seg" in result:
            self.segment_map = result["panoptic_seg"][0].cpu().numpy()

    @cached_property
    def segments(self) -> list[PredictedSegment]:
        """All segments in ascending order of id."""
        if self.segment_map is None:
            return list(self._boxes())
        extents = segment_extents(self.segment_map)
        return [
            self._segment(info["id"], info["category_id"], info["score"], *extents[int(info["id"])])
            for info in self._result["panoptic_seg"][1]
        ]

    def _boxes(self) -> Iterator[PredictedSegment]:
        instances = self._result["instances"].to("cpu")
        rows = zip(
            instances.pred_classes.tolist(),
            instances.scores.tolist(),
            instances.pred_boxes.tensor.tolist(),
            strict=True,
        )
        for number, (class_id, score, (x0, y0, x1, y1)) in enumerate(rows, 1):
            width, height = x1 - x0, y1 - y0
            yield self._segment(number, class_id, score, width * height, (x0, y0, width, height))

    def _segment(
        self, number: int, class_id: int, score: float, area: float, bbox_xywh: tuple[Any, ...]
    ) -> PredictedSegment:
        name, is_thing = self.table.names[class_id], self.table.is_thing[class_id]
        x, y, width, height = bbox_xywh
        box = (x, y, width, height)
        return PredictedSegment(int(number), class_id, name, is_thing, score, area, box)

    def draw(self, scale: float | None = 1.0) -> ImageArray:
        """Draw the segments on the photograph.

        Args:
            scale: size of the picture relative to the photograph. None: a short side below 384
                pixels is enlarged to 384.

        Returns:
            uint8 RGB.
        """
        return draw_result(self.image_bgr[:, :, ::-1], dict(self._result), self.table, scale=scale)

    def to_supervision(self) -> Any:
        """Return ``supervision.Detections`` with boxes, masks, scores, class ids and names.

        Raises:
            UserError: the package supervision cannot be imported.
        """
        try:
            detections = import_module("supervision").Detections
        except ImportError as error:
            raise UserError(
                f"to_supervision() needs supervision, which cannot be imported ({one_line(error)}):"
                " pip install 'batchformer-panoptic[supervision]'"
            ) from error
        boxes = np.array([s.bbox_xywh for s in self.segments], dtype=np.float32).reshape(-1, 4)
        masks = None
        if self.segment_map is not None:
            ids = np.array([s.id for s in self.segments], dtype=np.int32)
            masks = self.segment_map == ids[:, None, None]
        return detections(
            xyxy=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
            mask=masks,
            confidence=np.array([s.score for s in self.segments], dtype=np.float32),
            class_id=np.array([s.class_id for s in self.segments], dtype=int),
            data={"class_name": np.array([s.class_name for s in self.segments], dtype=str)},
        )


# ---------------------------------------------------------------------------
# A folder of predictions
# ---------------------------------------------------------------------------

_RECORDS = "predictions.jsonl"
_CONTENT = (
    _RECORDS, "panoptic", "panoptic.json", "instances.json", "segments.csv", "overlays",
    "legend.png",
)  # fmt: skip
_LEGEND_WIDTH, _LEGEND_TEXT = 1000, 20  # pixels
_CSV_HEADER = ("image", "segment", "class", "score", "area", "x", "y", "width", "height")


class PredictionFolder:
    """Writes predictions to a folder, and continues a folder that is not complete.

    The folder gets

    - ``panoptic/NAME.png`` and ``panoptic.json``: COCO's panoptic format, with scores;
    - ``instances.json``: COCO's instances format with scores; things as run-length codes, or boxes;
    - ``segments.csv``: one line for each segment;
    - ``overlays/NAME.jpg`` in the size of the photograph, and ``legend.png``;
    - ``predictions.jsonl``: a line for each finished image, from which the other lists are written.

    NAME is the path of the photograph below the image folder, with its ending: ``a/1.jpg`` becomes
    ``panoptic/a/1.jpg.png``, so that no two photographs share a name.

    An image is recorded after its files are written. One that is recorded, and has not changed
    since, need not be predicted again.

    Args:
        path: the folder; it need not exist.
        image_root: folder that all photographs are in.
        table: the classes.
        settings: texts that tell whether other predictions come from the same model; see
            `Predictor.identity`.
        overlays: whether to draw.
        overwrite: remove the predictions that the folder holds.

    Raises:
        UserError: the folder holds other files, or predictions of another model or of other images.
    """

    def __init__(
        self,
        path: Path,
        image_root: Path,
        table: ClassTable,
        settings: Mapping[str, str],
        *,
        overlays: bool = True,
        overwrite: bool = False,
    ) -> None:
        self._path = path
        self._root = image_root
        self._table = table
        self._overlays = overlays
        header = {**settings, "image folder": str(image_root.resolve())}
        self._records = self._open(header, overwrite)
        self._file = (path / _RECORDS).open("a", encoding="utf-8")

    def __enter__(self) -> "PredictionFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with writing(self._path / _RECORDS):
            self._file.close()

    def _open(self, header: dict[str, str], overwrite: bool) -> dict[str, dict[str, Any]]:
        """Return the records of finished images by name, after removing an unfinished one."""
        file = self._path / _RECORDS
        if self._path.exists() and not file.is_file():
            if not self._path.is_dir():
                raise UserError(f"{self._path} is a file: name a folder")
            if any(self._path.iterdir()):
                raise UserError(f"{self._path} holds other files: name a new or empty folder")
        if overwrite and file.is_file():
            self._clear()
        entries: list[dict[str, Any]] = [header]
        if file.is_file():
            # A line without an end was being written when the command was stopped.
            lines = file.read_text(encoding="utf-8").split("\n")[:-1]
            try:
                entries = [json.loads(line) for line in lines] or [header]
            except ValueError as error:
                raise UserError(f"{file} is damaged: add --overwrite to start again") from error
            self._compare(entries[0], header)
        write_atomically(str(file), lambda name: _write_lines(name, entries))
        return {record["file_name"]: record for record in entries[1:]}

    def _clear(self) -> None:
        for name in _CONTENT:
            path = self._path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _compare(self, found: Mapping[str, str], header: Mapping[str, str]) -> None:
        for key, value in header.items():
            if found.get(key) != value:
                raise UserError(
                    f"{self._path} holds predictions with {key} {found.get(key)}, not {value}: "
                    "add --overwrite to replace them, or name another folder"
                )

    def name_of(self, image: str) -> str:
        """Return the path of a photograph below the image folder, with forward slashes.

        Raises:
            UserError: it is outside, and so would be the files of its prediction.
        """
        name = Path(os.path.relpath(image, self._root)).as_posix()
        if name.split("/")[0] == ".." or os.path.isabs(name):
            raise UserError(f"{image} is outside the image folder {self._root}")
        return name

    def is_finished(self, image: str) -> bool:
        """Whether the photograph is recorded, unchanged since, and its files still exist."""
        name = self.name_of(image)
        record = self._records.get(name)
        return (
            record is not None
            and os.path.isfile(image)
            and record["state"] == _state(image)
            and (not record["has_map"] or self._png(name).is_file())
            and (not self._overlays or self._overlay(name).is_file())
        )

    def add(self, image: str, prediction: Prediction) -> None:
        """Write the files of one photograph, and then its record.

        Raises:
            UserError: a file cannot be written.
        """
        name = self.name_of(image)
        if prediction.segment_map is not None:
            write_segment_map(self._png(name), prediction.segment_map)
        if self._overlays:
            write_image(self._overlay(name), prediction.draw())
        height, width = prediction.image_bgr.shape[:2]
        record = {
            "file_name": name,
            "state": _state(image),
            "height": height,
            "width": width,
            "has_map": prediction.segment_map is not None,
            "segments": [self._to_json(segment, prediction) for segment in prediction.segments],
        }
        with writing(self._path / _RECORDS):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        self._records[name] = record

    def _to_json(self, segment: PredictedSegment, prediction: Prediction) -> dict[str, Any]:
        found: dict[str, Any] = {
            "id": segment.id,
            "category_id": self._table.dataset_ids[segment.class_id],
            "iscrowd": 0,
            "area": segment.area,
            "bbox": list(segment.bbox_xywh),
            "score": segment.score,
        }
        if segment.is_thing and prediction.segment_map is not None:
            mask = np.asfortranarray(prediction.segment_map == segment.id, dtype=np.uint8)
            code = mask_util.encode(mask)
            found["segmentation"] = {"size": code["size"], "counts": code["counts"].decode("ascii")}
        return found

    def finish(self, images: Sequence[str], image_ids: Mapping[str, int | str] | None) -> None:
        """Write the lists of finished photographs.

        Args:
            images: paths of finished photographs.
            image_ids: the id of each photograph by its path below the image folder; None: from 1
                on in the order of ``images``.

        Raises:
            UserError: a file cannot be written.
        """
        names = [self.name_of(image) for image in images]
        numbers = image_ids or {name: number for number, name in enumerate(names, 1)}
        records = [self._records[name] for name in names]
        listed = [
            {"id": numbers[record["file_name"]], **_picked(record, "file_name", "height", "width")}
            for record in records
        ]
        categories = self._table.to_json()
        if all(record["has_map"] for record in records):
            annotations = [
                {
                    "image_id": numbers[record["file_name"]],
                    "file_name": f"{record['file_name']}.png",
                    "segments_info": [_without_mask(segment) for segment in record["segments"]],
                }
                for record in records
            ]
            content = {"images": listed, "annotations": annotations, "categories": categories}
            write_json(self._path / "panoptic.json", content)
        things = [category for category in categories if category["isthing"]]
        instances = self._instances(records, numbers, {thing["id"] for thing in things})
        content = {"images": listed, "annotations": instances, "categories": things}
        write_json(self._path / "instances.json", content)
        write_atomically(
            str(self._path / "segments.csv"), lambda path: self._write_csv(path, records)
        )
        if self._overlays:
            strip = legend(legend_entries(self._table), _LEGEND_WIDTH, _LEGEND_TEXT)
            write_image(self._path / "legend.png", strip)

    def _instances(
        self,
        records: Sequence[Mapping[str, Any]],
        numbers: Mapping[str, int | str],
        thing_ids: set[int],
    ) -> list[dict[str, Any]]:
        things = (
            {**segment, "image_id": numbers[record["file_name"]]}
            for record in records
            for segment in record["segments"]
            if segment["category_id"] in thing_ids
        )
        # From 1, because pycocotools takes an annotation with the id 0 for "no match".
        return [{**thing, "id": number} for number, thing in enumerate(things, 1)]

    def _write_csv(self, path: str, records: Sequence[Mapping[str, Any]]) -> None:
        names = dict(zip(self._table.dataset_ids, self._table.names, strict=True))
        # File names need not be valid text.
        with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_CSV_HEADER)
            for record in records:
                for segment in record["segments"]:
                    row = (segment["id"], names[segment["category_id"]], segment["score"])
                    writer.writerow((record["file_name"], *row, segment["area"], *segment["bbox"]))

    def _png(self, name: str) -> Path:
        return self._path / "panoptic" / f"{name}.png"

    def _overlay(self, name: str) -> Path:
        return self._path / "overlays" / f"{name}.jpg"


def image_ids_of(path: str) -> dict[str, int | str]:
    """Return the id of every image in a COCO JSON by its file name.

    Raises:
        UserError: the file cannot be read or lists no images.
    """
    images = read_coco_json(path).get("images")
    try:
        return {image["file_name"]: image["id"] for image in images or []}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: every entry of 'images' needs 'id' and 'file_name'") from error


def _state(image: str) -> list[int]:
    """Size in bytes and time of the last change of a file, which tell whether it is the same."""
    status = os.stat(image)
    return [status.st_size, status.st_mtime_ns]


def _picked(record: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: record[key] for key in keys}


def _without_mask(segment: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in segment.items() if key != "segmentation"}


def _write_lines(path: str, entries: Sequence[Mapping[str, Any]]) -> None:
    Path(path).write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")
