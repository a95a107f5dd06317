"""COCO instance annotations of the things of a panoptic data set, built once and kept in a file."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from ..errors import UserError
from .panoptic_ground_truth import PanopticGroundTruth, TrueImage

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1


def cached_thing_annotations(truth: PanopticGroundTruth, output_dir: str) -> str:
    """Write the things of a panoptic data set as a COCO instances JSON, unless that is done.

    The file names the state of the JSON and the PNGs that it was made from. A file of another
    state, or one that cannot be read, is made anew.

    Args:
        truth: the panoptic ground truth.
        output_dir: folder for ``<data set>_things.json``.

    Returns:
        The path of the file.
    """
    path = Path(output_dir) / f"{truth.name}_things.json"
    source = _fingerprint(truth)
    if _source_of(path) == source:
        return str(path)
    logger.info("Writing the things of %s as instance annotations to %s", truth.name, path)
    content = {"info": {"source": source}, **thing_annotations(truth)}
    path.parent.mkdir(parents=True, exist_ok=True)
    # written under another name first: a killed run or a second process never leaves half a file
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return str(path)


def thing_annotations(truth: PanopticGroundTruth) -> dict[str, Any]:
    """Convert the things of a panoptic data set to the content of a COCO instances JSON.

    Boxes are tight around the visible pixels, (x, y, width, height); masks are compressed
    run-length codes; crowd segments have ``iscrowd`` 1. Stuff is left out.

    Raises:
        UserError: a PNG is missing or unreadable, or an annotated segment has no pixels in it.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image in truth.images.values():
        id_map = truth.read_id_map(image)
        height, width = id_map.shape
        images.append(
            {
                "id": image.image_id,
                "file_name": image.png_name,
                "height": height,
                "width": width,
            }
        )
        for annotation in _image_annotations(truth, image, id_map):
            # pycocotools takes an annotation with the id 0 for "no match"
            annotations.append({"id": len(annotations) + 1, **annotation})
    categories = [{"id": key, "name": truth.categories[key]["name"]} for key in truth.thing_ids]
    return {"images": images, "annotations": annotations, "categories": categories}


def _image_annotations(
    truth: PanopticGroundTruth, image: TrueImage, id_map: np.ndarray
) -> list[dict[str, Any]]:
    segments = image.segments
    annotations: list[dict[str, Any]] = []
    for position in np.flatnonzero(np.isin(segments.category_ids, truth.thing_ids)).tolist():
        mask = np.asfortranarray(id_map == segments.ids[position], dtype=np.uint8)
        code = mask_util.encode(mask)
        area = int(mask_util.area(code))
        if area == 0:
            raise UserError(
                f"segment {segments.ids[position]} of image {image.png_name} is annotated in "
                f"{truth.json_file} but has no pixels in the PNG; remove it or mend the PNG"
            )
        annotations.append(
            {
                "image_id": image.image_id,
                "category_id": int(segments.category_ids[position]),
                "iscrowd": int(segments.is_crowd[position]),
                "area": area,
                "bbox": mask_util.toBbox(code).tolist(),
                "segmentation": {"size": code["size"], "counts": code["counts"].decode("ascii")},
            }
        )
    return annotations


def _fingerprint(truth: PanopticGroundTruth) -> str:
    """Hash the JSON, and the name, size and time of every PNG."""
    digest = hashlib.sha256(f"{_FORMAT_VERSION}".encode())
    digest.update(Path(truth.json_file).read_bytes())
    for image in truth.images.values():
        try:
            status = os.stat(truth.png_path(image))
        except FileNotFoundError:
            state = "missing"
        else:
            state = f"{status.st_size} {status.st_mtime_ns}"
        digest.update(f"\n{truth.png_path(image)} {state}".encode())
    return digest.hexdigest()


def _source_of(path: Path) -> str | None:
    """Read which state a cached file was made from; None: there is no usable file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("info"), dict):
        return None
    complete = {"images", "annotations", "categories"} <= set(content)
    return content["info"].get("source") if complete else None
