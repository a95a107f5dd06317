"""Annotations of every tool become a panoptic data set with the same segments."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model
from PIL import Image

from batchformer_panoptic import register_panoptic_dataset
from batchformer_panoptic.data import build_train_loader, load_panoptic_json, setup_datasets
from batchformer_panoptic.data.segment_maps import read_segment_map
from batchformer_panoptic.evaluation import PanopticEvaluator
from helpers.commands import load_script
from helpers.foreign_formats import (
    WRITERS,
    Names,
    dump,
    photos,
    write_cityscapes,
    write_coco,
    write_coco_rle,
    write_labelme,
    write_roboflow,
    write_voc,
    write_yolo,
)
from helpers.tiny_model import tiny_cfg, total

convert_dataset = load_script("tools/convert_dataset.py")
check_dataset = load_script("tools/check_dataset.py")

SPLITS = ("train", "val")


def convert(source: Path, output: Path, *options: str) -> None:
    assert convert_dataset.main([str(source), str(output), *options]) == 0


def rows(output: Path) -> list[list[str]]:
    content = yaml.safe_load((output / "config.yaml").read_text())
    found: list[list[str]] = content["DATASETS"]["CUSTOM_PANOPTIC"]
    return found


def segments_by_image(output: Path) -> dict[str, list[tuple[str, int]]]:
    """Class and area of every segment, sorted, by the name of the image."""
    found = {}
    for _, _, panoptic_root, panoptic_json in rows(output):
        content = json.loads(Path(panoptic_json).read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        images = {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in content["annotations"]:
            pixels = read_segment_map(Path(panoptic_root) / annotation["file_name"])
            found[images[annotation["image_id"]]] = sorted(
                (names[info["category_id"]], int((pixels == info["id"]).sum()))
                for info in annotation["segments_info"]
            )
    return found


def check(row: list[str]) -> int:
    _, image_root, panoptic_root, panoptic_json = row
    roots = ["--image-root", image_root, "--panoptic-root", panoptic_root]
    return check_dataset.main(["--json", panoptic_json, *roots])


def quality_of_truth(row: list[str]) -> float:
    name, *paths = row
    register_panoptic_dataset(name, *paths)
    evaluator = PanopticEvaluator(name)
    evaluator.reset()
    for record in load_panoptic_json(paths[2], paths[0], paths[1]):
        pixels = torch.from_numpy(read_segment_map(record["pan_seg_file_name"]).copy())
        evaluator.process([record], [{"panoptic_seg": (pixels, record["segments_info"])}])
    return float(evaluator.evaluate()["panoptic_seg"]["PQ"])


def train_one_step(row: list[str]) -> float:
    """The largest change of a parameter."""
    cfg = tiny_cfg(
        MODEL__DETR__NUM_CLASSES=0, MODEL__PANOPTIC__THING_CLASS_IDS=[], INPUT__MIN_SIZE_TRAIN=[48]
    )
    cfg.DATASETS.CUSTOM_PANOPTIC, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [row], (row[0],), ()
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS, cfg.SEED = 2, 0, 0
    setup_datasets(cfg)
    model = build_model(cfg).train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = total(model(next(iter(build_train_loader(cfg)))))
    assert torch.isfinite(loss)
    loss.backward()
    optimizer.step()
    pairs = zip(before, model.parameters(), strict=True)
    return max(float((old - new.detach()).abs().max()) for old, new in pairs)


@pytest.fixture(scope="module", params=WRITERS)
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Names, str]:
    write, name = WRITERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    names = write(folder / "source")
    convert(folder / "source", folder / request.param)
    return folder / request.param, names, name


def test_the_segments_are_those_of_the_source(converted: tuple[Path, Names, str]) -> None:
    output, names, name = converted
    complete = name in ("cityscapes", "panoptic")
    background = None if complete else "background"
    found = segments_by_image(output)
    assert found.keys() == names.keys()
    for image, photo in names.items():
        expected = photo.expected(background)
        assert [label for label, _ in found[image]] == [label for label, _ in expected], image
        areas = np.array([area for _, area in found[image]])
        np.testing.assert_allclose(areas, [area for _, area in expected], rtol=0.01)


def test_the_checker_finds_no_error(converted: tuple[Path, Names, str]) -> None:
    assert [row[0].rpartition("_")[2] for row in rows(converted[0])] == list(SPLITS)
    assert [check(row) for row in rows(converted[0])] == [0, 0]


def test_the_truth_has_a_quality_of_100(converted: tuple[Path, Names, str]) -> None:
    assert [quality_of_truth(row) for row in rows(converted[0])] == [100.0, 100.0]


def test_a_model_trains_on_it(converted: tuple[Path, Names, str]) -> None:
    row = rows(converted[0])[0]
    assert train_one_step([f"{row[0]}_step", *row[1:]]) > 0


def test_the_written_config_trains_and_evaluates(tmp_path: Path) -> None:
    write_coco(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "own")
    config = tmp_path / "own/config.yaml"
    content = yaml.safe_load(config.read_text())
    assert content["MODEL"]["DETR"]["NUM_OBJECT_QUERIES"] == 20
    assert Path(content["_BASE_"]).is_file()
    small = {
        "MODEL.WEIGHTS": "",
        "MODEL.BACKBONE.NAME": "build_small_resnet_backbone",
        "MODEL.DETR.HIDDEN_DIM": 32,
        "MODEL.DETR.DEC_LAYERS": 3,
        "INPUT.LARGE_SCALE_JITTER.SIZE": 64,
        "INPUT.MIN_SIZE_TEST": 64,
        "SOLVER.MAX_ITER": 1,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "DATALOADER.NUM_WORKERS": 0,
        "OUTPUT_DIR": str(tmp_path / "output"),
    }
    options = [str(text) for pair in small.items() for text in pair]
    main = load_script("train_net.py").main
    assert main(["--config-file", str(config), *options]) == 0
    lines = (tmp_path / "output/metrics.json").read_text().splitlines()
    assert "panoptic_seg/PQ" in {key for line in lines for key in json.loads(line)}


# ---------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------


def categories(output: Path) -> dict[str, int]:
    path = next((output / "annotations").glob("*_train.json"))
    return {x["name"]: x["isthing"] for x in json.loads(path.read_text())["categories"]}


def images(output: Path, split: str) -> set[str]:
    return {path.name for path in (output / split).iterdir()}


def test_every_class_of_a_tool_is_a_thing(converted: tuple[Path, Names, str]) -> None:
    output, _, name = converted
    kinds = categories(output)
    assert (kinds["car"], kinds["person"]) == (1, 1)
    assert kinds.get("background") == (None if name in ("cityscapes", "panoptic") else 0)
    assert kinds.get("road") == (0 if name == "cityscapes" else None)
    assert "traffic" not in kinds


def test_classes_become_things_and_stuff(tmp_path: Path) -> None:
    write_coco(tmp_path / "source")
    options = ["--stuff", "car", "--background", "street"]
    convert(tmp_path / "source", tmp_path / "a", *options)
    assert categories(tmp_path / "a") == {"person": 1, "car": 0, "street": 0}
    # Two cars are one segment of stuff.
    assert [name for name, _ in segments_by_image(tmp_path / "a")["photo_0.png"]] == [
        *("car", "person", "street")
    ]


def test_pixels_without_a_segment_stay_void_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_coco(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "a", "--background", "void")
    assert categories(tmp_path / "a") == {"person": 1, "car": 1}
    expected = {photo.name: photo.expected(None) for photo in photos()}
    assert segments_by_image(tmp_path / "a") == expected
    sizes = sum(height * width for height, width in (photo.size for photo in photos()))
    share = 1 - sum(area for found in expected.values() for _, area in found) / sizes
    out = capsys.readouterr().out
    assert f"{share:.1%}" in next(line for line in out.splitlines() if "(void)" in line)
    assert "--background NAME makes a stuff class of it" in out


def test_an_overlap_follows_the_file_on_request(tmp_path: Path) -> None:
    write_coco(tmp_path / "source")
    path = tmp_path / "source/annotations/instances_default.json"
    content = json.loads(path.read_text())
    content["annotations"].reverse()  # the large person comes after the small car
    dump(path, content)
    convert(tmp_path / "source", tmp_path / "smaller")
    convert(tmp_path / "source", tmp_path / "file", "--overlap", "file")
    photo = photos()[0]
    assert segments_by_image(tmp_path / "smaller")[photo.name] == photo.expected()
    hidden = photo._replace(things=[photo.things[0], photo.things[2], photo.things[1]])
    assert segments_by_image(tmp_path / "file")[photo.name] == hidden.expected()


def test_the_seed_and_share_choose_the_split(tmp_path: Path) -> None:
    write_coco(tmp_path / "source")
    chosen = []
    for number, seed in enumerate((0, 0, 1, 2)):
        output = tmp_path / str(number)
        convert(tmp_path / "source", output, "--val-share", "0.34", "--seed", str(seed))
        assert not images(output, "train") & images(output, "val")
        assert (len(images(output, "train")), len(images(output, "val"))) == (4, 2)
        chosen.append(frozenset(images(output, "val")))
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1
    convert(tmp_path / "source", tmp_path / "all", "--val-share", "0")
    assert len(images(tmp_path / "all", "train")) == 6
    assert not (tmp_path / "all/val").exists()


def test_the_split_of_the_source_is_kept_or_replaced(tmp_path: Path) -> None:
    write_roboflow(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "kept")
    assert images(tmp_path / "kept", "val") == {"photo_4.jpg", "photo_5.png"}
    convert(tmp_path / "source", tmp_path / "new", "--val-share", "0.17")
    assert len(images(tmp_path / "new", "val")) == 1


def test_a_finished_set_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coco(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "a")
    convert(tmp_path / "source", tmp_path / "a")
    assert "already complete; --overwrite" in capsys.readouterr().out
    arguments = [str(tmp_path / "source"), str(tmp_path / "a"), "--val-share", "0"]
    assert convert_dataset.main(arguments) == 2
    assert "add --overwrite to replace it" in capsys.readouterr().err
    convert(tmp_path / "source", tmp_path / "a", "--val-share", "0", "--overwrite")
    assert not (tmp_path / "a/val").exists()


# ---------------------------------------------------------------------------
# The other direction
# ---------------------------------------------------------------------------


def test_panoptic_becomes_instances_and_panoptic_again(tmp_path: Path) -> None:
    write_coco_rle(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "panoptic")
    convert(tmp_path / "panoptic", tmp_path / "instances", "--to", "instances")
    assert images(tmp_path / "instances", "val") == images(tmp_path / "panoptic", "val")
    content = json.loads((tmp_path / "instances/annotations/instances_train.json").read_text())
    assert {x["name"] for x in content["categories"]} == {"car", "person"}
    ids = [annotation["id"] for annotation in content["annotations"]]
    assert len(ids) == len(set(ids)) > 6
    convert(tmp_path / "instances", tmp_path / "again")
    assert segments_by_image(tmp_path / "again") == segments_by_image(tmp_path / "panoptic")


def test_panoptic_becomes_semantic_and_instance_masks(tmp_path: Path) -> None:
    write_coco(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "panoptic", "--background", "void")
    convert(tmp_path / "panoptic", tmp_path / "masks", "--to", "masks")
    classes = json.loads((tmp_path / "masks/classes.json").read_text())
    names = [category["name"] for category in classes]
    for split in SPLITS:
        for name in images(tmp_path / "masks", split):
            photo = next(photo for photo in photos() if photo.name == name)
            semantic, instance = (
                np.asarray(Image.open(tmp_path / f"masks/{kind}_{split}/{Path(name).stem}.png"))
                for kind in ("semantic", "instance")
            )
            assert (semantic.dtype, instance.dtype) == (np.uint8, np.uint16)
            np.testing.assert_array_equal(semantic == 255, photo.painted() == 0)
            found = [
                (names[semantic[instance == number][0]], int((instance == number).sum()))
                for number in range(1, instance.max() + 1)
            ]
            assert sorted(found) == photo.expected(None)


# ---------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert convert_dataset.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_mistakes_of_the_command_line_get_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_coco(tmp_path / "source")
    arguments = [tmp_path / "source", tmp_path / "a"]
    cases = {
        "unknown class 'cat'; did you mean car?": ["--things", "cat"],
        "class 'car' is both": ["--things", "car", "--stuff", "car"],
        "holds no labelme": ["--from", "labelme"],
        "COCO instances has none; use smaller or file": ["--overlap", "z-order"],
        "6 of 6 annotated images are not below": ["--images", tmp_path / "absent"],
    }
    for message, options in cases.items():
        assert message in error_of(capsys, *arguments, *options)
    (tmp_path / "empty").mkdir()
    assert "no annotations of a known format" in error_of(
        capsys, tmp_path / "empty", tmp_path / "a"
    )
    assert not (tmp_path / "a").exists()


def test_several_formats_are_not_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_coco(tmp_path / "source")
    write_labelme(tmp_path / "source")
    error = error_of(capsys, tmp_path / "source", tmp_path / "a")
    assert "several formats, coco, labelme: choose one with --from" in error


@pytest.mark.parametrize(
    ("write", "path", "name"),
    [
        (write_coco, "annotations/instances_default.json", "coco"),
        (write_labelme, "photo_1.json", "labelme"),
        (write_yolo, "data.yaml", "yolo"),
        (write_voc, "", "voc"),
        (write_cityscapes, "", "cityscapes"),
    ],
)
def test_the_checker_names_a_foreign_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write, path: str, name: str
) -> None:
    write(tmp_path)
    row = ["", str(tmp_path), str(tmp_path), str(tmp_path / path)]
    assert check(row) == 2
    error = capsys.readouterr().err
    assert "and not COCO panoptic; convert it with: python tools/convert_dataset.py" in error
    assert error.endswith(f"DST --from {name}\n")
    source = error.partition("convert_dataset.py ")[2].split()[0]
    convert(Path(source), tmp_path / "converted", "--from", name)
