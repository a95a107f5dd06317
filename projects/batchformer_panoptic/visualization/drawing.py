"""Draws scenes on images, at any size and with class names in any script.

Ground truth and predictions are drawn by the same function: the colour depends on the class, and
further instances of a thing class get other shades of it.
"""

import colorsys
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from ..data.class_table import ClassTable, Color
from ..data.images import ImageArray
from .scene import (
    BoolMap,
    Box,
    Region,
    Scene,
    scene_of_annotation,
    scene_of_result,
    scene_of_targets,
)
from .text import Label, class_names, draw_labels, label_size

Shade = tuple[float, float, float]  # RGB, 0 to 1

# Smaller images are enlarged for readable names: to this short side in pixels, as long as the long
# side, which grows with it, stays below the other number.
_SHORT_SIDE, _LONG_SIDE = 384, 2048
# Opacity of a color: of a region, between the stripes of a crowd and on them, and of void's.
_FILL, _CROWD, _CROWD_STRIPE, _VOID_STRIPE = 0.5, 0.2, 0.76, 0.7
_LINE_OPACITY = 0.85
# Saturation of the image, reduced so that the colours of the classes stand out.
_IMAGE_COLOR = 0.3
_VOID_COLOR: Color = (90, 90, 90)
_VOID_LABEL_COLOR: Color = (200, 200, 200)
_VOID_LABEL_SHARE = 0.02  # of the image; smaller patches are hatched without a name
# Lightness and hue of the instances of one class, relative to the class colour.
_SHADES = ((0.0, 0.0), (0.16, 0.03), (-0.14, -0.03), (0.08, -0.05), (-0.08, 0.05))
_ROWS_AT_ONCE = 256  # painted in floating point


def draw_result(
    image_rgb: ImageArray,
    result: dict[str, Any],
    table: ClassTable,
    *,
    scale: float | None = None,
    vary_instances: bool = True,
) -> ImageArray:
    """Draw the result of a model; see `draw_scene`.

    Args:
        image_rgb: the original image, (H, W, 3) uint8.
        result: of one image, at (H, W); the panoptic map if there is one, otherwise all instances.
        table: the classes.
        scale: size of the picture relative to the image; see `draw_scene`.
        vary_instances: see `draw_scene`.
    """
    scene = scene_of_result(result)
    return draw_scene(image_rgb, scene, table, scale=scale, vary_instances=vary_instances)


def draw_ground_truth(
    image_rgb: ImageArray,
    dataset_dict: dict[str, Any],
    table: ClassTable,
    *,
    scale: float | None = None,
) -> ImageArray:
    """Draw the annotation of a dataset dict; see `draw_scene`.

    Raises:
        UserError: there is no annotation, or the panoptic PNG cannot be read.
    """
    return draw_scene(image_rgb, scene_of_annotation(dataset_dict), table, scale=scale)


def draw_targets(
    image_rgb: ImageArray,
    mapped: dict[str, Any],
    table: ClassTable,
    *,
    scale: float | None = None,
) -> ImageArray:
    """Draw the training targets of a mapped dict on its augmented image; see `draw_scene`."""
    return draw_scene(image_rgb, scene_of_targets(mapped), table, scale=scale)


def draw_scene(
    image_rgb: ImageArray,
    scene: Scene,
    table: ClassTable,
    *,
    scale: float | None = None,
    vary_instances: bool = True,
) -> ImageArray:
    """Fill, outline and name the regions; void and crowds are hatched.

    Args:
        image_rgb: (H, W, 3) uint8; not changed.
        scene: regions with masks (H, W). Where masks overlap, the smaller region is on top.
        table: names and colours of the classes.
        scale: size of the picture relative to the image. None: a short side below 384 pixels is
            enlarged, see `automatic_scale`.
        vary_instances: give instances of a class different shades of its colour. False keeps the
            colours constant over the frames of a video.

    Returns:
        uint8 RGB, (round(scale * H), round(scale * W), 3).
    """
    factor = automatic_scale(image_rgb) if scale is None else scale
    size = round(factor * image_rgb.shape[0]), round(factor * image_rgb.shape[1])
    regions = [region.resized(size, factor) for region in scene.regions]
    shades = [_bytes(shade) for shade in _shades(regions, table, vary_instances)]
    owner = owners(regions, size)
    canvas = muted(enlarge(image_rgb, size))
    _paint(canvas, owner, regions, shades, _VOID_STRIPE if scene.is_panoptic else 0.0)
    _outline(canvas, owner)
    for region, shade in zip(regions, shades, strict=True):
        if region.box is not None:
            x0, y0, x1, y1 = (round(value) for value in region.box)
            cv2.rectangle(canvas, (x0, y0), (x1, y1), shade, 2 * _thickness(size))
    names = class_names(table)
    named = [
        Named(region, _text(region, names), shade, table.is_thing[region.class_id])
        for region, shade in zip(regions, shades, strict=True)
    ]
    void = owner < 0
    if scene.is_panoptic and void.mean() > _VOID_LABEL_SHARE:
        named.append(Named(Region(-1, void), "void", _VOID_LABEL_COLOR, False))
    return draw_labels(canvas, place_labels(named, size))


def automatic_scale(image: ImageArray) -> float:
    """Factor that enlarges the short side to 384 pixels, or the long one to 2048; at least 1."""
    height, width = image.shape[:2]
    return max(1.0, min(_SHORT_SIDE / min(height, width), _LONG_SIDE / max(height, width)))


def enlarge(image: ImageArray, size: tuple[int, int]) -> ImageArray:
    """Return a copy resized to (height, width) ``size`` with smooth interpolation."""
    if image.shape[:2] == size:
        return image.copy()
    shrinks = size[0] < image.shape[0]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size[::-1], interpolation=method), dtype=np.uint8)


def muted(image: ImageArray) -> ImageArray:
    """Return an RGB image with less color, so that drawn colors stand out."""
    image = np.ascontiguousarray(image)
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    mixed = cv2.addWeighted(image, _IMAGE_COLOR, gray, 1 - _IMAGE_COLOR, 0)
    return np.asarray(mixed, dtype=np.uint8)


def _shades(regions: list[Region], table: ClassTable, vary_instances: bool) -> list[Shade]:
    seen: Counter[int] = Counter()
    shades = []
    for region in regions:
        is_thing = table.is_thing[region.class_id]
        shades.append(instance_shade(table.colors[region.class_id], seen[region.class_id]))
        seen[region.class_id] += int(is_thing and vary_instances and not region.crowd)
    return shades


def instance_shade(color: Color, index: int) -> Shade:
    """Colour of the index-th instance of a class; the first one has the colour of the class."""
    lightness_step, hue_step = _SHADES[index % len(_SHADES)]
    hue, lightness, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in color))
    lightness = min(0.9, max(0.15, lightness + lightness_step)) if lightness_step else lightness
    return colorsys.hls_to_rgb((hue + hue_step) % 1.0, lightness, saturation)


def owners(regions: list[Region], size: tuple[int, int]) -> npt.NDArray[np.int32]:
    """(H, W) index of the region that is painted at each pixel; -1: none."""
    owner = np.full(size, -1, dtype=np.int32)
    for index in sorted(range(len(regions)), key=lambda index: -area_of(regions[index])):
        if (window := regions[index].window) is not None:
            owner[window][regions[index].mask_within(window)] = index
    return owner


def _paint(
    canvas: ImageArray,
    owner: npt.NDArray[np.int32],
    regions: list[Region],
    shades: list[Color],
    void_stripe: float,
) -> None:
    """Blend colors into a picture (H, W, 3), in place; the last entry of a table is for void."""
    palette = np.array([*shades, _VOID_COLOR], dtype=np.float32)
    crowds = [region.crowd for region in regions]
    fill = np.array([*np.where(crowds, _CROWD, _FILL), 0.0], dtype=np.float32)
    stripe = np.array([*np.where(crowds, _CROWD_STRIPE, _FILL), void_stripe], dtype=np.float32)
    height, width = owner.shape
    period = max(6, min(height, width) // 32)
    for top in range(0, height, _ROWS_AT_ONCE):
        rows = slice(top, top + _ROWS_AT_ONCE)
        index, part = owner[rows], canvas[rows]
        diagonal = np.arange(top, top + len(index))[:, None] + np.arange(width)
        striped = diagonal % period < period / 2
        alpha = np.where(striped, stripe[index], fill[index])[..., None]
        part[:] = part + alpha * (palette[index] - part) + 0.5


def _outline(canvas: ImageArray, owner: npt.NDArray[np.int32]) -> None:
    """Draw white lines between neighbouring regions, in place."""
    lines = np.zeros(owner.shape, dtype=np.uint8)
    across, down = owner[:, 1:] != owner[:, :-1], owner[1:] != owner[:-1]
    for part, changes in (
        (lines[:, 1:], across),
        (lines[:, :-1], across),
        (lines[1:], down),
        (lines[:-1], down),
    ):
        part |= changes
    thickness = _thickness(owner.shape)
    if thickness > 1:
        cv2.dilate(lines, np.ones((thickness, thickness), dtype=np.uint8), dst=lines)
    for top in range(0, len(lines), _ROWS_AT_ONCE):
        part = canvas[top : top + _ROWS_AT_ONCE]
        marked = lines[top : top + _ROWS_AT_ONCE].astype(bool)
        part[marked] = ((1 - _LINE_OPACITY) * part[marked] + _LINE_OPACITY * 255).astype(np.uint8)


def _thickness(size: tuple[int, ...]) -> int:
    """Width of lines in pixels, for a picture that is shrunk to a screen."""
    return max(1, round(min(size) / 700))


def _text(region: Region, names: Sequence[str]) -> str:
    text = names[region.class_id]
    if region.crowd:
        text += " (crowd)"
    if region.score is not None:
        text += f" {region.score:.0%}"
    return text


def area_of(region: Region) -> float:
    """Pixels of the mask, or of the box of a region without one."""
    if (window := region.window) is not None:
        return float(np.count_nonzero(region.mask_within(window)))
    if region.box is None:
        return 0.0
    x0, y0, x1, y1 = region.box
    return math.prod((x1 - x0, y1 - y0))


def _bytes(shade: Shade) -> Color:
    red, green, blue = (round(255 * channel) for channel in shade)
    return red, green, blue


# Placement of the names, so that they do not overlap and stay inside the picture.

# Font size: at most these pixels in small pictures, and this share of the short side in large ones,
# so that names are readable when a photograph is shrunk to a screen.
_TEXT_PIXELS, _TEXT_SHARE = 14, 1 / 45
_LARGEST_TEXT_SHARE, _SMALLEST_TEXT = 1 / 14, 6
# Share of a name that other names may cover; a name without a better place is left out.
_COVERED = 0.25
_SEARCHED_PIXELS = 400  # along the short side, when a place for a name is searched


class Named(NamedTuple):
    """A region with the name and the color that it is drawn with."""

    region: Region
    text: str
    color: Color
    is_thing: bool


class _Rectangle(NamedTuple):
    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        return (self.x1 - self.x0) * (self.y1 - self.y0)

    def overlap(self, other: "_Rectangle") -> float:
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(0.0, width) * max(0.0, height)


def place_labels(named: Sequence[Named], size: tuple[int, int]) -> list[Label]:
    """Choose a position for the names, large things first.

    Names of small things are outside, those of large things inside. Names of stuff are at the
    widest place that the names of things leave. In crowded pictures, names that would cover others
    are left out, as are those that are larger than the picture.

    Args:
        named: regions with their texts and colours.
        size: (height, width) of the picture.
    """
    short = min(size)
    usual = max(min(_TEXT_PIXELS, short * _LARGEST_TEXT_SHARE), short * _TEXT_SHARE)
    pixels = max(_SMALLEST_TEXT, round(usual))
    step = max(1, short // _SEARCHED_PIXELS)
    placed: list[_Rectangle] = []
    labels = []
    for item in sorted(named, key=lambda item: (not item.is_thing, -area_of(item.region))):
        width, height = label_size(item.text, pixels)
        candidates = [
            _inside(x, y, width, height, size)
            for x, y in _candidates(item, placed, width, height, step)
        ]
        if not candidates or width > size[1] or height > size[0]:
            continue
        covered = [sum(map(candidate.overlap, placed)) for candidate in candidates]
        best = candidates[covered.index(min(covered))]
        if min(covered) <= _COVERED * best.area:
            placed.append(best)
            labels.append(Label(item.text, item.color, *best, pixels))
    return labels


def _candidates(
    item: Named, placed: Sequence[_Rectangle], width: float, height: float, step: int
) -> Iterator[tuple[float, float]]:
    """Top left corners of a name in order of preference; none for a region without pixels."""
    window = item.region.window
    if item.region.box is not None:
        yield from _beside_box(item.region.box, width, height)
    elif window is not None:
        mask = item.region.mask_within(window)
        x, y = window[1].start, window[0].start
        if item.is_thing:
            places = _beside_thing(mask, width, height, step)
        else:
            moved = [_Rectangle(r.x0 - x, r.y0 - y, r.x1 - x, r.y1 - y) for r in placed]
            places = [_widest_place(mask, moved, width, height, step)]
        yield from ((x + left, y + top) for left, top in places)


def _beside_box(box: Box, width: float, height: float) -> list[tuple[float, float]]:
    x0, y0, x1, y1 = box
    return [(x0, y0 - height), (x0, y0), (x0, y1), (x1 - width, y0), (x1 - width, y1 - height)]


def _beside_thing(
    mask: BoolMap, width: float, height: float, step: int
) -> list[tuple[float, float]]:
    """Places relative to the tight box of a mask."""
    rows, columns = mask.shape
    middle = (columns - width) / 2, (rows - height) / 2
    around = [
        (middle[0], -height),
        (middle[0], float(rows)),
        (float(columns), middle[1]),
        (-width, middle[1]),
    ]
    x, y, radius = _widest_point(mask, step)
    inside = (x - width / 2, y - height / 2)
    # Inside only if most of the thing stays visible.
    return [inside, *around] if radius > 1.5 * height else [*around, inside]


def _widest_place(
    mask: BoolMap, placed: Sequence[_Rectangle], width: float, height: float, step: int
) -> tuple[float, float]:
    # Avoid names that are already placed, unless they cover the whole mask.
    free = mask.copy()
    for other in placed:
        rows = slice(int(max(0, other.y0)), max(0, int(other.y1) + 1))
        columns = slice(int(max(0, other.x0)), max(0, int(other.x1) + 1))
        free[rows, columns] = False
    x, y, _ = _widest_point(free if free.any() else mask, step)
    return x - width / 2, y - height / 2


def _widest_point(mask: BoolMap, step: int) -> tuple[float, float, float]:
    """x, y and radius of the largest circle inside a mask, searched on every step-th pixel."""
    coarse = mask[::step, ::step]
    # Padding makes the border of the mask count as outside.
    distance = cv2.distanceTransform(np.pad(coarse, 1).astype(np.uint8), cv2.DIST_L2, 5)
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return step * (float(x) - 1), step * (float(y) - 1), step * float(distance[y, x])


def _inside(x: float, y: float, width: float, height: float, size: tuple[int, int]) -> _Rectangle:
    x = max(1.0, min(x, size[1] - width))
    y = max(1.0, min(y, size[0] - height))
    return _Rectangle(x, y, x + width, y + height)
