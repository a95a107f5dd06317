"""Training from a model of other classes loads everything except the class head."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchformer_panoptic.checkpoint import PanopticCheckpointer, SettingsRecord
from batchformer_panoptic.data.class_table import ClassTable
from batchformer_panoptic.errors import UserError
from helpers.small_checkpoint import (
    CATEGORIES,
    Model,
    assert_loaded,
    load_weights,
    resnet_cfg,
    save_weights,
    without_key,
)

OTHER_TABLE = ClassTable.from_json(
    [{**CATEGORIES[0], "name": "cube"}, CATEGORIES[1], {"id": 6, "name": "sky", "isthing": 0}]
)


def _start(model: nn.Module, path: str, **options: Any) -> None:
    PanopticCheckpointer(model, training=True, **options).load_for_other_classes(path)


def _is_of_classes(name: str) -> bool:
    return name.startswith(("box_head.class_embed", "semantic_head"))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_class_head_keeps_its_initial_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, classes: int, prefix: str
) -> None:
    source = Model(pixels=True, classes=2)
    weights = {prefix + name: value for name, value in source.state_dict().items()}
    path = save_weights(tmp_path / "w.pth", weights, class_table=CATEGORIES)
    target = Model(pixels=True, classes=classes)
    initial = {name: value.clone() for name, value in target.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        _start(target, path, class_table=OTHER_TABLE)
    for name, value in target.state_dict().items():
        expected = initial if _is_of_classes(name) else source.state_dict()
        assert torch.equal(value, expected[name]), name
    (line,) = [r.getMessage() for r in caplog.records if "--init-from" in r.getMessage()]
    assert all(name in line for name in initial if _is_of_classes(name))
    assert "box_head.bbox_embed" not in line
    assert "3 classes against 2; the first to differ is class 0, 'cube' against 'ball'" in line


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["ball", "grass"], "the classes are the same"),
        (["ball"], "1 classes against 2; the first to differ is class 1, 'grass' in one only"),
        (["ball", "sand"], "2 classes against 2; the first to differ is class 1, 'sand'"),
        (None, "the classes of .*w.pth are unknown"),
    ],
)
def test_log_compares_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str] | None, words: str
) -> None:
    table = CATEGORIES if names is not None else None
    path = save_weights(
        tmp_path / "w.pth", Model(), **({} if table is None else {"class_table": table})
    )
    mine = [{**CATEGORIES[i], "name": n} for i, n in enumerate(names or ["ball"])]
    with caplog.at_level(logging.WARNING):
        _start(Model(), path, class_table=ClassTable.from_json(mine))
    (line,) = [r.getMessage() for r in caplog.records if "--init-from" in r.getMessage()]
    assert re.search(words, line)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (lambda: Model(queries=7).state_dict(), r"MODEL\.DETR\.NUM_OBJECT_QUERIES 7"),
        (
            lambda: without_key(Model().state_dict(), "box_head.bbox_embed.bias"),
            r"1 keys missing \(box_head\.bbox_embed\.bias\)",
        ),
        (lambda: Model(masks=True).state_dict(), r"MODEL\.MASK_ON True"),
        (lambda: Model().backbone.state_dict(), "keys missing"),
        (
            lambda: {f"backbone.{k}": v for k, v in Model().backbone.state_dict().items()},
            "keys missing",
        ),
    ],
)
def test_the_rest_must_fit(
    tmp_path: Path, weights: Callable[[], dict[str, Tensor]], words: str
) -> None:
    path = save_weights(tmp_path / "w.pth", weights())
    with pytest.raises(UserError, match=words):
        _start(Model(classes=9), path)


def test_class_heads_of_single_layers_keep_their_initial_values(tmp_path: Path) -> None:
    source, target = Model(), Model(classes=9)
    for model in (source, target):
        model.box_head = nn.ModuleDict({"layers": nn.ModuleList([model.box_head])})
    _start(target, save_weights(tmp_path / "w.pth", source))
    body = {k: v for k, v in source.state_dict().items() if "class_embed" not in k}
    assert_loaded(target, body)


def test_starting_without_class_head_keeps_the_other_rules(tmp_path: Path) -> None:
    source, target = Model(), Model(block=True, masks=True, pixels=True, classes=5)
    _start(target, save_weights(tmp_path / "w.pth", source))
    body = {k: v for k, v in source.state_dict().items() if not _is_of_classes(k)}
    assert_loaded(target, body)


def test_starting_without_class_head_compares_settings_but_the_scoring(tmp_path: Path) -> None:
    settings = {"MODEL.DETR.SCORING": "focal", "INPUT.FORMAT": "RGB"}
    path = save_weights(tmp_path / "w.pth", Model(), settings=settings)
    _start(Model(), path, settings=SettingsRecord(resnet_cfg()))
    with pytest.raises(UserError, match=r"INPUT\.FORMAT") as error:
        _start(Model(), path, settings=SettingsRecord(resnet_cfg(INPUT__FORMAT="BGR")))
    assert "SCORING" not in str(error.value)


def test_remedy_for_other_classes_is_for_training_alone(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "w.pth", Model(classes=4))
    with pytest.raises(UserError, match=r"--init-from .*w\.pth"):
        load_weights(Model(), path, training=True)
    with pytest.raises(UserError) as error:
        load_weights(Model(), path)
    assert "--init-from" not in str(error.value)
