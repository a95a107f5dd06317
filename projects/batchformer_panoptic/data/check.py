"""Checks of the data sets that a config names: for the command, and before a run."""

import codecs
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir

from ..errors import UserError
from .datasets.catalog import check_paths, resolve_path
from .datasets.image_folder import CLASSIFICATION, load_image_folder
from .datasets.setup import check_registered
from .io import read_coco_json, read_json, write_json
from .validation import (
    Depth,
    Problem,
    check_detections,
    check_images,
    check_instances_content,
    check_panoptic_content,
    check_queries,
    check_shared_images,
    no_training_targets,
    raise_first_error,
    records,
)

logger = logging.getLogger(__name__)

# Before a run, files with so many pixels are decoded in each data set: a few seconds of work.
_FAST_PIXELS = 200_000_000

# Config key -> the keys of Detectron2's metadata for the entries of a row behind its name.
_ROWS = {
    "CUSTOM_PANOPTIC": ("image_root", "panoptic_root", "panoptic_json"),
    "CUSTOM_INSTANCES": ("image_root", "json_file"),
    "CUSTOM_IMAGE_FOLDERS": ("image_root",),
}


@dataclass
class CheckedSet:
    """The result for one data set.

    Attributes:
        source: the file or folder that its errors are attributed to.
        problems: all problems.
        content: the content of its JSON, {} without a readable one.
        images: the paths of its images; [] for an image folder.
    """

    source: str
    problems: list[Problem]
    content: dict[str, Any] = field(default_factory=dict)
    images: list[Path] = field(default_factory=list)

    @property
    def errors(self) -> list[Problem]:
        """The problems because of which training and evaluation refuse the data set."""
        return [problem for problem in self.problems if problem.severity == "error"]


def check_files(paths: Mapping[str, str | Path], depth: Depth) -> CheckedSet:
    """Check one data set.

    Args:
        paths: by their keys in Detectron2's metadata: ``image_root`` with ``panoptic_json`` and
            ``panoptic_root``, with ``json_file``, or without others for an image folder.
        depth: how thoroughly.

    Raises:
        UserError: a file or folder in ``paths`` does not exist.
    """
    local = {key: str(PathManager.get_local_path(str(path))) for key, path in paths.items()}
    json_file = local.get("panoptic_json") or local.get("json_file")
    if json_file is None:
        return _check_image_folder(local["image_root"], depth)
    root = Path(local["image_root"])
    try:
        content = read_coco_json(json_file)
    except UserError as error:
        if not os.path.isfile(json_file):
            raise
        message = str(error).removeprefix(f"{json_file} ")
        return CheckedSet(json_file, [Problem("unreadable JSON", message)])
    if "panoptic_root" in local:
        problems = check_panoptic_content(content, root, local["panoptic_root"], depth)
    else:
        problems = check_instances_content(content, root, depth)
    with open(json_file, "rb") as file:
        has_mark = file.read(3) == codecs.BOM_UTF8
    if has_mark:
        message = "the JSON begins with a byte-order mark, which other readers refuse"
        problems.append(Problem("byte-order mark", message, severity="warning"))
    names = (image.get("file_name") for image in records(content, "images"))
    images = [root / name for name in names if isinstance(name, str)]
    return CheckedSet(json_file, problems, content, images)


def _check_image_folder(root: str, depth: Depth) -> CheckedSet:
    try:
        images = load_image_folder(root)
    except UserError as error:
        return CheckedSet(root, [Problem("bad image folder", str(error))])
    return CheckedSet(root, check_images(images, depth))


def paths_of(cfg: CfgNode, name: str) -> dict[str, str] | None:
    """Return the paths of a data set for `check_files`.

    Args:
        cfg: lists the data set, which need not be registered.
        name: or that of a registered data set.

    Returns:
        None: a data set of another format, or one that is not on a local disk.

    Raises:
        UserError: an unknown name.
    """
    paths = None
    for key, roles in _ROWS.items():
        for row in cfg.DATASETS[key]:
            if row and row[0] == name and len(row) == len(roles) + 1:
                resolved = map(resolve_path, row[1:])
                paths = dict(zip(roles, resolved, strict=True))
    if paths is None:
        check_registered(name)
        metadata = MetadataCatalog.get(name).as_dict()
        is_folder = metadata.get("evaluator_type") == CLASSIFICATION
        formats = _ROWS.values() if is_folder else [r for r in _ROWS.values() if len(r) > 1]
        found = (r for r in formats if all(metadata.get(role) for role in r))
        paths = {role: str(metadata[role]) for role in next(found, ())}
    is_local = paths and not any("://" in path for path in paths.values())
    return paths if is_local else None


def check_use(cfg: CfgNode, checked: Mapping[str, CheckedSet]) -> list[Problem]:
    """Check what a config does with its data sets; those that are not given are left out.

    DATASETS.TRAIN has targets, it shares no images with DATASETS.TEST, and no image has more
    objects than the model can find.
    """
    problems = _check_sharing(cfg, checked)
    trained = [checked[name].problems for name in cfg.DATASETS.TRAIN if name in checked]
    if trained and all(any(p.kind == "no targets" for p in found) for found in trained):
        problems.append(no_training_targets(cfg.DATASETS.TRAIN))
    return problems + [
        replace(problem, message=f"{name}: {problem.message}")
        for name, found in checked.items()
        for problem in _check_limits(cfg, found.content, is_test=name in cfg.DATASETS.TEST)
    ]


def _check_limits(cfg: CfgNode, content: dict[str, Any], *, is_test: bool) -> Iterator[Problem]:
    if cfg.MODEL.META_ARCHITECTURE == "PanopticDETR":
        yield from check_queries(content, cfg.MODEL.DETR.NUM_OBJECT_QUERIES)
        if is_test and cfg.MODEL.PANOPTIC.INSTANCES_TEST:
            yield from check_detections(content, cfg.TEST.DETECTIONS_PER_IMAGE)


def _check_sharing(cfg: CfgNode, checked: Mapping[str, CheckedSet]) -> list[Problem]:
    train, test = (
        {name: checked[name].images for name in names if name in checked}
        for names in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    )
    return list(check_shared_images(train, {k: v for k, v in test.items() if k not in train}))


# ---------------------------------------------------------------------------
# Before a run
# ---------------------------------------------------------------------------


def check_before_run(cfg: CfgNode, *, eval_only: bool) -> None:
    """Check the data sets of a run in the words of ``tools/check_dataset.py``.

    The JSON and the existence, format and size of all files are checked, and files of 200 million
    pixels per data set are decoded. That data sets are sound is kept in a cache, by the content of
    the JSON and the names, sizes and times of the files.

    Args:
        cfg: after `setup_datasets`. DATASETS.CHECK False leaves out the check.
        eval_only: whether only DATASETS.TEST is used.

    Raises:
        UserError: the first error of a data set, and how many others there are.
    """
    if cfg.DATASETS.CHECK and comm.is_main_process():
        paths = {}
        for name in dict.fromkeys([*([] if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]):
            of_name = paths_of(cfg, name)
            if of_name is None:
                logger.info("%s is not a local data set of a known format: not checked", name)
                continue
            check_paths(name, of_name)
            paths[name] = of_name
        cache = _cache_file(cfg, paths)
        lines = _read_cache(cache)
        if lines is None:
            lines = _check_sets(cfg, paths)
            _write_cache(cache, lines)
        for line in lines:
            logger.warning(line)
    comm.synchronize()


def _check_sets(cfg: CfgNode, paths: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Check all data sets of a run and return a line for each one with warnings."""
    depth = Depth(
        max_pixels=_FAST_PIXELS,
        processes=max(1, cfg.DATALOADER.NUM_WORKERS),
        largest_image=cfg.INPUT.MAX_PIXELS,
    )
    checked, lines = {}, []
    for name in paths:
        checked[name] = found = check_files(paths[name], depth)
        if found.errors:
            count = len(found.errors) - 1
            others = f" ({count} more: tools/check_dataset.py lists them)" if count else ""
            raise UserError(f"{found.source}: {found.errors[0]}{others}")
        kinds = Counter(p.kind for p in found.problems if p.severity == "warning")
        if kinds:
            listed = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
            lines.append(f"{name}: {listed}; tools/check_dataset.py explains these warnings")
    together = check_use(cfg, checked)
    raise_first_error(together)
    return lines + [str(problem) for problem in together]


def _cache_file(cfg: CfgNode, paths: Mapping[str, Mapping[str, str]]) -> Path:
    """Return the file that says that exactly these data sets have been checked."""
    # Which images may be shared depends on which sets are for training.
    split = [list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)]
    limits = [cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DETR.NUM_OBJECT_QUERIES]
    limits += [cfg.MODEL.PANOPTIC.INSTANCES_TEST, cfg.TEST.DETECTIONS_PER_IMAGE]
    limits += [cfg.INPUT.MAX_PIXELS]
    digest = hashlib.sha256(json.dumps([paths, split, limits]).encode())
    # Rules that change make the old results invalid.
    folder = Path(__file__).parent
    readers = (folder / name for name in ("images.py", "io.py", "segment_maps.py"))
    for source in (*readers, *sorted((folder / "validation").glob("*.py"))):
        digest.update(source.read_bytes())
    for roles in paths.values():
        local = {role: PathManager.get_local_path(path) for role, path in roles.items()}
        for path in _files_of(local):
            try:
                status = os.stat(path)
            except OSError:
                state = "missing"
            else:
                state = f"{status.st_size} {status.st_mtime_ns}"
            digest.update(f"{path}\n{state}\n".encode())
    cache = Path(get_cache_dir()) / "batchformer_panoptic"
    return cache / f"checked_{digest.hexdigest()}.json"


def _files_of(paths: Mapping[str, str]) -> Iterator[str]:
    json_file = paths.get("panoptic_json") or paths.get("json_file")
    if json_file is None:
        yield from (item["file_name"] for item in load_image_folder(paths["image_root"]))
        return
    yield json_file
    content = read_coco_json(json_file)
    for section, role in (("images", "image_root"), ("annotations", "panoptic_root")):
        for record in records(content, section) if role in paths else ():
            yield os.path.join(paths[role], str(record.get("file_name")))


def _read_cache(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    try:
        lines = read_json(path)
    except UserError:
        return None
    return lines if isinstance(lines, list) else None


def _write_cache(path: Path, lines: Sequence[str]) -> None:
    try:
        write_json(path, lines)
    except UserError as error:
        logger.info("the result of the check of the data sets is not kept: %s", error)
