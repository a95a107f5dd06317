"""Writes a corrected copy of a panoptic data set: what can be derived from JSON and PNGs."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..images import write_image
from ..io import write_json
from ..segment_maps import possible_segment_maps, segment_extents
from .problems import Record, records, segment_number, segments_of

JSON_NAME, PNG_FOLDER = "panoptic.json", "panoptic"
_IDS = {"images": ("id",), "annotations": ("image_id",), "categories": ("id",)}


def repair_panoptic_set(content: Record, panoptic_root: Path, target: Path) -> Path:
    """Write a corrected JSON and corrected PNGs; images are not copied.

    Numbers that are written as texts become numbers, ``iscrowd`` true, false or absent becomes 1
    or 0, areas and boxes are taken from the pixels, and PNGs of palette, grey or RGBA, or with red
    and blue swapped, become RGB if their values are the listed ids. Everything else stays as it is.

    Args:
        content: the content of the panoptic JSON; not changed.
        panoptic_root: folder of the PNGs.
        target: a new or empty folder, for ``panoptic.json`` and the folder ``panoptic``.

    Returns:
        The path of the new JSON.

    Raises:
        UserError: the target is not empty or cannot be written; or the JSON cannot be copied: it
            has NaN or an infinity, or a file name that leads out of the folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} holds other files; name a new or empty folder")
    try:
        json.dumps(content, allow_nan=False)
    except ValueError:
        raise UserError(
            "the annotations have NaN or an infinity, which JSON does not allow: remove these "
            "values"
        ) from None
    fixed = copy.deepcopy(content)
    for section, keys in _IDS.items():
        for record in records(fixed, section):
            _make_numbers(record, (*keys, "height", "width"))
    for annotation in records(fixed, "annotations"):
        for segment in segments_of(annotation):
            _make_numbers(segment, ("id", "category_id", "iscrowd", "area"))
            segment["iscrowd"] = _crowd(segment.get("iscrowd", 0))
        name = annotation.get("file_name")
        if not isinstance(name, str):
            continue
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UserError(f"file_name {name!r} leads out of the folder of the PNGs: no copy made")
        if (panoptic_root / name).is_file():
            _repair_png(annotation, panoptic_root / name, target / PNG_FOLDER / name)
    write_json(target / JSON_NAME, fixed)
    return target / JSON_NAME


def _make_numbers(record: Record, keys: tuple[str, ...]) -> None:
    for key in keys:
        value: Any = record.get(key)
        is_text = isinstance(value, str) and value.isascii() and value.isdecimal()
        if is_text or (isinstance(value, float) and value.is_integer()):
            record[key] = int(value)


def _crowd(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


def _repair_png(annotation: Record, source: Path, target: Path) -> None:
    """Write the PNG as 8-bit RGB, and areas and boxes to the annotation in place.

    A file whose values have nothing to do with the listed ids is copied.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    listed = {segment_number(segment) for segment in segments_of(annotation)} - {None}
    best, agreement = None, 0
    for segment_map in possible_segment_maps(source):
        ids = np.unique(segment_map[segment_map > 0]).tolist()
        found = len(listed.intersection(ids)) - len(set(ids) - listed)
        if found > agreement:
            best, agreement = segment_map, found
    if best is None:
        shutil.copyfile(source, target)
        return
    extents = segment_extents(best)
    for segment in segments_of(annotation):
        extent = extents.get(segment_number(segment) or 0)
        if extent is not None:
            segment["area"], segment["bbox"] = extent.area, list(extent.bbox_xywh)
    write_image(target, np.stack([best & 255, best >> 8 & 255, best >> 16], -1).astype(np.uint8))
