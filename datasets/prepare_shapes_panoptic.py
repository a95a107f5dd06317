"""Write the built-in default data set: seeded synthetic images in COCO's panoptic layout.

    python datasets/prepare_shapes_panoptic.py --output datasets/shapes_panoptic

Stuff (brick, grass, water) differs by texture and things (disc, square, triangle, star) by shape.
Every class has a typical hue, as grass and water have in reality, but only about half of its
segments use it, and things share their hues with stuff. Color is a cue but does not determine the
class.

    DIR/train, DIR/val                       images (PNG)
    DIR/panoptic_train, DIR/panoptic_val     segment ids (RGB PNG, id = R + 256 G + 256^2 B)
    DIR/annotations/panoptic_{train,val}.json
    DIR/manifest.json                        the arguments, marked complete last

Shapes: H = W = size. Images are float32 RGB in 0..1 until they are written. ``x`` and ``y`` are
(H, W) float32 pixel centers in units of 1/96 of the side, so that all sizes look alike.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from panopticapi.utils import id2rgb

from batchformer_panoptic.data.images import write_image
from batchformer_panoptic.data.io import PreparedFolder, write_json
from batchformer_panoptic.engine.setup import integer_between
from batchformer_panoptic.errors import UserError, command, one_line

UNITS = 96.0  # side of a picture in the units of x and y
SPLITS = {"train": 0, "val": 1_000_000}  # first image id minus 1
FORMAT_VERSION = 1  # increase it when the same arguments give other images

MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE = 25, 0.3  # of every segment
MAX_THINGS = 4
THING_DIAMETER = (22.0, 56.0)  # units
TYPICAL_HUE_SHARE, HUE_SPREAD = 0.5, 20.0  # share of segments near their class's hue; degrees
THING_CONTRAST, STUFF_CONTRAST = 40.0, 15.0  # minimum CIE Lab distance to neighboring segments

RGB = tuple[int, int, int]


class Category(NamedTuple):
    """A class as in COCO; the ids have gaps, like COCO's."""

    id: int
    name: str
    isthing: int
    supercategory: str
    color: RGB
    hue: float  # typical, in degrees

    def to_coco(self) -> dict[str, Any]:
        """Return the record of COCO's ``categories``."""
        return {name: value for name, value in self._asdict().items() if name != "hue"}


THINGS = (
    Category(1, "disc", 1, "shape", (220, 60, 70), 0.0),
    Category(2, "square", 1, "shape", (60, 110, 230), 220.0),
    Category(4, "triangle", 1, "shape", (240, 170, 40), 50.0),
    Category(7, "star", 1, "shape", (170, 70, 210), 285.0),
)
STUFF = (
    Category(101, "brick", 0, "texture", (150, 90, 70), 15.0),
    Category(103, "grass", 0, "texture", (90, 150, 70), 110.0),
    Category(106, "water", 0, "texture", (80, 150, 170), 200.0),
)


def inside_disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u * u + v * v <= 1.0


def inside_square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(abs(u), abs(v)) <= 0.85


def inside_triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    slope = math.sqrt(3.0)
    return np.maximum(v, 0.5 * (slope * abs(u) - v)) <= 0.62


def inside_star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points: map the plane onto half an arm by symmetry and compare with its edge."""
    tip, notch, half_arm = 1.2, 0.52, math.pi / 5
    angle = abs(np.mod(np.arctan2(v, u) + half_arm, 2 * half_arm) - half_arm)
    radius = np.hypot(u, v)
    across, along = radius * np.sin(angle), radius * np.cos(angle)
    notch_across, notch_along = notch * math.sin(half_arm), notch * math.cos(half_arm)
    return across * (tip - notch_along) <= notch_across * (tip - along)


def brick_tone(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rows of bricks in running bond between mortar lines, each brick with its own tone."""
    height = rng.uniform(7.5, 11.0)
    width, mortar = height * rng.uniform(1.9, 2.4), rng.uniform(1.2, 1.8)
    across, down = rotate(x + 40.0, y + 40.0, rng.uniform(-0.2, 0.2))
    course = np.floor(down / height).astype(int)
    shifted = across + 0.5 * width * (course % 2) + rng.uniform(0.0, width)
    column = np.floor(shifted / width).astype(int)
    tones = rng.uniform(-0.13, 0.13, (16, 16))
    joint = (np.mod(down, height) < mortar) | (np.mod(shifted, width) < mortar)
    joint_tone = rng.uniform(0.35, 0.5) * rng.choice([-1.0, 1.0])
    return np.where(joint, joint_tone, tones[course % 16, column % 16])


def grass_tone(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Short steep overlapping blades, dark ones below light ones."""
    side = x.shape[0]
    scale = side / UNITS
    wind, count = rng.uniform(-0.35, 0.35), 150
    tone = np.full(x.shape, -0.3, np.float32)
    for level in np.linspace(-0.35, 0.4, 5):
        foot = rng.uniform(0.0, side * 1.1, (count, 2))
        length = rng.uniform(5.0, 12.0, count) * scale
        lean = wind + rng.normal(0.0, 0.25, count)
        head = foot - np.stack([length * np.sin(lean), length * np.cos(lean)], 1)
        blades = np.stack([foot, head], 1).round().astype(np.int32)
        cv2.polylines(tone, list(blades), False, (float(level),), max(1, round(scale)))
    return tone


def water_tone(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Long, nearly horizontal ripples with narrow bright crests."""
    across, down = rotate(x, y, rng.uniform(-0.25, 0.25))
    pitch, swell = rng.uniform(8.0, 13.0), rng.uniform(24.0, 42.0)
    phases = rng.uniform(0.0, 2 * math.pi, 3)
    bend = np.sin(2 * math.pi * across / swell + 0.06 * down + phases[0])
    bend += 0.6 * np.sin(2 * math.pi * across / (0.61 * swell) - 0.09 * down + phases[1])
    wave = np.sin(2 * math.pi * down / pitch + 0.9 * bend + phases[2])
    return 0.22 * wave + 0.25 * np.clip(wave - 0.55, 0.0, None) / 0.45


INSIDE: dict[int, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    1: inside_disc,
    2: inside_square,
    4: inside_triangle,
    7: inside_star,
}
STUFF_TONE: dict[int, Callable[..., np.ndarray]] = {
    101: brick_tone,
    103: grass_tone,
    106: water_tone,
}


@dataclass
class Canvas:
    """An image while it is painted.

    Attributes:
        picture: (H, W, 3) float32 RGB.
        owner: (H, W) int64, index of the region visible at each pixel.
        categories: one per region, in the order of painting.
        colors: the base RGB color of each region.
        painted: number of pixels of each region when it was painted.
    """

    picture: np.ndarray
    owner: np.ndarray
    categories: list[Category] = field(default_factory=list)
    colors: list[np.ndarray] = field(default_factory=list)
    painted: list[int] = field(default_factory=list)

    def paint(
        self, mask: np.ndarray, category: Category, color: np.ndarray, tone: np.ndarray
    ) -> None:
        """Cover ``mask`` (H, W bool) with ``color``, scaled by 1 + ``tone`` (H, W)."""
        self.owner[mask] = len(self.categories)
        self.picture[mask] = color * (1.0 + tone[mask][:, None])
        self.categories.append(category)
        self.colors.append(color)
        self.painted.append(int(mask.sum()))

    def has_room_for(self, mask: np.ndarray) -> bool:
        """Return whether every region, ``mask`` included, stays visible if ``mask`` is painted."""
        if mask.sum() < MIN_VISIBLE_PIXELS:
            return False
        left = np.bincount(self.owner[~mask], minlength=len(self.painted))
        least = np.maximum(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * np.array(self.painted))
        return bool((left >= least).all())


def rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def pick_color(
    rng: np.random.Generator, hue: float, others: list[np.ndarray], contrast: float
) -> np.ndarray:
    """Draw an RGB color at least ``contrast`` (Lab) from all of ``others``, or the best of 24.

    In half of the cases colors near ``hue`` (degrees) are preferred.
    """
    hsv = rng.uniform((0.0, 0.15, 0.35), (360.0, 0.75, 0.9), (24, 3)).astype(np.float32)
    if rng.random() < TYPICAL_HUE_SHARE:
        hsv[:12, 0] = np.mod(
            rng.normal(hue, HUE_SPREAD, 12), 360.0
        )  # the first that contrasts is taken
    candidates = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)
    if not others:
        return candidates[0, 0]
    lab = cv2.cvtColor(candidates, cv2.COLOR_RGB2LAB)[0]
    other_lab = cv2.cvtColor(np.stack(others)[None], cv2.COLOR_RGB2LAB)[0]
    distance = np.linalg.norm(lab[:, None] - other_lab, axis=2).min(axis=1)
    enough = np.flatnonzero(distance >= contrast)
    return candidates[0, enough[0] if len(enough) else distance.argmax()]


def random_side(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return one side (bool) of a straight or wavy line that passes near the center."""
    half = UNITS / 2
    across, along = rotate(x - half, y - half, rng.uniform(0.0, 2 * math.pi))
    waviness = rng.uniform(3.0, 10.0) if rng.random() < 0.65 else 0.0
    wave = np.sin(along * rng.uniform(0.05, 0.12) + rng.uniform(0.0, 2 * math.pi))
    return across + waviness * wave > rng.uniform(-0.3, 0.3) * UNITS


def random_layout(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Split the image into 2 or 3 regions of at least 1/12 each: (H, W) int64 in 0..2."""
    num_regions = int(rng.integers(2, 4))
    while True:
        layout = random_side(rng, x, y).astype(int)
        if num_regions == 3:
            layout += (layout == 1) & random_side(rng, x, y)
        if np.bincount(layout.ravel(), minlength=num_regions).min() >= x.size / 12:
            return layout


def add_stuff(rng: np.random.Generator, canvas: Canvas, x: np.ndarray, y: np.ndarray) -> None:
    """Fill the image; regions 0 and 2 sometimes share a class and thus form one segment."""
    layout = random_layout(rng, x, y)
    classes = rng.permutation(len(STUFF))
    if rng.random() < 0.25:
        classes[2] = classes[0]
    for region in range(int(layout.max()) + 1):
        category = STUFF[classes[region]]
        color = pick_color(rng, category.hue, canvas.colors, STUFF_CONTRAST)
        canvas.paint(layout == region, category, color, STUFF_TONE[category.id](rng, x, y))


def thing_tone(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return shading from one side on a plain, striped or dotted surface."""
    toward_light, _ = rotate(u, v, rng.uniform(0.0, 2 * math.pi))
    finish, pitch = rng.choice(["plain", "stripes", "dots"]), rng.uniform(0.45, 0.8)
    tone = rng.uniform(0.05, 0.22) * toward_light
    if finish == "stripes":
        tone += 0.1 * np.sign(np.sin(2 * math.pi * u / pitch))
    elif finish == "dots":
        tone += 0.2 * (np.hypot(np.mod(u / pitch, 1.0) - 0.5, np.mod(v / pitch, 1.0) - 0.5) < 0.3)
    return tone


def add_things(rng: np.random.Generator, canvas: Canvas, x: np.ndarray, y: np.ndarray) -> None:
    """Paint 1 to 4 things, later ones on top, without those that would hide another."""
    wanted, placed, tries = int(rng.integers(1, MAX_THINGS + 1)), 0, 0
    while placed < wanted and (placed == 0 or tries < 4 * wanted):
        tries += 1
        category = THINGS[rng.integers(len(THINGS))]
        radius = rng.uniform(*THING_DIAMETER) / 2
        center_x, center_y = rng.uniform(0.08 * UNITS, 0.92 * UNITS, 2)
        angle = rng.uniform(0.0, 2 * math.pi)
        u, v = rotate((x - center_x) / radius, (y - center_y) / radius, angle)
        mask = INSIDE[category.id](u, v)
        if not canvas.has_room_for(mask):
            continue
        near = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        neighbors = [canvas.colors[region] for region in np.unique(canvas.owner[near])]
        color = pick_color(rng, category.hue, neighbors, THING_CONTRAST)
        canvas.paint(mask, category, color, thing_tone(rng, u, v))
        placed += 1


def finish_picture(
    rng: np.random.Generator, picture: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Light the image from one side and add camera noise; returns (H, W, 3) uint8 RGB."""
    toward_light, _ = rotate(x / UNITS - 0.5, y / UNITS - 0.5, rng.uniform(0.0, 2 * math.pi))
    lit = picture * (1.0 + rng.uniform(0.0, 0.35) * toward_light)[..., None]
    lit += rng.uniform(0.01, 0.03) * rng.standard_normal(picture.shape, dtype=np.float32)
    return (np.clip(lit, 0.0, 1.0) * 255.0).round().astype(np.uint8)


def make_segments(
    rng: np.random.Generator, canvas: Canvas
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return the (H, W) int64 segment map and COCO's ``segments_info``.

    Every thing is a segment; all regions of one stuff class form one. Ids are colors near that of
    the class, so that the PNG can be viewed as an image.
    """
    members: dict[object, list[int]] = {}
    for region, category in enumerate(canvas.categories):
        key = region if category.isthing else category.name
        members.setdefault(key, []).append(region)
    segment_map = np.zeros(canvas.owner.shape, np.int64)
    segments: list[dict[str, Any]] = []
    for regions in members.values():
        category = canvas.categories[regions[0]]
        taken = {segment["id"] for segment in segments}
        segment_id = 0
        while segment_id == 0 or segment_id in taken:
            red, green, blue = np.clip(category.color + rng.integers(-30, 31, 3), 1, 255).tolist()
            segment_id = red + 256 * green + 256**2 * blue
        mask = np.isin(canvas.owner, regions)
        segment_map[mask] = segment_id
        left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
        segments.append(
            {
                "id": segment_id,
                "category_id": category.id,
                "area": int(mask.sum()),
                "bbox": [left, top, width, height],
                "iscrowd": 0,
            }
        )
    return segment_map, segments


def make_example(
    seed: int, split: str, index: int, size: int
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Paint image ``index`` of a split; it depends on the arguments only.

    Returns:
        (H, W, 3) uint8 RGB image, (H, W) int64 segment map, and COCO's ``segments_info``.
    """
    rng = np.random.default_rng([list(SPLITS).index(split), index, seed])
    centres = (np.arange(size, dtype=np.float32) + 0.5) * (UNITS / size)
    x, y = np.meshgrid(centres, centres)
    canvas = Canvas(np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.int64))
    add_stuff(rng, canvas, x, y)
    add_things(rng, canvas, x, y)
    segment_map, segments = make_segments(rng, canvas)
    return finish_picture(rng, canvas.picture, x, y), segment_map, segments


def write_split(output: Path, split: str, count: int, seed: int, size: int) -> int:
    """Write images, panoptic PNGs and JSON of one split; return the number of segments."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for folder in (split, f"panoptic_{split}", "annotations"):
        (output / folder).mkdir(exist_ok=True)
    for index in range(count):
        picture, segment_map, segments = make_example(seed, split, index, size)
        image_id = SPLITS[split] + index + 1
        name = f"{image_id:012d}.png"
        write_image(output / split / name, picture)
        write_image(output / f"panoptic_{split}" / name, id2rgb(segment_map))
        images.append({"id": image_id, "file_name": name, "height": size, "width": size})
        annotations.append({"image_id": image_id, "file_name": name, "segments_info": segments})
    content = {
        "info": {"description": f"synthetic shapes, {split}", "version": str(FORMAT_VERSION)},
        "images": images,
        "annotations": annotations,
        "categories": [category.to_coco() for category in THINGS + STUFF],
    }
    write_json(output / "annotations" / f"panoptic_{split}.json", content)
    return sum(len(annotation["segments_info"]) for annotation in annotations)


def is_intact(output: Path, counts: dict[str, int]) -> bool:
    """Return whether all files of a finished set still exist."""
    return all(
        (output / "annotations" / f"panoptic_{split}.json").is_file()
        and all(
            sum(1 for _ in (output / folder).glob("*.png")) == count
            for folder in (split, f"panoptic_{split}")
        )
        for split, count in counts.items()
    )


def prepare(output: Path, counts: dict[str, int], seed: int, size: int, overwrite: bool) -> str:
    """Make the set if it does not exist; return one line about the result.

    Raises:
        UserError: ``output`` holds something else, or an unfinished or different set and
            ``overwrite`` is False.
    """
    wanted = {
        "generator": "shapes_panoptic",
        "version": FORMAT_VERSION,
        "seed": seed,
        "size": size,
        **{f"num_{split}": count for split, count in counts.items()},
    }
    folder = PreparedFolder(output, wanted)
    if folder.is_done(lambda: is_intact(output, counts), overwrite=overwrite):
        return f"{output}: already complete, nothing to do"
    started = time.perf_counter()
    with folder.filling([*SPLITS, *(f"panoptic_{split}" for split in SPLITS), "annotations"]):
        segments = sum(write_split(output, split, n, seed, size) for split, n in counts.items())
    made = ", ".join(f"{count} {split}" for split, count in counts.items())
    seconds = time.perf_counter() - started
    return f"{output}: {made} images with {segments} segments in {seconds:.1f} s"


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    positive = integer_between(1, 999_999)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write, created if needed"
    )
    parser.add_argument("--num-train", type=positive, default=1000, help="default: %(default)s")
    parser.add_argument("--num-val", type=positive, default=100, help="default: %(default)s")
    parser.add_argument(
        "--seed", type=integer_between(0, 2**32 - 1), default=0, help="default: %(default)s"
    )
    parser.add_argument(
        "--size", type=integer_between(64, 2048), default=96, help="side in pixels (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the set in --output")
    args = parser.parse_args(argv)
    counts = {"train": args.num_train, "val": args.num_val}
    try:
        print(prepare(args.output, counts, args.seed, args.size, args.overwrite))
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written: {one_line(error)}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
