"""Image folders: one folder of images per class, as in torchvision's ImageFolder."""

import functools
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from ...errors import UserError
from .catalog import is_registered, resolve_path

CLASSIFICATION = "classification"  # the evaluator_type of image folders

DatasetDict = dict[str, Any]


def register_image_folder(name: str, image_root: str) -> None:
    """Register a folder of class folders in Detectron2's catalogs.

    Labels are the positions of the class folders in alphabetical order; hidden folders are
    ignored. Only the names of the folders are read now; images are listed when the data set is
    used. Registering a name again with the same path does nothing.

    Args:
        name: for DATASETS.TRAIN and DATASETS.TEST.
        image_root: the folder. It may contain ``~`` and environment variables and is relative to
            the working directory.

    Raises:
        UserError: the folder does not exist or has no subfolders, or the name is taken.
    """
    root = resolve_path(image_root)
    if is_registered(name, {"image_root": root}, CLASSIFICATION):
        return
    classes = _class_names(root)
    DatasetCatalog.register(name, functools.partial(load_image_folder, root))
    MetadataCatalog.get(name).set(
        image_root=root,
        evaluator_type=CLASSIFICATION,
        classes=classes,
        # The keys that other parts of the project read.
        thing_classes=classes,
        thing_dataset_id_to_contiguous_id={label: label for label in range(len(classes))},
    )


def load_image_folder(image_root: str) -> list[DatasetDict]:
    """List the images, by class and then by path; no image is opened.

    Returns:
        Dicts with file_name, image_id (the position in the list) and label.

    Raises:
        UserError: a class folder without images.
    """
    labels = {name: label for label, name in enumerate(_class_names(image_root))}
    samples = make_dataset(image_root, labels, IMG_EXTENSIONS, allow_empty=True)
    if empty := sorted(set(labels.values()) - {label for _, label in samples}):
        folder = list(labels)[empty[0]]
        raise UserError(
            f"{image_root}: the class folder {folder!r} has no images "
            f"({len(empty)} of {len(labels)} folders are empty): known extensions are "
            f"{' '.join(IMG_EXTENSIONS)}; add images or remove the folder"
        )
    return [
        {"file_name": file_name, "image_id": image_id, "label": label}
        for image_id, (file_name, label) in enumerate(samples)
    ]


def _class_names(image_root: str) -> list[str]:
    try:
        names, _ = find_classes(image_root)
    except OSError as error:  # no subfolder, or the path is a file
        raise UserError(
            f"{image_root}: an image folder holds one folder for each class ({error})"
        ) from error
    visible = [name for name in names if not name.startswith(".")]
    if not visible:
        raise UserError(
            f"{image_root}: an image folder holds one folder for each class; found none"
        )
    return visible
