"""Draws scenes on images with Detectron2's Visualizer.

Ground truth and predictions are drawn by the same function: the colour depends on the class, and
further instances of a thing class get other shades of it.
"""

import colorsys
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.utils.visualizer import Visualizer

from ..data.class_table import ClassTable, Color
from ..data.io import ImageArray
from .scene import (
    BoolMap,
    Box,
    Region,
    Scene,
    scene_of_annotation,
    scene_of_result,
    scene_of_targets,
)

Shade = tuple[float, float, float]  # RGB, 0 to 1

_SHORT_SIDE = 384  # pixels; smaller images are enlarged for readable names
_FILL, _FILL_STRIPED = 0.5, 0.2  # opacity
# Saturation of the image, reduced so that the colours of the classes stand out.
_IMAGE_COLOR = 0.3
_VOID_COLOR: Color = (90, 90, 90)
_VOID_LABEL_SHARE = 0.02  # of the image; smaller patches are hatched without a name
# Lightness and hue of the instances of one class, relative to the class colour.
_SHADES = ((0.0, 0.0), (0.16, 0.03), (-0.14, -0.03), (0.08, -0.05), (-0.08, 0.05))


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
        scene: regions with masks (H, W).
        table: names and colours of the classes.
        scale: size of the picture relative to the image. None: a short side below 384 pixels is
            enlarged to 384.
        vary_instances: give instances of a class different shades of its colour. False keeps the
            colours constant over the frames of a video.

    Returns:
        uint8 RGB, (round(scale * H), round(scale * W), 3).
    """
    factor = automatic_scale(image_rgb) if scale is None else scale
    size = round(factor * image_rgb.shape[0]), round(factor * image_rgb.shape[1])
    regions = [region.resized(size, factor) for region in scene.regions]
    shades = _shades(regions, table, vary_instances)
    void = _void(regions, size) if scene.is_panoptic else None

    canvas = _muted(enlarge(image_rgb, size))
    if void is not None:
        _hatch(canvas, void, _VOID_COLOR)
    for region, shade in zip(regions, shades, strict=True):
        if region.crowd and (mask := region.mask) is not None:
            _hatch(canvas, mask, _bytes(shade))
    visualizer = Visualizer(canvas, Metadata())
    # Largest first, so that no region hides another one.
    order = sorted(range(len(regions)), key=lambda index: -_area(regions[index]))
    for index in order:
        _draw_region(visualizer, regions[index], shades[index])
    _outline(visualizer, (mask for region in regions if (mask := region.mask) is not None), size)

    names = [_text(region, table) for region in regions]
    named = list(zip(regions, names, [_bytes(shade) for shade in shades], strict=True))
    if void is not None and void.mean() > _VOID_LABEL_SHARE:
        named.append((Region(-1, void), "void", (200, 200, 200)))
    things = [region.class_id >= 0 and table.is_thing[region.class_id] for region, _, _ in named]
    for label in place_labels(named, things, size):
        visualizer.draw_text(
            label.text,
            (label.x, label.y),
            color=[channel / 255 for channel in label.color],
            font_size=label.points,
            horizontal_alignment="left",
        )
    picture: ImageArray = np.ascontiguousarray(visualizer.get_output().get_image())
    return picture


def automatic_scale(image: ImageArray) -> float:
    """Factor that enlarges the short side of an image to 384 pixels; at least 1."""
    return max(1.0, _SHORT_SIDE / min(image.shape[:2]))


def enlarge(image: ImageArray, size: tuple[int, int]) -> ImageArray:
    """Return a copy resized to (height, width) ``size`` with smooth interpolation."""
    if image.shape[:2] == size:
        return image.copy()
    shrinks = size[0] < image.shape[0]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size[::-1], interpolation=method), dtype=np.uint8)


def _muted(image: ImageArray) -> ImageArray:
    gray = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)[:, :, None]
    mixed: ImageArray = (_IMAGE_COLOR * image + (1 - _IMAGE_COLOR) * gray).astype(np.uint8)
    return mixed


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


def _void(regions: list[Region], size: tuple[int, int]) -> BoolMap:
    void = np.ones(size, dtype=bool)
    for region in regions:
        if (mask := region.mask) is not None:
            void &= ~mask
    return void


def _hatch(canvas: ImageArray, mask: BoolMap, color: Color) -> None:
    """Draw diagonal stripes on a mask, in place."""
    rows, columns = np.nonzero(mask)
    period = max(6, min(canvas.shape[:2]) // 32)
    striped = (rows + columns) % period < period / 2
    rows, columns = rows[striped], columns[striped]
    mixed = 0.3 * canvas[rows, columns] + 0.7 * np.array(color)
    canvas[rows, columns] = mixed.astype(np.uint8)


def _draw_region(visualizer: Visualizer, region: Region, shade: Shade) -> None:
    mask = region.mask
    if mask is not None and mask.any():
        alpha = _FILL_STRIPED if region.crowd else _FILL
        visualizer.draw_binary_mask(mask, color=shade, alpha=alpha, area_threshold=0)
    if region.box is not None:
        visualizer.draw_box(region.box, edge_color=shade, alpha=1.0)


def _outline(visualizer: Visualizer, masks: Iterable[BoolMap], size: tuple[int, int]) -> None:
    """Draw thin white lines between neighbouring regions."""
    lines = np.zeros(size, dtype=bool)
    kernel = np.ones((3, 3), dtype=np.uint8)
    for mask in masks:
        lines |= mask & ~cv2.erode(mask.astype(np.uint8), kernel).astype(bool)
    if lines.any():
        rgba = np.zeros((*size, 4), dtype=np.float32)
        rgba[lines] = (1.0, 1.0, 1.0, 0.85)
        visualizer.output.ax.imshow(rgba, extent=(0, size[1], size[0], 0), zorder=5)


def _text(region: Region, table: ClassTable) -> str:
    text = table.names[region.class_id]
    if region.crowd:
        text += " (crowd)"
    if region.score is not None and table.is_thing[region.class_id]:
        text += f" {region.score:.0%}"
    return text


def _area(region: Region) -> float:
    if (mask := region.mask) is not None:
        return float(mask.sum())
    assert region.box is not None
    x0, y0, x1, y1 = region.box
    return math.prod((x1 - x0, y1 - y0))


def _bytes(shade: Shade) -> Color:
    red, green, blue = (round(255 * channel) for channel in shade)
    return red, green, blue


# Placement of the names, so that they do not overlap and stay inside the picture.

_POINTS_PER_PIXEL = 0.72  # the Visualizer draws 100 pixels per inch
_CHARACTER_WIDTH, _LINE_HEIGHT = 0.64, 1.5  # of the font size, frame included
_SMALLEST, _LARGEST = 14.0, 22.0  # font size in pixels


class Label(NamedTuple):
    """A text with its colour, top left corner in pixels and size in points."""

    text: str
    color: Color
    x: float
    y: float
    points: float


class _Rectangle(NamedTuple):
    x0: float
    y0: float
    x1: float
    y1: float

    def overlap(self, other: "_Rectangle") -> float:
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(0.0, width) * max(0.0, height)


def place_labels(
    named: Sequence[tuple[Region, str, Color]], things: Sequence[bool], size: tuple[int, int]
) -> list[Label]:
    """Choose a position for every name.

    Names of small things are outside, those of large things inside. Names of stuff are at the
    widest place that the names of things leave. Names overlap only in crowded pictures.

    Args:
        named: regions with their texts and colours.
        things: for each region, whether it is a thing.
        size: (height, width) of the picture.
    """
    pixels = float(np.clip(min(size) / 30, _SMALLEST, _LARGEST))
    placed: list[_Rectangle] = []
    labels = []
    for index in sorted(range(len(named)), key=lambda index: not things[index]):
        region, text, color = named[index]
        mask = region.mask
        if mask is not None and not mask.any():
            continue
        width, height = pixels * (_CHARACTER_WIDTH * len(text) + 0.3), pixels * _LINE_HEIGHT
        if things[index] or mask is None:
            candidates = _beside_thing(region.box, mask, width, height)
        else:
            candidates = [_widest_place(mask, placed, width, height)]
        rectangles = [_inside(x, y, width, height, size) for x, y in candidates]
        best = min(rectangles, key=lambda rectangle: sum(map(rectangle.overlap, placed)))
        placed.append(best)
        labels.append(Label(text, color, best.x0, best.y0, pixels * _POINTS_PER_PIXEL))
    return labels


def _beside_thing(
    box: Box | None, mask: BoolMap | None, width: float, height: float
) -> list[tuple[float, float]]:
    """Top left corners in order of preference."""
    if box is not None:
        x0, y0, x1, y1 = box
        return [(x0, y0 - height), (x0, y0), (x0, y1), (x1 - width, y0), (x1 - width, y1 - height)]
    assert mask is not None
    rows, columns = np.nonzero(mask)
    x0, y0, x1, y1 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    middle = (x0 + x1 - width) / 2
    around = [
        (middle, y0 - height),
        (middle, y1),
        (x1, (y0 + y1 - height) / 2),
        (x0 - width, (y0 + y1 - height) / 2),
    ]
    x, y, radius = _widest_point(mask)
    inside = (x - width / 2, y - height / 2)
    # Inside only if most of the thing stays visible.
    return [inside, *around] if radius > 1.5 * height else [*around, inside]


def _widest_place(
    mask: BoolMap, placed: list[_Rectangle], width: float, height: float
) -> tuple[float, float]:
    # Avoid names that are already placed, unless they cover the whole mask.
    free = mask.copy()
    for other in placed:
        rows = slice(int(max(0, other.y0)), int(other.y1) + 1)
        columns = slice(int(max(0, other.x0)), int(other.x1) + 1)
        free[rows, columns] = False
    x, y, _ = _widest_point(free if free.any() else mask)
    return x - width / 2, y - height / 2


def _widest_point(mask: BoolMap) -> tuple[float, float, float]:
    """x, y and radius of the largest circle inside a mask and the picture."""
    # Padding makes the border of the picture count as outside.
    distance = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return float(x) - 1, float(y) - 1, float(distance[y, x])


def _inside(x: float, y: float, width: float, height: float, size: tuple[int, int]) -> _Rectangle:
    x = max(1.0, min(x, size[1] - width))
    y = max(1.0, min(y, size[0] - height))
    return _Rectangle(x, y, x + width, y + height)
