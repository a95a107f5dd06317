# ruff: noqa: T201  (it is a program of its own)
"""Run an exported model with NumPy, Pillow and ONNX Runtime, without PyTorch and Detectron2.

The export writes this file beside the model. As a command:

    python predict.py model.onnx photo.jpg folder --output predictions

As a library, after `pip install numpy pillow onnxruntime`:

    from predict import Predictor
    prediction = Predictor.load("model.onnx").predict("photo.jpg")
    print(prediction.segments)
"""

import argparse
import colorsys
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

# Of the metadata of the model: everything that the graph itself does not know.
METADATA_KEY = "batchformer_panoptic"
_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "GIF")
_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".avif", ".gif"}

Pixels = npt.NDArray[np.uint8]


class ModelError(Exception):
    """A file that cannot be used; the message is for the user."""


class PredictedSegment(NamedTuple):
    """One segment, or one box of a model without masks.

    Attributes:
        id: the value of its pixels in the segment map, from 1 on.
        class_id: contiguous id, an index of the classes of the model.
        class_name: name of the class.
        is_thing: whether the class has countable instances.
        score: 0 to 1.
        area: pixels; of a box, width * height.
        bbox_xywh: tight around the pixels, (x, y, width, height) in pixels.
    """

    id: int
    class_id: int
    class_name: str
    is_thing: bool
    score: float
    area: float
    bbox_xywh: tuple[float, float, float, float]


class Prediction:
    """The segments of one photograph.

    Attributes:
        image: the photograph, (H, W, 3) uint8 RGB.
        segment_map: (H, W) int32 ids of segments, 0 is void; None for a model without masks.
        segments: in ascending order of id.
        classes: of the model: ``id`` in the data set, ``name``, ``isthing``, ``color``.
    """

    def __init__(
        self,
        image: Pixels,
        segment_map: npt.NDArray[np.int32] | None,
        segments: Sequence[PredictedSegment],
        classes: Sequence[dict[str, Any]],
    ) -> None:
        self.image = image
        self.segment_map = segment_map
        self.segments = list(segments)
        self.classes = classes

    def to_json(self) -> list[dict[str, Any]]:
        """Entries like the ``segments_info`` of COCO panoptic, with name and score."""
        return [
            {
                "id": segment.id,
                "category_id": self.classes[segment.class_id]["id"],
                "category_name": segment.class_name,
                "isthing": int(segment.is_thing),
                "score": round(segment.score, 6),
                "area": segment.area,
                "bbox": list(segment.bbox_xywh),
            }
            for segment in self.segments
        ]

    def overlay(self) -> Image.Image:
        """The photograph with colored segments, or with boxes, and the names of things."""
        colors = [
            _color(self.classes[s.class_id]["color"], s.id, s.is_thing) for s in self.segments
        ]
        picture = self.image
        if self.segment_map is not None:
            table = np.array([(0, 0, 0), *colors], np.float32)
            painted = table[self.segment_map]
            share = np.where(self.segment_map > 0, 0.55, 0.0)[..., None]
            edges = _edges(self.segment_map)[..., None]
            mixed = self.image * (1 - share) + painted * share
            picture = np.where(edges, 255, mixed).astype(np.uint8)
        result = Image.fromarray(picture)
        draw = ImageDraw.Draw(result)
        size = max(11, min(result.size) // 40)
        for segment, color in zip(self.segments, colors, strict=True):
            x, y, width, height = segment.bbox_xywh
            text = f"{segment.class_name} {segment.score:.0%}"
            if self.segment_map is None:
                draw.rectangle((x, y, x + width, y + height), outline=color, width=2)
                place = (x, y)
            else:
                place = _inner_point(self.segment_map == segment.id)
            left, top, right, bottom = draw.textbbox(place, text, font_size=size)
            shift_x = min(0, result.width - right - 2) - min(0, left - 2)
            shift_y = min(0, result.height - bottom - 2) - min(0, top - 2)
            place = (place[0] + shift_x, place[1] + shift_y)
            box = draw.textbbox(place, text, font_size=size)
            draw.rectangle((box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2), fill=(0, 0, 0))
            draw.text(place, text, fill=(255, 255, 255), font_size=size)
        return result

    def save(self, folder: str | Path, name: str) -> list[Path]:
        """Write NAME.json, NAME_overlay.jpg and, with masks, the COCO panoptic NAME.png."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / f"{name}.json", folder / f"{name}_overlay.jpg"]
        written[0].write_text(json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n")
        self.overlay().save(written[1], quality=92)
        if self.segment_map is not None:
            written.append(folder / f"{name}.png")
            self.id_image().save(written[2])
        return written

    def id_image(self) -> Image.Image:
        """The segment map as COCO panoptic stores it: id = R + 256 G + 65536 B."""
        ids = np.zeros(self.image.shape[:2], np.int32)
        ids = ids if self.segment_map is None else self.segment_map
        colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1)
        return Image.fromarray(colors.astype(np.uint8))


class Predictor:
    """A model in an ONNX file, with the preprocessing that it was trained for.

    Args:
        session: an ``onnxruntime.InferenceSession``.
        score_threshold: see :meth:`load`.

    Attributes:
        classes: ``id`` in the data set, ``name``, ``isthing`` and ``color`` of each class.
        score_threshold: queries below it are not used.
    """

    def __init__(self, session: Any, *, score_threshold: float | None = None) -> None:
        content = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if content is None:
            raise ModelError("the model was not exported by batchformer_panoptic")
        self._session = session
        self._metadata: dict[str, Any] = json.loads(content)
        if self._metadata["outputs"] != "results":
            raise ModelError("the model returns raw predictions; export it with --outputs results")
        self.classes: list[dict[str, Any]] = self._metadata["classes"]
        threshold = (
            self._metadata["score_threshold"] if score_threshold is None else score_threshold
        )
        if not 0 <= threshold <= 1:
            raise ModelError(f"the score threshold is {threshold}; it must be from 0 to 1")
        self.score_threshold = float(threshold)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        score_threshold: float | None = None,
        providers: Sequence[str] | None = None,
        threads: int = 0,
    ) -> "Predictor":
        """Load a model.

        Args:
            model: the ONNX file.
            score_threshold: 0 to 1. None: the one that the model was exported with.
            providers: of ONNX Runtime, such as ["CUDAExecutionProvider"]; None: the CPU.
            threads: of the CPU; 0 leaves the choice to ONNX Runtime.

        Raises:
            ModelError: the file is missing, damaged, or another model, or there is no ONNX Runtime.
        """
        try:
            import onnxruntime
        except ImportError as error:
            reason = f"onnxruntime cannot be imported ({error})"
            raise ModelError(f"{reason}: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(
                str(model), options, providers=list(providers or ["CPUExecutionProvider"])
            )
        except Exception as error:  # of many types
            reason = str(error).splitlines()[0]
            raise ModelError(f"{model} cannot be loaded: {reason}") from error
        return cls(session, score_threshold=score_threshold)

    def predict(
        self,
        image: str | Path | Image.Image | Pixels,
        *,
        score_threshold: float | None = None,
    ) -> Prediction:
        """Predict one photograph.

        Args:
            image: a file, an image of Pillow, or (H, W, 3) uint8 RGB.
            score_threshold: 0 to 1, in place of that of the predictor.

        Raises:
            ModelError: the file cannot be read.
        """
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        if not isinstance(picture, Image.Image):
            picture = read_image(picture)
        rgb = picture.convert("RGB")
        threshold = self.score_threshold if score_threshold is None else score_threshold
        height, width = self._network_size(rgb.height, rgb.width)
        values = np.asarray(rgb.resize((width, height), Image.Resampling.BILINEAR), np.float32)
        if self._metadata["format"] == "BGR":
            values = values[..., ::-1]
        divisor = self._metadata["size_divisor"]
        below, right = -height % divisor, -width % divisor
        if "size" in self._metadata:
            below, right = self._metadata["size"][0] - height, self._metadata["size"][1] - width
        values = np.pad(values, ((0, below), (0, right), (0, 0)))
        sizes = np.array([[height, width]], np.int64)
        outputs = dict(
            zip(
                [output.name for output in self._session.get_outputs()],
                self._session.run(
                    None,
                    {
                        "images": np.ascontiguousarray(values.transpose(2, 0, 1)[None]),
                        "image_sizes": sizes,
                        "output_sizes": np.array([[rgb.height, rgb.width]], np.int64),
                        "score_threshold": np.array(threshold, np.float32),
                    },
                ),
                strict=True,
            )
        )
        pixels = np.asarray(rgb)
        if "segment_map" not in outputs:
            return Prediction(pixels, None, self._boxes(outputs), self.classes)
        segment_map = outputs["segment_map"][0]
        return Prediction(pixels, segment_map, self._segments(outputs, segment_map), self.classes)

    def _network_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to resize to: the rule of Detectron2's ResizeShortestEdge.

        For a graph of one size: the largest size that fits.
        """
        shortest, longest = self._metadata["min_size"], self._metadata["max_size"]
        if "size" in self._metadata:
            largest = self._metadata["size"]
            scale = min(largest[0] / height, largest[1] / width)
            return max(1, round(scale * height)), max(1, round(scale * width))
        if shortest == 0:
            return height, width
        scale = shortest / min(height, width)
        new = (shortest, scale * width) if height < width else (scale * height, shortest)
        if max(new) > longest:
            shrink = longest / max(new)
            new = (new[0] * shrink, new[1] * shrink)
        return int(new[0] + 0.5), int(new[1] + 0.5)

    def _segments(
        self, outputs: dict[str, Any], segment_map: npt.NDArray[np.int32]
    ) -> list[PredictedSegment]:
        areas = outputs["areas"][0]
        count = int((areas > 0).sum())
        boxes = _boxes_of(segment_map, count)
        return [
            self._segment(i + 1, outputs["labels"][0][i], outputs["scores"][0][i], areas[i], box)
            for i, box in enumerate(boxes)
        ]

    def _boxes(self, outputs: dict[str, Any]) -> list[PredictedSegment]:
        found = zip(outputs["boxes"][0], outputs["labels"][0], outputs["scores"][0], strict=True)
        kept = [(box, label, score) for box, label, score in found if score > 0]
        return [
            self._segment(
                number,
                label,
                score,
                float((x1 - x0) * (y1 - y0)),
                (float(x0), float(y0), float(x1 - x0), float(y1 - y0)),
            )
            for number, ((x0, y0, x1, y1), label, score) in enumerate(kept, 1)
        ]

    def _segment(
        self, number: int, label: Any, score: Any, area: Any, box: tuple[float, ...]
    ) -> PredictedSegment:
        entry = self.classes[int(label)]
        bbox = (box[0], box[1], box[2], box[3])
        size = area.item() if isinstance(area, np.generic) else area
        return PredictedSegment(
            number, int(label), entry["name"], bool(entry["isthing"]), float(score), size, bbox
        )


def read_image(source: str | Path | IO[bytes], max_pixels: int | None = None) -> Image.Image:
    """Read a photograph as 8-bit RGB, rotated according to its EXIF data.

    Args:
        source: a path or an open file.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        ModelError: the file is missing, damaged or too large.
    """
    name = "the image" if hasattr(source, "read") else f"image {source}"
    try:
        Image.init()
        known = [kind for kind in _FORMATS if kind in Image.OPEN]
        with Image.open(source, formats=known) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise ModelError(
                    f"{name} has {image.width} x {image.height} pixels, more than {max_pixels}"
                )
            rotated = ImageOps.exif_transpose(image)
            if rotated.mode.startswith("I"):  # 16 bits: Pillow would clip them
                values = np.asarray(rotated).astype(np.uint32) >> 8
                rotated = Image.fromarray(values.clip(0, 255).astype(np.uint8))
            return rotated.convert("RGB")
    except ModelError:
        raise
    except UnidentifiedImageError:
        raise ModelError(f"{name} cannot be read: unknown image format") from None
    except Exception as error:  # damaged files raise anything in Pillow's many readers
        raise ModelError(f"{name} cannot be read: {error}") from error


def _boxes_of(
    segment_map: npt.NDArray[np.int32], count: int
) -> list[tuple[float, float, float, float]]:
    """Tight (x, y, width, height) of the segments 1 to count."""
    boxes: list[tuple[float, float, float, float]] = []
    for number in range(1, count + 1):
        inside = segment_map == number
        columns, rows = inside.any(0).nonzero()[0], inside.any(1).nonzero()[0]
        x, y = int(columns[0]), int(rows[0])
        boxes.append((x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y))
    return boxes


def _color(color: Sequence[int], number: int, is_thing: bool) -> tuple[int, int, int]:
    """The color of a segment: that of its class, varied between the things of a class."""
    if not is_thing:
        return color[0], color[1], color[2]
    hue, _, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
    varied = colorsys.hsv_to_rgb((hue + 0.07 * (number % 5)) % 1, 0.8, max(0.6, value))
    red, green, blue = (round(255 * channel) for channel in varied)
    return red, green, blue


def _edges(segment_map: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """(H, W) bool: the first pixel after each change of segment."""
    edges = np.zeros(segment_map.shape, bool)
    edges[:, 1:] |= segment_map[:, 1:] != segment_map[:, :-1]
    edges[1:] |= segment_map[1:] != segment_map[:-1]
    return edges


def _inner_point(inside: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """(x, y) of a point of a segment near its centre: the middle of the longest of its rows."""
    row = int(inside.sum(1).argmax())
    columns = inside[row].nonzero()[0]
    return float(columns[len(columns) // 2]), float(row)


def _find_images(inputs: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in _ENDINGS)
        else:
            found.append(path)
    if not found:
        raise ModelError(f"no image in {' '.join(inputs)}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if all images were predicted, 2 otherwise."""
    parser = argparse.ArgumentParser(
        description="Predict photographs with an exported model.",
        epilog="python predict.py model.onnx photo.jpg folder --output predictions",
    )
    parser.add_argument("model", help="the ONNX file")
    parser.add_argument("images", nargs="+", help="files and folders")
    parser.add_argument("--output", required=True, help="folder of the results")
    parser.add_argument("--score-threshold", type=float, help="0 to 1; default: of the model")
    args = parser.parse_args(argv)
    failed = 0
    try:
        predictor = Predictor.load(args.model, score_threshold=args.score_threshold)
        images = _find_images(args.images)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names: set[str] = set()
    for path in images:
        try:
            prediction = predictor.predict(path)
        except ModelError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        name = path.stem
        while name in names:
            name += "_"
        names.add(name)
        prediction.save(args.output, name)
        print(f"{path}: {len(prediction.segments)} segments")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
