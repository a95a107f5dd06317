"""Scenes: the regions to draw on an image; and panels: rows and sheets of pictures.

H, W: size of the image that is drawn on.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import GenericMask

from ..data.class_table import Color
from ..data.images import ImageArray, write_image
from ..data.segment_maps import read_segment_map, segment_extents
from ..errors import UserError
from .text import legend, title_bar

BoolMap = npt.NDArray[np.bool_]
Window = tuple[slice, slice]  # rows and columns of an image
Box = tuple[float, float, float, float]  # xyxy, pixels


class SharedSegmentMap:
    """A segment map that many regions share, so that none of them stores a mask.

    Attributes:
        ids: (H, W) int.
    """

    def __init__(self, ids: npt.NDArray[np.integer[Any]]) -> None:
        self.ids = ids
        self._resized: dict[tuple[int, int], SharedSegmentMap] = {}

    def resized(self, size: tuple[int, int]) -> "SharedSegmentMap":
        """Return the map resized to (height, width) by nearest neighbour; cached per size."""
        if size not in self._resized:
            self._resized[size] = SharedSegmentMap(nearest(self.ids, size))
        return self._resized[size]

    @cached_property
    def windows(self) -> dict[int, Window]:
        """The tight box of every id from 0 on."""
        # `segment_extents` leaves out 0, which is the id of the first training target.
        boxes = {key - 1: extent.bbox_xywh for key, extent in segment_extents(self.ids + 1).items()}
        return {key: (slice(y, y + h), slice(x, x + w)) for key, (x, y, w, h) in boxes.items()}


class Segment(NamedTuple):
    """The pixels with one id in a segment map.

    Attributes:
        map: shared by all segments of the image.
        id: the id of these pixels.
    """

    map: SharedSegmentMap
    id: int


class Region(NamedTuple):
    """One segment or object.

    Attributes:
        class_id: contiguous.
        pixels: a mask, (H, W) bool, a segment of a segment map, or None.
        box: to be drawn, or None.
        score: 0 to 1, or None.
        crowd: whether many objects are annotated as one.
    """

    class_id: int
    pixels: BoolMap | Segment | None = None
    box: Box | None = None
    score: float | None = None
    crowd: bool = False

    @property
    def mask(self) -> BoolMap | None:
        """The mask, (H, W), or None. That of a segment is computed at each access."""
        if isinstance(self.pixels, Segment):
            mask: BoolMap = self.pixels.map.ids == self.pixels.id
            return mask
        return self.pixels

    @property
    def window(self) -> Window | None:
        """The tight box of the mask, or None: it has no pixels."""
        if isinstance(self.pixels, Segment):
            return self.pixels.map.windows.get(self.pixels.id)
        if self.pixels is None or not self.pixels.any():
            return None
        x, y, width, height = cv2.boundingRect(self.pixels.astype(np.uint8))
        return slice(y, y + height), slice(x, x + width)

    def mask_within(self, window: Window) -> BoolMap:
        """The part of the mask in a window; only for a region with pixels."""
        if isinstance(self.pixels, Segment):
            part: BoolMap = self.pixels.map.ids[window] == self.pixels.id
            return part
        assert self.pixels is not None
        return self.pixels[window]

    def resized(self, size: tuple[int, int], factor: float) -> "Region":
        """Return the region resized to a picture of (height, width) ``size``.

        Args:
            size: the size of the picture.
            factor: size of the picture relative to the image.
        """
        pixels, box = self.pixels, self.box
        if isinstance(pixels, Segment):
            pixels = Segment(pixels.map.resized(size), pixels.id)
        elif pixels is not None:
            pixels = nearest(pixels.astype(np.uint8), size).astype(bool)
        if box is not None:
            x0, y0, x1, y1 = (factor * value for value in box)
            box = (x0, y0, x1, y1)
        return self._replace(pixels=pixels, box=box)


class Scene(NamedTuple):
    """All regions of one image.

    Attributes:
        regions: in no particular order.
        is_panoptic: whether pixels outside all regions are void.
    """

    regions: list[Region]
    is_panoptic: bool


def scene_of_result(result: dict[str, Any]) -> Scene:
    """Return the scene of a model's result: its panoptic map, or else its instances."""
    if "panoptic_seg" not in result:
        return Scene(_instance_regions(result["instances"].to("cpu")), False)
    panoptic_map, segments = result["panoptic_seg"]
    segment_map = SharedSegmentMap(panoptic_map.cpu().numpy())
    return Scene(
        [
            Region(
                segment["category_id"],
                Segment(segment_map, segment["id"]),
                score=segment.get("score"),
            )
            for segment in segments
        ],
        True,
    )


def scene_of_annotation(dataset_dict: dict[str, Any]) -> Scene:
    """Return the scene of a dataset dict, panoptic or with boxes.

    Raises:
        UserError: there is no annotation, or the panoptic PNG cannot be read.
    """
    if "pan_seg_file_name" in dataset_dict:
        segment_map = SharedSegmentMap(read_segment_map(dataset_dict["pan_seg_file_name"]))
        return Scene(
            [
                Region(
                    segment["category_id"],
                    Segment(segment_map, segment["id"]),
                    crowd=bool(segment.get("iscrowd", 0)),
                )
                for segment in dataset_dict["segments_info"]
            ],
            True,
        )
    if "annotations" not in dataset_dict:
        raise UserError(f"image {dataset_dict['file_name']} has neither segments nor boxes to draw")
    size = dataset_dict["height"], dataset_dict["width"]
    return Scene([_annotated(item, size) for item in dataset_dict["annotations"]], False)


def scene_of_targets(mapped: dict[str, Any]) -> Scene:
    """Return the scene of a training sample: its boxes, and masks if it has a segment map."""
    instances = mapped["instances"]
    segment_map = mapped.get("segment_map")
    shared = None if segment_map is None else SharedSegmentMap(segment_map.numpy())
    regions = [
        Region(class_id, None if shared is None else Segment(shared, index), box)
        for index, (class_id, box) in enumerate(
            zip(instances.gt_classes.tolist(), _boxes(instances.gt_boxes), strict=True)
        )
    ]
    return Scene(regions, shared is not None)


def _instance_regions(instances: Instances) -> list[Region]:
    masks = instances.pred_masks.numpy() if instances.has("pred_masks") else None
    rows = zip(
        instances.pred_classes.tolist(),
        _boxes(instances.pred_boxes),
        instances.scores.tolist(),
        strict=True,
    )
    return [
        Region(class_id, None if masks is None else masks[index], box, score)
        for index, (class_id, box, score) in enumerate(rows)
    ]


def _annotated(item: dict[str, Any], size: tuple[int, int]) -> Region:
    mask = None
    if item.get("segmentation"):
        mask = GenericMask(item["segmentation"], *size).mask.astype(bool)
    x0, y0, x1, y1 = BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS)
    crowd = bool(item.get("iscrowd", 0))
    return Region(item["category_id"], mask, (x0, y0, x1, y1), crowd=crowd)


def _boxes(boxes: Any) -> list[Box]:
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.tensor.tolist()]


def nearest(values: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """Resize by nearest neighbour, so that the picture shows every pixel of the original."""
    if values.shape == size:
        return values
    return np.asarray(cv2.resize(values, size[::-1], interpolation=cv2.INTER_NEAREST))


# Panels.

_MARGIN = 8  # pixels
_BACKGROUND = 255
_TITLE_SHARE, _SMALLEST_TITLE = 1 / 22, 20  # font size: of the panels' shorter side; in pixels
_IN_OVERVIEW = 12  # pictures


def side_by_side(
    panels: Sequence[ImageArray],
    titles: Sequence[str],
    entries: Sequence[tuple[str, Color]] = (),
) -> ImageArray:
    """Arrange pictures in one row on white, each below its title, with a legend below them.

    Args:
        panels: RGB pictures (H_i, W_i, 3); all are enlarged to the largest height.
        titles: one for each picture.
        entries: texts and colors of the legend.

    Returns:
        uint8 RGB.
    """
    height = max(panel.shape[0] for panel in panels)
    scaled = [_scaled(panel, height / panel.shape[0]) for panel in panels]
    short = min(height, *(panel.shape[1] for panel in scaled))
    pixels = max(_SMALLEST_TITLE, round(_TITLE_SHARE * short))
    row = np.hstack(
        [
            _framed(np.vstack([title_bar(title, panel.shape[1], pixels), panel]))
            for panel, title in zip(scaled, titles, strict=True)
        ]
    )
    return np.vstack([row, legend(entries, row.shape[1], pixels)]) if entries else row


def contact_sheet(
    pictures: Sequence[ImageArray], *, columns: int = 2, max_width: int = 1250
) -> ImageArray:
    """Arrange pictures in a grid on white, row by row.

    Args:
        pictures: at least one, RGB.
        columns: pictures per row.
        max_width: width in pixels to which wider pictures are shrunk.

    Returns:
        uint8 RGB.
    """
    cells = [_scaled(picture, min(1.0, max_width / picture.shape[1])) for picture in pictures]
    width = max(cell.shape[1] for cell in cells)
    rows = []
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        height = max(cell.shape[0] for cell in row)
        padded = [_padded(cell, height, width) for cell in row]
        missing = min(columns, len(cells)) - len(row)
        padded += [_padded(row[0][:0], height, width)] * missing
        rows.append(np.hstack(padded))
    return np.vstack(rows)


def write_pictures(folder: Path, pictures: Iterable[tuple[str, ImageArray]]) -> Iterator[str]:
    """Write numbered pictures, and last ``overview.png`` with the first twelve of them.

    Args:
        folder: created if it does not exist.
        pictures: path of each image that was drawn, and the RGB picture of it.

    Yields:
        A line for the user after each picture.

    Raises:
        UserError: a file cannot be written.
    """
    overview = []
    number = 0
    for number, (image_path, picture) in enumerate(pictures, 1):
        name = f"{number - 1:03d}_{Path(image_path).stem}.png"
        write_image(folder / name, picture)
        if number <= _IN_OVERVIEW:
            overview.append(picture)
        yield f"{image_path} -> {name}"
    write_image(folder / "overview.png", contact_sheet(overview))
    yield f"{number} pictures and overview.png are in {folder}"


def _scaled(picture: ImageArray, factor: float) -> ImageArray:
    if factor == 1.0:
        return picture
    size = max(1, round(factor * picture.shape[1])), max(1, round(factor * picture.shape[0]))
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, size, interpolation=method), dtype=np.uint8)


def _framed(picture: ImageArray) -> ImageArray:
    return np.pad(picture, ((0, _MARGIN), (_MARGIN, _MARGIN), (0, 0)), constant_values=_BACKGROUND)


def _padded(picture: ImageArray, height: int, width: int) -> ImageArray:
    below, right = height - picture.shape[0], width - picture.shape[1]
    return np.pad(picture, ((0, below), (0, right), (0, 0)), constant_values=_BACKGROUND)
