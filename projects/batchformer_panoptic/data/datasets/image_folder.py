"""Image folders: a folder of images for each class, as torchvision's ImageFolder has it."""

import functools
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from ...errors import UserError
from .panoptic import check_paths, resolve_path

CLASSIFICATION = "classification"  # the evaluator_type of image folders

DatasetDict = dict[str, Any]


def register_image_folder(name: str, image_root: str) -> None:
    """Make a folder of class folders known to Detectron2 under a name.

    Labels are the places of the class folders in alphabetical order; a folder whose name begins
    with a dot is no class. Only the names of the folders are read now; images are listed when the
    data set is used. Registering a name again with the same path does nothing.

    Args:
        name: what DATASETS.TRAIN and DATASETS.TEST will call the data set.
        image_root: the folder. It may hold ``~`` and environment variables and is relative to the
            working directory.

    Raises:
        UserError: the folder does not exist or holds no folders, or the name is taken.
    """
    root = resolve_path(image_root)
    metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog:
        if metadata.get("image_root") != root or metadata.evaluator_type != CLASSIFICATION:
            raise UserError(
                f"data set {name!r} is already registered with another path: choose another name"
            )
        return
    check_paths(name, {"image_root": root})
    classes = _class_names(root)
    DatasetCatalog.register(name, functools.partial(load_image_folder, root))
    metadata.set(
        image_root=root,
        evaluator_type=CLASSIFICATION,
        classes=classes,
        # where the rest of the project looks for classes
        thing_classes=classes,
        thing_dataset_id_to_contiguous_id={label: label for label in range(len(classes))},
    )


def load_image_folder(image_root: str) -> list[DatasetDict]:
    """List the images, by class and then by path; no image is opened.

    Returns:
        Dicts with file_name, image_id (the place in the list) and label.

    Raises:
        UserError: a class folder without images.
    """
    labels = {name: label for label, name in enumerate(_class_names(image_root))}
    samples = make_dataset(image_root, labels, IMG_EXTENSIONS, allow_empty=True)
    if empty := sorted(set(labels.values()) - {label for _, label in samples}):
        folder = list(labels)[empty[0]]
        raise UserError(
            f"{image_root}: the class folder {folder!r} holds no image "
            f"({len(empty)} such of {len(labels)} folders): known are the endings "
            f"{' '.join(IMG_EXTENSIONS)}; add images or remove the folder"
        )
    return [
        {"file_name": file_name, "image_id": image_id, "label": label}
        for image_id, (file_name, label) in enumerate(samples)
    ]


def _class_names(image_root: str) -> list[str]:
    try:
        names, _ = find_classes(image_root)
    except OSError as error:  # no folder in it, or it is a file
        raise UserError(
            f"{image_root}: an image folder holds one folder for each class ({error})"
        ) from error
    visible = [name for name in names if not name.startswith(".")]
    if not visible:
        raise UserError(f"{image_root}: an image folder holds one folder for each class, here none")
    return visible
