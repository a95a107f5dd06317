"""Reading of COCO panoptic ground truth: the JSON once, the PNG of an image when it is needed."""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import Metadata
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from ..errors import UserError
from .panoptic_quality import Segments


class TrueImage(NamedTuple):
    """What the panoptic JSON says about one image."""

    image_id: int | str
    png_name: str  # relative to the PNG folder
    segments: Segments


class PanopticGroundTruth:
    """Categories and annotated images of a registered panoptic data set.

    Segments are kept as small arrays, about 0.5 kB per image; id maps are read from disk each time.

    Attributes:
        name: of the data set.
        categories: COCO category (``id``, ``name``, ``isthing``) per data set category id, by id.
        dataset_ids: data set category id of every contiguous class id.
        images: per image id.
        json_file: local path of the panoptic JSON.
    """

    def __init__(self, metadata: Metadata) -> None:
        """Read the JSON that the metadata name.

        Args:
            metadata: of a data set with one contiguous id space for things and stuff:
                ``panoptic_json``, ``panoptic_root``, ``thing_dataset_id_to_contiguous_id`` and
                ``stuff_dataset_id_to_contiguous_id``.

        Raises:
            UserError: the JSON is missing or is no panoptic annotation, or its categories are not
                those of the metadata.
        """
        self.name: str = metadata.name
        self.json_file = str(PathManager.get_local_path(metadata.panoptic_json))
        self._png_root = str(PathManager.get_local_path(metadata.panoptic_root))
        content = _read_panoptic_json(self.json_file)
        self.categories: dict[int, dict[str, Any]] = {
            int(category["id"]): category
            for category in sorted(content["categories"], key=lambda category: category["id"])
        }
        self.images: dict[int | str, TrueImage] = {}
        for annotation in content["annotations"]:
            image = _true_image(annotation, self.json_file)
            if self.images.setdefault(image.image_id, image) is not image:
                raise UserError(f"{self.json_file} annotates image {image.image_id} more than once")
        self.dataset_ids = _contiguous_to_dataset_ids(metadata)
        self._check_categories()

    def _check_categories(self) -> None:
        differing = sorted(set(self.categories) ^ set(self.dataset_ids.values()))
        if differing:
            raise UserError(
                f"{self.json_file} and the metadata of the data set {self.name} do not have the "
                f"same categories: ids {differing} are in one of them only; register the data set "
                "with the categories of its JSON"
            )
        for image in self.images.values():
            known = np.isin(image.segments.category_ids, list(self.categories))
            if not known.all():
                first = int(np.flatnonzero(~known)[0])
                raise UserError(
                    f"segment {image.segments.ids[first]} of image {image.png_name} has the "
                    f"category_id {image.segments.category_ids[first]}, which is not among the "
                    f"categories of {self.json_file}"
                )

    @property
    def thing_ids(self) -> list[int]:
        """Data set category ids of the things, ascending."""
        return [key for key, category in self.categories.items() if category["isthing"] == 1]

    def png_path(self, image: TrueImage) -> str:
        """Local path of the PNG of an image."""
        return os.path.join(self._png_root, image.png_name)

    def read_id_map(self, image: TrueImage) -> np.ndarray:
        """Read the true segment id of every pixel, (H, W) int32; 0 is void."""
        return read_id_map(self.png_path(image))


def read_id_map(path: str) -> np.ndarray:
    """Decode a COCO panoptic PNG (id = R + 256 G + 65536 B) to an (H, W) int32 array.

    Raises:
        UserError: the file is missing, not an image, or not in RGB.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("RGB", "RGBA"):
                raise UserError(
                    f"{path} is an image of mode {image.mode}; panoptic annotations are RGB PNGs "
                    "(id = R + 256 G + 65536 B)"
                )
            # with a fourth byte per pixel the bytes already are little-endian integers
            pixels = image.tobytes("raw", "RGBX" if image.mode == "RGB" else "RGBA")
            width, height = image.size
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist; the folder must hold one PNG per annotation"
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{path} is not a readable image: {error}") from error
    return np.frombuffer(pixels, dtype="<i4").reshape(height, width) & 0xFFFFFF


def _read_panoptic_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"the panoptic annotation {path} does not exist") from error
    except ValueError as error:
        raise UserError(f"the panoptic annotation {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not {"annotations", "categories"} <= set(content):
        raise UserError(f"{path} is not a COCO panoptic JSON: no 'annotations' or 'categories'")
    if any("segments_info" not in annotation for annotation in content["annotations"]):
        raise UserError(
            f"{path} is not a COCO panoptic JSON: an annotation without 'segments_info' (is it the "
            "instances file?)"
        )
    return content


def _true_image(annotation: Mapping[str, Any], json_file: str) -> TrueImage:
    try:
        segments = Segments.from_segments_info(annotation["segments_info"])
        return TrueImage(annotation["image_id"], annotation["file_name"], segments)
    except KeyError as error:
        where = annotation.get("file_name", annotation.get("image_id"))
        raise UserError(f"{json_file}: the annotation of image {where} lacks {error}") from error


def _contiguous_to_dataset_ids(metadata: Metadata) -> dict[int, int]:
    dataset_ids: dict[int, int] = {}
    mappings: tuple[Mapping[int, int], ...] = (
        metadata.thing_dataset_id_to_contiguous_id,
        metadata.stuff_dataset_id_to_contiguous_id,
    )
    for mapping in mappings:
        for dataset_id, contiguous_id in mapping.items():
            if dataset_ids.setdefault(contiguous_id, dataset_id) != dataset_id:
                raise UserError(
                    f"the data set {metadata.name} numbers its things and stuff separately: class "
                    f"{contiguous_id} is both {dataset_ids[contiguous_id]} and {dataset_id}; use "
                    "the form with one id space (Detectron2's names without '_separated')"
                )
    return dataset_ids
