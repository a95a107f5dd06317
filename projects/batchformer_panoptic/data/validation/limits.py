"""Checks that a model can learn and find the objects of a data set: queries and detections."""

from collections import Counter
from collections.abc import Iterator, Sequence

from .problems import Problem, Record, image_name, records, segments_of


def no_training_targets(names: Sequence[str]) -> Problem:
    """Return the problem of training sets without a segment or box that is not a crowd."""
    message = f"no image of DATASETS.TRAIN ({', '.join(names)}) has a segment or box that is not a "
    return Problem("no training targets", message + "crowd, so that there is nothing to learn")


def check_queries(content: Record, queries: int) -> Iterator[Problem]:
    """Check that no image has more objects, things and stuff alike, than the model has queries.

    Args:
        content: of a panoptic or an instances JSON.
        queries: MODEL.DETR.NUM_OBJECT_QUERIES.
    """
    counts = _objects(content, things_only=False)
    if said := _above(counts, queries):
        message = f"{said} than the model has queries (MODEL.DETR.NUM_OBJECT_QUERIES {queries}); "
        message += "the others are neither learned nor found"
        yield Problem("more objects than queries", message, severity="warning")


def check_detections(content: Record, detections: int) -> Iterator[Problem]:
    """Check that no image has more things than predictions count for AP.

    Args:
        content: see `check_queries`.
        detections: TEST.DETECTIONS_PER_IMAGE.
    """
    counts = _objects(content, things_only=True)
    if said := _above(counts, detections):
        possible = sum(min(count, detections) for count in counts.values()) / counts.total()
        message = f"{said} than TEST.DETECTIONS_PER_IMAGE {detections}; AP then counts at most "
        message += f"{100 * possible:.1f} % of the objects of the set as found"
        yield Problem("more objects than detections", message, severity="warning")


def _objects(content: Record, *, things_only: bool) -> Counter[str]:
    """Count the objects of each image by its name, without crowds."""
    names = {repr(image.get("id")): image_name(image) for image in records(content, "images")}
    stuff = {
        repr(category.get("id"))
        for category in records(content, "categories")
        if things_only and category.get("isthing", 1) == 0
    }
    counts = Counter(dict.fromkeys(names.values(), 0))
    for annotation in records(content, "annotations"):
        name = names.get(repr(annotation.get("image_id")), image_name(annotation))
        found = segments_of(annotation) if "segments_info" in annotation else [annotation]
        counts[name] += sum(
            item.get("iscrowd", 0) != 1 and repr(item.get("category_id")) not in stuff
            for item in found
        )
    return counts


def _above(counts: Counter[str], limit: int) -> str:
    """Begin the sentence about images with more objects than ``limit``; "" if there are none."""
    above = sum(count > limit for count in counts.values())
    if not above:
        return ""
    name, most = counts.most_common(1)[0]
    return f"{above} of {len(counts)} images have more objects (up to {most}, in {name})"
