"""Ground truth of a panoptic data set: the JSON's records, and the PNG of an image on demand."""

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from detectron2.data import Metadata
from detectron2.utils.file_io import PathManager

from ..data.class_table import dataset_ids_of
from ..data.io import read_coco_json
from ..data.segment_maps import read_segment_map
from ..data.validation import (
    Problem,
    check_annotations,
    check_categories,
    check_lists,
    check_png_size,
    raise_first_error,
    records,
    stated_size,
)
from ..errors import UserError
from .panoptic_quality import Segments


class TrueImage(NamedTuple):
    """The annotation of one image."""

    image_id: int | str
    png_name: str  # relative to the PNG folder
    segments: Segments
    size: tuple[int, int] | None  # (H, W) of the photograph, if the JSON states it


class PanopticGroundTruth:
    """Categories and annotated images of a registered panoptic data set.

    Segments are stored as small arrays, about 0.5 kB per image; segment maps are read from disk
    each time.

    Attributes:
        name: the name of the data set.
        categories: COCO category (``id``, ``name``, ``isthing``) per data set category id, by id.
        dataset_ids: data set category id of every contiguous class id.
        images: per image id.
        json_file: local path of the panoptic JSON.
    """

    def __init__(self, metadata: Metadata) -> None:
        """Read the JSON named in the metadata.

        Args:
            metadata: the metadata of a data set with one contiguous id space for things and stuff:
                ``panoptic_json``, ``panoptic_root``, ``thing_dataset_id_to_contiguous_id`` and
                ``stuff_dataset_id_to_contiguous_id``.

        Raises:
            UserError: the JSON is missing or is not a panoptic annotation, or its categories are
                not those of the metadata.
        """
        self.name: str = metadata.name
        self.json_file = str(PathManager.get_local_path(metadata.panoptic_json))
        self._png_root = str(PathManager.get_local_path(metadata.panoptic_root))
        content = read_coco_json(self.json_file)
        raise_first_error(_check(content), self.json_file)
        self.categories: dict[int, Mapping[str, Any]] = {
            category["id"]: category
            for category in sorted(content["categories"], key=lambda category: category["id"])
        }
        self.dataset_ids = dataset_ids_of(metadata)
        differing = sorted(set(self.categories) ^ set(self.dataset_ids.values()))
        if differing:
            raise UserError(
                f"{self.json_file} and the metadata of the data set {self.name} do not have the "
                f"same categories: ids {differing} are in one of them only; register the data set "
                "with the categories of its JSON"
            )
        # Evaluation needs no "images", so that their records have not been checked.
        sizes = {str(image.get("id")): stated_size(image) for image in records(content, "images")}
        self.images: dict[int | str, TrueImage] = {
            annotation["image_id"]: TrueImage(
                annotation["image_id"],
                annotation["file_name"],
                Segments.from_segments_info(annotation["segments_info"]),
                sizes.get(str(annotation["image_id"])),
            )
            for annotation in content["annotations"]
        }

    @property
    def thing_ids(self) -> list[int]:
        """Data set category ids of the things, ascending."""
        return [key for key, category in self.categories.items() if category["isthing"] == 1]

    def png_path(self, image: TrueImage) -> str:
        """Return the local path of the PNG of an image."""
        return os.path.join(self._png_root, image.png_name)

    def read_segment_map(
        self, image: TrueImage, size: tuple[int, int] | None = None
    ) -> npt.NDArray[np.int32]:
        """Read the segment map of an image, (H, W) int32 segment ids; 0 is void.

        Args:
            image: one of ``images``.
            size: (H, W) of the image; None: as stated in the JSON.

        Raises:
            UserError: the PNG is missing or unreadable, or has another size than the image.
        """
        path = self.png_path(image)
        segment_map = read_segment_map(path)
        height, width = segment_map.shape
        expected = size or image.size
        raise_first_error(check_png_size(path, (height, width), expected), self.json_file)
        return segment_map


def _check(content: dict[str, Any]) -> Iterator[Problem]:
    """Check the parts of a panoptic JSON that evaluation needs; "images" is not among them."""
    yield from check_lists(content, ("annotations", "categories"))
    yield from check_categories(content)
    yield from check_annotations(content)
