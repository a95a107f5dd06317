"""The whole check of a data set."""

import json
from pathlib import Path

from ...errors import UserError
from .annotations import check_annotations, check_categories, check_images, check_sections
from .files import check_files
from .problems import Problem, Record


def check_panoptic_dataset(
    panoptic_json: str | Path,
    image_root: str | Path,
    panoptic_root: str | Path,
    *,
    max_images: int | None = None,
    decode_images: bool = True,
) -> list[Problem]:
    """Check a JSON file together with its picture and segment folders.

    Args:
        panoptic_json: annotation file in COCO's panoptic format.
        image_root: folder of the pictures named by ``images[].file_name``.
        panoptic_root: folder of the PNGs named by ``annotations[].file_name``.
        max_images: open the files of that many annotations only; None opens all. The JSON itself
            is always checked whole.
        decode_images: read the pictures to their last pixel, which finds truncated files. False
            reads their headers only, several times as fast.

    Raises:
        UserError: the JSON or a folder is missing, or the file is no JSON object.
    """
    content = load_panoptic_json(panoptic_json)
    return check_panoptic_content(
        content, image_root, panoptic_root, max_images=max_images, decode_images=decode_images
    )


def load_panoptic_json(path: str | Path) -> Record:
    """Read a panoptic JSON file.

    Raises:
        UserError: it is missing or is no JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read panoptic JSON {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not COCO's JSON object")
    return content


def check_panoptic_content(
    content: Record,
    image_root: str | Path,
    panoptic_root: str | Path,
    *,
    max_images: int | None = None,
    decode_images: bool = True,
) -> list[Problem]:
    """As :func:`check_panoptic_dataset`, for JSON content that is loaded already."""
    for name, root in (("image", image_root), ("panoptic", panoptic_root)):
        if not Path(root).is_dir():
            raise UserError(f"{name} folder not found: {root}")
    problems = list(check_sections(content))
    for check in (check_categories, check_images, check_annotations):
        problems.extend(check(content))
    problems.extend(
        check_files(content, Path(image_root), Path(panoptic_root), max_images, decode_images)
    )
    return problems
