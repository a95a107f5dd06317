"""Strict loading: allowed mismatches, refused ones, and their messages."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from batchformer_panoptic.checkpoint import PanopticCheckpointer, SettingsRecord, read_class_table
from batchformer_panoptic.data.class_table import ClassTable
from batchformer_panoptic.errors import UserError
from helpers.small_checkpoint import (
    CATEGORIES,
    Model,
    assert_loaded,
    load_weights,
    save_weights,
    without_key,
    write_image_net_pkl,
)
from helpers.tiny_model import tiny_cfg


def test_weights_that_fit_are_loaded(tmp_path: Path) -> None:
    source, target = Model(), Model()
    load_weights(target, save_weights(tmp_path / "w.pth", source))
    assert_loaded(target, source.state_dict())


def test_bare_weights_are_loaded(tmp_path: Path) -> None:
    source, target = Model(), Model()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_weights(target, str(tmp_path / "w.pth"))
    assert_loaded(target, source.state_dict())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("block", [False, True])
def test_block_may_be_absent_or_superfluous(tmp_path: Path, block: bool, training: bool) -> None:
    source, target = Model(block=block), Model(block=not block)
    load_weights(target, save_weights(tmp_path / "w.pth", source), training=training)
    assert_loaded(target, source.state_dict())


def test_mask_head_may_be_absent_in_training_alone(tmp_path: Path) -> None:
    source, target = Model(), Model(masks=True)
    path = save_weights(tmp_path / "w.pth", source)
    with pytest.raises(UserError, match=r"4 keys missing \(mask_head.*MASK_ON False"):
        load_weights(target, path)
    load_weights(target, path, training=True)
    assert_loaded(target, source.state_dict())


@pytest.mark.parametrize(
    ("weights", "target", "words"),
    [
        pytest.param(
            lambda: Model(classes=4).state_dict(),
            Model,
            r"2 shapes differ \(box_head\.class_embed\.weight \(5, 3\) instead of \(3, 3\).*"
            "trained on other classes",
            id="number of classes",
        ),
        pytest.param(
            lambda: Model(queries=7).state_dict(),
            Model,
            r"query_embed\.weight \(7, 3\) instead of \(4, 3\)\). It has 7 queries: set "
            r"MODEL\.DETR\.NUM_OBJECT_QUERIES 7",
            id="number of queries",
        ),
        pytest.param(
            lambda: Model(queries=7, classes=4).state_dict(),
            Model,
            r"3 shapes differ.*NUM_CLASSES.*NUM_OBJECT_QUERIES",
            id="classes and queries",
        ),
        pytest.param(
            lambda: without_key(Model().state_dict(), "transformer.layer.bias"),
            Model,
            r"1 keys missing \(transformer\.layer\.bias\)",
            id="missing key",
        ),
        pytest.param(
            lambda: Model().state_dict() | {"neck.weight": torch.ones(1)},
            Model,
            r"1 keys unknown \(neck\.weight\)",
            id="unknown key",
        ),
        pytest.param(
            lambda: Model(masks=True).state_dict(),
            Model,
            r"4 keys unknown \(mask_head.*MASK_ON True",
            id="mask head unused",
        ),
        pytest.param(
            lambda: without_key(Model(masks=True).state_dict(), "mask_head.0.bias"),
            lambda: Model(masks=True),
            r"1 keys missing \(mask_head\.0\.bias\)",
            id="half a mask head",
        ),
        pytest.param(
            lambda: {f"x{i}": torch.ones(1) for i in range(9)},
            Model,
            r"9 keys unknown \(x0, x1, x2, x3, x4, \.\.\.\)",
            id="something else altogether",
        ),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_mismatch_is_refused(
    tmp_path: Path,
    weights: Callable[[], dict[str, Tensor]],
    target: Callable[[], nn.Module],
    words: str,
    training: bool,
) -> None:
    path = save_weights(tmp_path / "w.pth", weights())
    with pytest.raises(UserError, match=words) as error:
        load_weights(target(), path, training=training)
    assert "\n" not in str(error.value)


def test_image_net_weights_start_a_training(tmp_path: Path) -> None:
    classifier = {"stem.fc.weight": np.ones((5, 3)), "stem.fc.bias": np.ones(5)}
    path = write_image_net_pkl(tmp_path / "R-50.pkl", classifier)
    model = Model(block=True, masks=True)
    load_weights(model, path, training=True)
    expected = pickle.loads((tmp_path / "R-50.pkl").read_bytes())["model"]
    np.testing.assert_array_equal(model.backbone["stem"].weight.detach(), expected["stem.weight"])
    with pytest.raises(UserError, match="keys missing"):
        load_weights(Model(), path)


def test_image_net_weights_must_all_land_in_the_backbone(tmp_path: Path) -> None:
    path = write_image_net_pkl(tmp_path / "R-50.pkl", {"res9.conv.weight": np.ones(3)})
    with pytest.raises(UserError, match=r"1 keys unknown \(res9\.conv\.weight\)"):
        load_weights(Model(), path, training=True)


def test_weights_of_another_project_name_the_converter(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": {f"detr.{name}": torch.zeros(1) for name in ("a", "b")}}, path)
    with pytest.raises(UserError, match=r"tools/convert_checkpoint\.py"):
        PanopticCheckpointer(Model()).load(str(path), checkpointables=[])


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pth not found; see MODEL\.WEIGHTS"):
        load_weights(Model(), str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="is a folder"):
        load_weights(Model(), str(tmp_path))


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.pkl", "w.safetensors"])
def test_unreadable_file_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=rf"{name} cannot be read") as error:
        load_weights(Model(), str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_safetensors_are_loaded_and_compared(tmp_path: Path) -> None:
    path = str(tmp_path / "w.safetensors")
    source, target = Model(), Model()
    metadata = {"class_table": json.dumps(CATEGORIES), "settings": '{"INPUT.FORMAT": "RGB"}'}
    save_file(source.state_dict(), path, metadata=metadata)
    rgb = SettingsRecord(tiny_cfg(INPUT__FORMAT="RGB"))
    load_weights(target, path, settings=rgb, class_table=ClassTable.from_json(CATEGORIES))
    assert_loaded(target, source.state_dict())
    with pytest.raises(UserError, match="1 classes against 2"):
        load_weights(Model(), path, class_table=ClassTable.from_json(CATEGORIES[:1]))
    with pytest.raises(UserError, match=r"INPUT\.FORMAT is RGB for the file and BGR in the config"):
        load_weights(Model(), path, settings=SettingsRecord(tiny_cfg()))


def test_failed_save_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = PanopticCheckpointer(Model(), str(tmp_path))
    checkpointer.save("model_final")
    before = (tmp_path / "model_final.pth").read_bytes()

    def fail(content: Any, file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match="No space left"):
        checkpointer.save("model_final")
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert sorted(x.name for x in tmp_path.iterdir()) == ["last_checkpoint", "model_final.pth"]


def test_class_table_travels_with_the_checkpoint(tmp_path: Path) -> None:
    table = ClassTable.from_json(CATEGORIES)
    checkpointer = PanopticCheckpointer(Model(), str(tmp_path), class_table=table)
    checkpointer.save("w")
    assert read_class_table(str(tmp_path / "w.pth")) == table
    load_weights(Model(), str(tmp_path / "w.pth"), class_table=table)
    other = ClassTable.from_json([CATEGORIES[0], {**CATEGORIES[1], "name": "sand"}])
    with pytest.raises(UserError, match=r"class 1 is 'sand' against 'grass'.*--init-from .*w\.pth"):
        load_weights(Model(), str(tmp_path / "w.pth"), class_table=other)


def test_resuming_tolerates_no_absent_block(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(Model().parameters(), lr=1.0)
    PanopticCheckpointer(Model(), str(tmp_path), optimizer=optimizer).save("w")
    resumed = PanopticCheckpointer(
        Model(block=True), str(tmp_path), training=True, optimizer=optimizer
    )
    with pytest.raises(UserError, match="batchformer"):
        resumed.resume_or_load("", resume=True)


def test_resuming_another_optimizer_is_one_line(tmp_path: Path) -> None:
    model = Model()
    first = torch.optim.SGD(model.parameters(), lr=1.0)
    PanopticCheckpointer(model, str(tmp_path), optimizer=first).save("w")
    second = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=1.0)
    resumed = PanopticCheckpointer(model, str(tmp_path), optimizer=second)
    with pytest.raises(UserError, match="cannot resume from"):
        resumed.resume_or_load("", resume=True)
