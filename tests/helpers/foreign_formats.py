"""Six annotated photographs, written as annotation tools write them.

Every photograph but the last has three objects with the outline of an L, so that their masks are
exact: a car, a large person, and a small car in front of the person.
"""

import base64
import io
import json
import zlib
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

NUM_PHOTOS = 6
TURNED = 4  # stored on its side, with EXIF data that turn it
VOC_INDEX = {"car": 7, "person": 15}
CITYSCAPES_ID = {"car": 26, "person": 24}
COLORS = {"background": (0, 0, 0), "person": (10, 200, 30), "car": (200, 40, 10)}

Point = tuple[int, int]


class Thing(NamedTuple):
    """An L: a box without its lower right quarter. All numbers are even pixels."""

    label: str
    x: int
    y: int
    width: int
    height: int

    def corners(self, last: int = 0) -> list[Point]:
        """The outline; with ``last`` 1 the outermost pixels instead of their far edges."""
        right, bottom = self.x + self.width - last, self.y + self.height - last
        middle_x, middle_y = self.x + self.width // 2 - last, self.y + self.height // 2 - last
        upper = [(self.x, self.y), (right, self.y), (right, middle_y)]
        return [*upper, (middle_x, middle_y), (middle_x, bottom), (self.x, bottom)]

    def mask(self, size: tuple[int, int]) -> np.ndarray:
        mask = np.zeros(size, bool)
        mask[self.y : self.y + self.height, self.x : self.x + self.width] = True
        mask[self.y + self.height // 2 :, self.x + self.width // 2 :] = False
        return mask


class Photo(NamedTuple):
    """A photograph as it is seen, after the rotation by EXIF."""

    number: int
    size: tuple[int, int]
    things: list[Thing]  # the later ones are in front

    @property
    def name(self) -> str:
        return f"photo_{self.number}.{'jpg' if self.number in (3, TURNED) else 'png'}"

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(self.number)
        noise = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        pixels = cv2.resize(noise, self.size[::-1], interpolation=cv2.INTER_CUBIC)
        image = Image.fromarray(pixels)
        if path.suffix == ".jpg" and self.number == TURNED:
            exif = Image.Exif()
            exif[0x0112] = 6  # shown turned by 90 degrees clockwise
            image.rotate(90, expand=True).save(path, exif=exif, quality=95)
        else:
            image.save(path)

    def painted(self) -> np.ndarray:
        """(H, W): 0, or 1 + the position of the visible thing."""
        painted = np.zeros(self.size, np.int64)
        for number, thing in enumerate(self.things, 1):
            painted[thing.mask(self.size)] = number
        return painted

    def expected(self, background: str | None = "background") -> list[tuple[str, int]]:
        """Class and area of every segment, sorted."""
        painted = self.painted()
        areas = [(x.label, int((painted == k).sum())) for k, x in enumerate(self.things, 1)]
        return sorted(areas + ([(background, int((painted == 0).sum()))] if background else []))


def photos() -> list[Photo]:
    found = []
    for number in range(NUM_PHOTOS):
        size = (64, 96) if number % 2 else (72, 88)
        things = [
            Thing("car", 8 + 2 * number, 6, 20, 16),
            Thing("person", 44, 22 + 2 * number, 24, 28),
            Thing("car", 40, 30, 16, 12),
        ]
        found.append(Photo(number, size, things if number < NUM_PHOTOS - 1 else []))
    return found


Names = dict[str, Photo]  # by the name of the image after the conversion


def named(found: Sequence[Photo]) -> Names:
    return {photo.name: photo for photo in found}


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def png_bytes(mask: np.ndarray, alpha: bool = False) -> bytes:
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    if alpha:
        image = Image.merge("LA", [image, image])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def crop(thing: Thing, mask: np.ndarray) -> np.ndarray:
    return mask[thing.y : thing.y + thing.height, thing.x : thing.x + thing.width]


# ---------------------------------------------------------------------------
# COCO
# ---------------------------------------------------------------------------

COCO_CATEGORIES = [{"id": 3, "name": "car"}, {"id": 1, "name": "person", "supercategory": "human"}]


def coco_content(
    found: Sequence[Photo],
    categories: list[dict[str, Any]] = COCO_CATEGORIES,
    segmentation: Callable[[Photo, Thing], Any] | None = None,
) -> dict[str, Any]:
    ids = {category["name"]: category["id"] for category in categories}
    images, annotations = [], []
    for photo in found:
        height, width = photo.size
        image = {"id": photo.number, "file_name": photo.name, "height": height, "width": width}
        images.append(image)
        for thing in photo.things:
            outline = [[float(v) for corner in thing.corners() for v in corner]]
            annotation = {
                "id": len(annotations),
                "image_id": photo.number,
                "category_id": ids[thing.label],
                "segmentation": segmentation(photo, thing) if segmentation else outline,
                "bbox": [thing.x, thing.y, thing.width, thing.height],
                "area": thing.width * thing.height,
                "iscrowd": 0,
            }
            annotations.append(annotation)
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root: Path) -> Names:
    for photo in photos():
        photo.save(root / "images" / photo.name)
    dump(root / "annotations" / "instances_default.json", coco_content(photos()))
    return named(photos())


def write_coco_rle(root: Path) -> Names:
    """Run lengths, compressed for the first half of the photographs."""

    def encoded(photo: Photo, thing: Thing) -> Any:
        mask = thing.mask(photo.size)
        if photo.number < 3:
            rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
            return {"size": list(rle["size"]), "counts": rle["counts"].decode()}
        lengths = [len(list(run)) for _, run in groupby(mask.ravel(order="F").tolist())]
        return {"size": list(photo.size), "counts": lengths}

    for photo in photos():
        photo.save(root / photo.name)
    dump(root / "labels.json", coco_content(photos(), segmentation=encoded))
    return named(photos())


def write_roboflow(root: Path) -> Names:
    categories = [
        {"id": 0, "name": "traffic", "supercategory": "none"},
        {"id": 1, "name": "car", "supercategory": "traffic"},
        {"id": 2, "name": "person", "supercategory": "traffic"},
    ]
    for folder, part in (("train", photos()[:4]), ("valid", photos()[4:])):
        for photo in part:
            photo.save(root / folder / photo.name)
        dump(root / folder / "_annotations.coco.json", coco_content(part, categories))
    return named(photos())


# ---------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------


def write_labelme(root: Path) -> Names:
    """The last thing is a mask; the first photograph is embedded only, with a path of Windows."""
    for photo in photos():
        path = root / photo.name
        photo.save(path)
        shapes = []
        for thing in photo.things:
            shape = {"label": thing.label, "points": thing.corners(), "shape_type": "polygon"}
            shape |= {"group_id": None, "flags": {}}
            if thing is photo.things[-1]:
                data = png_bytes(crop(thing, thing.mask(photo.size)))
                right, bottom = thing.x + thing.width - 1, thing.y + thing.height - 1
                shape |= {
                    "shape_type": "mask",
                    "points": [[thing.x, thing.y], [right, bottom]],
                    "mask": base64.b64encode(data).decode(),
                }
            shapes.append(shape)
        embedded = base64.b64encode(path.read_bytes()).decode() if photo.number == 0 else None
        content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imageData": embedded}
        content |= {"imageHeight": photo.size[0], "imageWidth": photo.size[1]}
        content["imagePath"] = photo.name if photo.number else f"..\\pictures\\{photo.name}"
        dump(path.with_suffix(".json"), content)
        if photo.number == 0:
            path.unlink()
    return named(photos())


def write_cvat(root: Path) -> Names:
    """Shapes from front to back, which only the z-order tells; the person is a mask."""
    top = ElementTree.Element("annotations")
    ElementTree.SubElement(top, "version").text = "1.1"
    task = ElementTree.SubElement(ElementTree.SubElement(top, "meta"), "task")
    labels = ElementTree.SubElement(task, "labels")
    for name in ("person", "car"):
        ElementTree.SubElement(ElementTree.SubElement(labels, "label"), "name").text = name
    for photo in photos():
        photo.save(root / "images" / "default" / photo.name)
        image = ElementTree.SubElement(top, "image", id=str(photo.number), name=photo.name)
        image.attrib |= {"height": str(photo.size[0]), "width": str(photo.size[1])}
        for z, thing in reversed(list(enumerate(photo.things))):
            common = {"label": thing.label, "source": "manual", "occluded": "0", "z_order": str(z)}
            if thing.label == "person":
                mask = crop(thing, thing.mask(photo.size)).ravel().tolist()
                lengths = [len(list(run)) for _, run in groupby(mask)]
                rle = ", ".join(map(str, [0, *lengths] if mask[0] else lengths))
                box = {"left": thing.x, "top": thing.y, "width": thing.width}
                box |= {"height": thing.height}
                common |= {"rle": rle} | {key: str(value) for key, value in box.items()}
                ElementTree.SubElement(image, "mask", common)
            else:
                points = ";".join(f"{x:.2f},{y:.2f}" for x, y in thing.corners())
                ElementTree.SubElement(image, "polygon", common, points=points)
    ElementTree.ElementTree(top).write(root / "annotations.xml")
    return named(photos())


def encode_brush(values: np.ndarray) -> list[int]:
    """Label Studio's run lengths of (N,) bytes; the lengths have 3, 4, 8 or 16 bits."""
    bits = f"{len(values):032b}{8 - 1:05b}" + "".join(f"{n - 1:04b}" for n in (3, 4, 8, 16))
    for value, run in groupby(values.tolist()):
        left = len(list(run))
        while left:
            length = min(left, 2**16)
            kind = next(k for k, n in enumerate((3, 4, 8, 16)) if length <= 2**n)
            bits += f"1{kind:02b}{length - 1:0{(3, 4, 8, 16)[kind]}b}{value:08b}"
            left -= length
    bits += "0" * (-len(bits) % 8)
    return [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]


def write_label_studio(root: Path) -> Names:
    """Uploaded images, whose names get a prefix; the person is drawn with the brush."""
    tasks = []
    for photo in photos():
        photo.save(root / "images" / photo.name)
        height, width = photo.size
        results = []
        for number, thing in enumerate(photo.things):
            kind = "brushlabels" if thing.label == "person" else "polygonlabels"
            if kind == "brushlabels":
                alpha = np.repeat(thing.mask(photo.size).ravel() * np.uint8(255), 4)
                value = {"format": "rle", "rle": encode_brush(alpha)}
            else:
                share = [[100 * x / width, 100 * y / height] for x, y in thing.corners()]
                value = {"points": share, "closed": True}
            common = {"id": f"r{number}", "type": kind, "from_name": "label", "to_name": "image"}
            common |= {"original_width": width, "original_height": height, "image_rotation": 0}
            results.append({**common, "value": {**value, kind: [thing.label]}})
        cancelled = {"was_cancelled": True, "result": [], "updated_at": "2025-03-01T00:00:00Z"}
        annotation = {"was_cancelled": False, "result": results, "updated_at": "2025-02-01"}
        older = {"was_cancelled": False, "result": [], "updated_at": "2025-01-01"}
        url = f"/data/upload/1/0123abcd-{photo.name}"
        versions = [older, annotation, cancelled] if photo.number == 0 else [annotation]
        tasks.append({"id": photo.number, "data": {"image": url}, "annotations": versions})
    dump(root / "project-1.json", tasks)
    return named(photos())


def write_supervisely(root: Path) -> Names:
    """The person is a bitmap, compressed; polygons have pixels as points."""
    classes = [{"title": name, "shape": "any", "color": "#FF0000"} for name in ("car", "person")]
    dump(root / "meta.json", {"classes": classes, "tags": []})
    for photo in photos():
        photo.save(root / "ds0" / "img" / photo.name)
        objects = []
        for thing in photo.things:
            entry: dict[str, Any] = {"classTitle": thing.label, "geometryType": "polygon"}
            entry["points"] = {"exterior": thing.corners(last=1), "interior": []}
            if thing.label == "person":
                data = zlib.compress(png_bytes(crop(thing, thing.mask(photo.size)), alpha=True))
                bitmap = {"data": base64.b64encode(data).decode(), "origin": [thing.x, thing.y]}
                entry |= {"geometryType": "bitmap", "bitmap": bitmap}
            objects.append(entry)
        size = {"height": photo.size[0], "width": photo.size[1]}
        path = root / "ds0" / "ann" / f"{photo.name}.json"
        dump(path, {"size": size, "objects": objects, "tags": []})
    return named(photos())


def write_yolo(root: Path) -> Names:
    """The last photograph has no label file."""
    names = ["person", "car"]
    for photo in photos():
        folder = "val" if photo.number == TURNED else "train"
        photo.save(root / folder / "images" / photo.name)
        height, width = photo.size
        lines = []
        for thing in photo.things:
            share = (f"{x / width:.6f} {y / height:.6f}" for x, y in thing.corners())
            lines.append(f"{names.index(thing.label)} {' '.join(share)}\n")
        if lines:
            path = root / folder / "labels" / Path(photo.name).with_suffix(".txt").name
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(lines))
    content = "train: ../train/images\nval: ../val/images\nnc: 2\nnames:\n  0: person\n  1: car\n"
    (root / "data.yaml").write_text(content)
    return named(photos())


# ---------------------------------------------------------------------------
# Label images
# ---------------------------------------------------------------------------


def write_voc(root: Path) -> Names:
    """Palette images with a void border around each object; in ``expected`` it is no segment."""
    palette = np.random.default_rng(0).integers(0, 256, 768).tolist()
    lists: dict[str, list[str]] = {"train": [], "val": []}
    for photo in photos():
        stem = Path(photo.name).stem
        photo.save(root / "JPEGImages" / photo.name)
        lists["val" if photo.number > 3 else "train"].append(stem)
        objects = photo.painted()
        lookup = np.array([0, *(VOC_INDEX[thing.label] for thing in photo.things)])
        for folder, values in (("Class", lookup[objects]), ("Object", objects)):
            image = Image.fromarray(values.astype(np.uint8))
            image.putpalette(palette)
            path = root / f"Segmentation{folder}" / f"{stem}.png"
            path.parent.mkdir(exist_ok=True)
            image.save(path)
    for split, stems in lists.items():
        path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(stems) + "\n")
    return named(photos())


def write_cvat_masks(root: Path) -> Names:
    """Colored images with labelmap.txt; the last photograph has none."""
    lines = [f"{name}:{','.join(map(str, color))}::\n" for name, color in COLORS.items()]
    root.mkdir(parents=True)
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + "".join(lines))
    for photo in photos():
        stem = Path(photo.name).stem
        photo.save(root / "JPEGImages" / photo.name)
        if not photo.things:
            continue
        objects = photo.painted()
        classes = np.array(
            [COLORS[name] for name in ("background", *(t.label for t in photo.things))]
        )
        numbers = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)])
        for folder, colors in (("Class", classes), ("Object", numbers)):
            path = root / f"Segmentation{folder}" / f"{stem}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(colors[objects].astype(np.uint8)).save(path)
    path = root / "ImageSets" / "Segmentation" / "default.txt"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"{Path(photo.name).stem}\n" for photo in photos()))
    return named(photos())


def cityscapes_stem(photo: Photo) -> str:
    return f"aachen_{photo.number:06d}_000019"


def save_cityscapes_image(root: Path, photo: Photo) -> Path:
    """Save the image; return the path of its annotations without their ending."""
    split = "val" if photo.number > 3 else "train"
    stem = cityscapes_stem(photo)
    photo.save(root / "leftImg8bit" / split / "aachen" / f"{stem}_leftImg8bit.png")
    folder = root / "gtFine" / split / "aachen"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{stem}_gtFine"


def cityscapes_names() -> Names:
    return {f"{cityscapes_stem(photo)}_leftImg8bit.png": photo for photo in photos()}


def instance_ids(photo: Photo) -> np.ndarray:
    ids = [3, *(1000 * CITYSCAPES_ID[x.label] + k for k, x in enumerate(photo.things))]
    return np.array(ids)[photo.painted()]


def write_cityscapes(root: Path) -> Names:
    for photo in photos():
        start = save_cityscapes_image(root, photo)
        image = Image.fromarray(instance_ids(photo).astype(np.uint16))
        image.save(f"{start}_instanceIds.png")
    return cityscapes_names()


def write_cityscapes_polygons(root: Path) -> Names:
    for photo in photos():
        start = save_cityscapes_image(root, photo)
        height, width = photo.size
        frame = [[0, 0], [width, 0], [width, height], [0, height]]
        objects: list[dict[str, Any]] = [{"label": "out of roi", "polygon": frame}]
        objects += [{"label": thing.label, "polygon": thing.corners()} for thing in photo.things]
        objects.append({"label": "road", "polygon": frame, "deleted": 1})
        content = {"imgHeight": height, "imgWidth": width, "objects": objects}
        dump(Path(f"{start}_polygons.json"), content)
    return cityscapes_names()


def write_cityscapes_panoptic(root: Path) -> Names:
    """As the data set's own script: its JSON names images that do not exist."""
    categories = [{"id": i, "name": n, "isthing": 1} for n, i in CITYSCAPES_ID.items()]
    for split, part in (("train", photos()[:4]), ("val", photos()[4:])):
        images, annotations = [], []
        folder = root / "gtFine" / f"cityscapes_panoptic_{split}"
        folder.mkdir(parents=True)
        for photo in part:
            save_cityscapes_image(root, photo)
            stem = cityscapes_stem(photo)
            ids = np.where(photo.painted() > 0, instance_ids(photo), 0)
            channels = [ids % 256, ids // 256 % 256, ids // 65536]
            png = f"{stem}_gtFine_panoptic.png"
            Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(folder / png)
            name = f"{stem}_gtFine_leftImg8bit.png"
            height, width = photo.size
            image = {"id": stem, "file_name": name, "width": width, "height": height}
            images.append(image)
            segments = [
                {"id": i, "category_id": i // 1000, "area": n, "iscrowd": 0, "bbox": [0, 0, 1, 1]}
                for i, n in zip(
                    *(x.tolist() for x in np.unique(ids, return_counts=True)), strict=True
                )
                if i
            ]
            annotation = {"image_id": stem, "file_name": png, "segments_info": segments}
            annotations.append(annotation)
        content = {"images": images, "annotations": annotations, "categories": categories}
        dump(folder.with_suffix(".json"), content)
    return cityscapes_names()


# What a tool writes: the writer, and the name of the format that is recognised.
WRITERS: dict[str, tuple[Callable[[Path], Names], str]] = {
    "coco": (write_coco, "coco"),
    "coco_rle": (write_coco_rle, "coco"),
    "roboflow": (write_roboflow, "roboflow"),
    "labelme": (write_labelme, "labelme"),
    "cvat": (write_cvat, "cvat"),
    "label_studio": (write_label_studio, "label-studio"),
    "supervisely": (write_supervisely, "supervisely"),
    "yolo": (write_yolo, "yolo"),
    "voc": (write_voc, "voc"),
    "cvat_masks": (write_cvat_masks, "voc"),
    "cityscapes": (write_cityscapes, "cityscapes"),
    "cityscapes_polygons": (write_cityscapes_polygons, "cityscapes"),
    "cityscapes_panoptic": (write_cityscapes_panoptic, "panoptic"),
}
