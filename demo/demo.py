"""Draw a trained model's predictions on images, a video or the webcam.

    python demo/demo.py --config-file F --input IMAGES, FOLDERS, "GLOBS" --output DIR \\
        --opts MODEL.WEIGHTS W

Without --output, results are shown in a window (Escape or q quits, any other key continues). The
last lines say how many images were drawn, and which files of the folders were passed over. Exit
status: 0, 1 if some of the images could not be read, 2 after another mistake.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from batchformer_panoptic.data.images import IMAGE_SUFFIXES, find_images
from batchformer_panoptic.engine.predictor import Predictor, configure_for_drawing
from batchformer_panoptic.engine.setup import add_threshold_argument, command_parser, load_config
from batchformer_panoptic.engine.threads import limit_threads
from batchformer_panoptic.errors import UserError, command
from batchformer_panoptic.visualization import draw_result, write_image

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4"}
DEFAULT_FPS = 25.0  # for videos without a frame rate
SHOWN_FILES = 5  # names of files that were passed over
WINDOW = "panoptic segmentation"
ESCAPE_KEYS = (27, ord("q"))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="images, folders, globs")
    source.add_argument("--video-input", metavar="FILE", help="a video")
    source.add_argument("--webcam", action="store_true", help="the first camera, in a window")
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="a folder, or a file for one image or video"
    )
    add_threshold_argument(parser)
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_output(args)
    images = find_images(args.input, outside=args.output) if args.input else []
    cfg = load_config(args.config_file, args.opts)
    configure_for_drawing(cfg, args.confidence_threshold)
    predictor = Predictor(cfg)
    limit_threads(cfg, predictor.model)
    if args.webcam:
        return show_webcam(predictor)
    if args.video_input:
        return draw_video(predictor, args.video_input, args.output)
    others = list(passed_over(args.input, images, args.output))
    status = draw_images(predictor, images, args.output)
    if others:
        shown = ", ".join(others[:SHOWN_FILES]) + (", ..." if len(others) > SHOWN_FILES else "")
        print(f"{counted(len(others), 'other file')} passed over: {shown}")
    return status


def check_output(args: argparse.Namespace) -> None:
    if args.webcam and args.output:
        raise UserError("--webcam shows a window: --output is for --input and --video-input")
    if args.output is None and not has_display():
        raise UserError(
            "there is no display for a window: "
            + ("--webcam needs one" if args.webcam else "give --output DIR")
        )


def has_display() -> bool:
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def passed_over(inputs: Sequence[str], images: Sequence[str], output: Path | None) -> Iterator[str]:
    """Yield the files below the input folders that are not drawn, without hidden ones and output.

    Args:
        inputs: files, folders and globs.
        images: what `find_images` has found in them.
        output: see ``--output``.
    """
    drawn = set(images)
    written = None if output is None else output.resolve()
    for parent, folders, files in (found for name in inputs for found in os.walk(name)):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and Path(parent, name).resolve() != written
        )
        paths = [os.path.join(parent, name) for name in sorted(files) if not name.startswith(".")]
        yield from (path for path in paths if path not in drawn)


def output_paths(images: Sequence[str], output: Path) -> list[Path]:
    """Return a different output file for each image, none of which is an input."""
    if output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir():
        if len(images) > 1:
            raise UserError(f"--output {output} is one file, not {len(images)}: give a folder")
        return [output]
    taken = {Path(image).resolve() for image in images}
    paths = []
    for image in images:
        suffix = Path(image).suffix.lower()
        suffix = suffix if suffix in (".jpg", ".jpeg", ".png") else ".png"
        path, number = output / (Path(image).stem + suffix), 1
        while path.resolve() in taken:
            number += 1
            path = output / f"{Path(image).stem}_{number}{suffix}"
        taken.add(path.resolve())
        paths.append(path)
    return paths


def draw_images(predictor: Predictor, images: Sequence[str], output: Path | None) -> int:
    paths = [None] * len(images) if output is None else output_paths(images, output)
    drawn = failed = 0
    for name, path in zip(images, paths, strict=True):
        start = time.perf_counter()
        try:
            image = predictor.read_image(name)
            result = predictor(image)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        seconds = time.perf_counter() - start
        picture = draw_result(image[:, :, ::-1], result, predictor.class_table)
        where = "" if path is None else f" -> {path}"
        print(f"{name}: {count(result)}, {seconds:.2f} s{where}", flush=True)
        drawn += 1
        if path is not None:
            write_image(path, picture)
        elif show(picture, wait=0):
            break
    print(f"{counted(drawn, 'image')} drawn")
    if failed:
        print(f"error: {failed} of {len(images)} images could not be read", file=sys.stderr)
    return 1 if failed else 0


def count(result: dict[str, Any]) -> str:
    if "panoptic_seg" in result:
        return counted(len(result["panoptic_seg"][1]), "segment")
    return counted(len(result["instances"]), "object")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def draw_video(predictor: Predictor, name: str, output: Path | None) -> int:
    if not os.path.isfile(name):
        raise UserError(f"video {name} does not exist")
    capture = cv2.VideoCapture(name)
    if not capture.isOpened():
        raise UserError(f"video {name} cannot be read: it is damaged or has an unknown format")
    path = None if output is None else video_path(name, output)
    frames_per_second = capture.get(cv2.CAP_PROP_FPS) or DEFAULT_FPS
    writer = None
    number, start = 0, time.perf_counter()
    try:
        for picture in drawn_frames(predictor, capture):
            number += 1
            if path is None:
                if show(picture, wait=1):
                    break
                continue
            if writer is None:
                writer = open_writer(path, frames_per_second, picture)
            writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
    finally:
        capture.release()
        if writer is not None:
            writer.release()
    if number == 0:
        raise UserError(f"video {name} has no readable frame")
    seconds = (time.perf_counter() - start) / number
    where = "" if path is None else f" -> {path}"
    print(f"{name}: {number} frames, {seconds:.2f} s each{where}")
    return 0


def video_path(name: str, output: Path) -> Path:
    is_file = output.suffix.lower() in VIDEO_SUFFIXES and not output.is_dir()
    path = output if is_file else output / f"{Path(name).stem}.mp4"
    if path.resolve() == Path(name).resolve():
        raise UserError(f"--output {output} would overwrite the input: give another folder")
    return path


def open_writer(path: Path, frames_per_second: float, picture: np.ndarray) -> cv2.VideoWriter:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be created: {error.strerror}") from error
    height, width = picture.shape[:2]
    fourcc = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), fourcc, frames_per_second, (width, height))
    if not writer.isOpened():
        raise UserError(f"{path} cannot be written: is its folder writable? is it an .mp4?")
    return writer


def drawn_frames(predictor: Predictor, capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        has_frame, frame = capture.read()
        if not has_frame:
            return
        image = np.asarray(frame, dtype=np.uint8)
        result, table = predictor(image), predictor.class_table
        yield draw_result(image[:, :, ::-1], result, table, vary_instances=False)


def show_webcam(predictor: Predictor) -> int:
    capture = cv2.VideoCapture(0)
    if not capture.isOpened():
        raise UserError("--webcam: no camera can be opened")
    try:
        for picture in drawn_frames(predictor, capture):
            if show(picture, wait=1):
                break
    finally:
        capture.release()
        cv2.destroyAllWindows()
    return 0


def show(picture: np.ndarray, *, wait: int) -> bool:
    """Show a picture for ``wait`` milliseconds (0: until a key is pressed); True: stop."""
    try:
        cv2.imshow(WINDOW, picture[:, :, ::-1])
        return (cv2.waitKey(wait) & 0xFF) in ESCAPE_KEYS
    except cv2.error as error:
        raise UserError("this OpenCV cannot open windows: give --output DIR") from error


if __name__ == "__main__":
    sys.exit(main())
