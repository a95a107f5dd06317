"""Predictor: the results of evaluation, classes from the checkpoint, clear errors."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from batchformer_panoptic.data import PanopticDatasetMapper, load_dataset_dicts
from batchformer_panoptic.engine.predictor import Predictor, configure_for_drawing
from batchformer_panoptic.errors import UserError
from batchformer_panoptic.visualization import read_image
from helpers.tiny_dataset import TinyPanopticDataset
from helpers.tiny_model import tiny_model
from helpers.trained_files import Run, write_run


@pytest.fixture
def run(tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset) -> Run:
    return write_run(tmp_path, tiny_panoptic_dataset)


def predictor_of(run: Run, **changes: object) -> Predictor:
    cfg = run.cfg.clone()
    cfg.merge_from_list(
        [
            "MODEL.WEIGHTS",
            str(run.weights),
            *(x for k, v in changes.items() for x in (k.replace("__", "."), v)),
        ]
    )
    return Predictor(cfg)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_results_are_those_of_evaluation(
    run: Run, tiny_panoptic_dataset: TinyPanopticDataset, image_format: str
) -> None:
    predictor = predictor_of(run, INPUT__FORMAT=image_format, INPUT__MIN_SIZE_TEST=60)
    cfg = run.cfg.clone()
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST = image_format, 60
    mapper = PanopticDatasetMapper(cfg, is_train=False)
    model = tiny_model(MODEL__PANOPTIC__THING_CLASS_IDS=[0, 2]).eval()
    model.load_state_dict(torch.load(run.weights, weights_only=True)["model"])
    numbers = []
    for dataset_dict in load_dataset_dicts([tiny_panoptic_dataset.name], filter_empty=False):
        (expected,) = model([mapper(dataset_dict)])
        result = predictor(read_image(dataset_dict["file_name"]))
        assert torch.equal(result["panoptic_seg"][0], expected["panoptic_seg"][0])
        assert result["panoptic_seg"][1] == expected["panoptic_seg"][1]
        assert torch.equal(result["instances"].scores, expected["instances"].scores)
        assert torch.equal(result["instances"].pred_masks, expected["instances"].pred_masks)
        numbers.append(len(result["panoptic_seg"][1]))
    assert max(numbers) > 0, "empty results would be equal in any case"


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_inputs_are_those_of_the_test_loader(
    run: Run, tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset, image_format: str
) -> None:
    """Exactly, with an image that is resized and one that its EXIF data rotate."""
    dataset_dicts = load_dataset_dicts([tiny_panoptic_dataset.name], filter_empty=False)
    path = Path(dataset_dicts[0]["file_name"])
    rotated = tmp_path / "rotated.png"
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: 90 degrees
    image.save(rotated, exif=exif)
    cfg = run.cfg.clone()
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST = image_format, 60
    mapper = PanopticDatasetMapper(cfg, is_train=False)
    for file in (path, rotated):
        expected = mapper({"file_name": str(file), "image_id": 0})
        found = mapper.map_image(read_image(file))
        assert torch.equal(found.pop("image"), expected.pop("image"))
        assert found == {key: expected[key] for key in ("height", "width")}
    assert found == {"height": image.width, "width": image.height}


def test_a_batch_of_several_sizes_gives_the_results_of_single_images(
    run: Run, tiny_panoptic_dataset: TinyPanopticDataset
) -> None:
    predictor = predictor_of(run)
    dicts = load_dataset_dicts([tiny_panoptic_dataset.name], filter_empty=False)[:2]
    images = [read_image(d["file_name"]) for d in dicts]
    together = predictor.predict_batch(images)
    assert [r["panoptic_seg"][0].shape for r in together] == [(48, 64), (40, 32)]
    for image, result in zip(images, together, strict=True):
        assert torch.equal(result["panoptic_seg"][0], predictor(image)["panoptic_seg"][0])


def test_classes_come_from_the_checkpoint_without_the_data_set(run: Run) -> None:
    cfg = run.cfg.clone()
    cfg.DATASETS.CUSTOM_PANOPTIC = [["not_on_this_disk", "/nowhere", "/nowhere", "/nowhere.json"]]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("not_on_this_disk",)
    cfg.MODEL.WEIGHTS = str(run.weights)
    cfg.freeze()
    before = cfg.dump()
    predictor = Predictor(cfg)
    assert predictor.class_table == run.table
    assert predictor.model.inference_options.thing_class_ids == (0, 2)
    assert not predictor.model.training
    assert cfg.dump() == before, "the caller's config is not changed"


def test_classes_come_from_the_data_set_when_the_checkpoint_has_none(
    tmp_path: Path, tiny_panoptic_dataset: TinyPanopticDataset
) -> None:
    run = write_run(tmp_path, tiny_panoptic_dataset, with_classes=False)
    assert predictor_of(run).class_table == run.table
    with pytest.raises(UserError, match=r"does not name its classes .* set DATASETS\.TEST"):
        predictor_of(run, DATASETS__TRAIN=(), DATASETS__TEST=(), DATASETS__CUSTOM_PANOPTIC=[])


def test_unusable_weights_are_refused(run: Run, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pth"
    damaged.write_text("no checkpoint")
    for weights, message in {
        "": r"MODEL\.WEIGHTS is empty",
        str(tmp_path / "absent.pth"): r"absent\.pth not found",
        str(damaged): r"damaged\.pth cannot be read",
    }.items():
        with pytest.raises(UserError, match=message):
            predictor_of(run, MODEL__WEIGHTS=weights)
    with pytest.raises(UserError, match="does not fit the model"):
        predictor_of(run, MODEL__DETR__NUM_OBJECT_QUERIES=7)


@pytest.mark.parametrize(
    ("has_masks", "threshold", "expected"),
    [
        (True, None, (False, 0.85, 0.0)),
        (True, 0.3, (False, 0.3, 0.0)),
        (False, None, (True, 0.85, 0.5)),
        (False, 0.3, (True, 0.3, 0.3)),
    ],
)
def test_thresholds_for_drawing(
    run: Run, has_masks: bool, threshold: float | None, expected: tuple[bool, float, float]
) -> None:
    cfg = run.cfg.clone()
    cfg.MODEL.MASK_ON, cfg.MODEL.PANOPTIC.SCORE_THRESHOLD_TEST = has_masks, 0.85
    configure_for_drawing(cfg, threshold)
    node = cfg.MODEL.PANOPTIC
    found = node.INSTANCES_TEST, node.SCORE_THRESHOLD_TEST, node.INSTANCE_SCORE_THRESHOLD_TEST
    assert found == expected


def test_a_threshold_beyond_one_is_refused(run: Run) -> None:
    with pytest.raises(UserError, match=r"threshold is 30.*from 0 to 1"):
        configure_for_drawing(run.cfg.clone(), 30.0)
