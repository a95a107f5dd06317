"""Training from a model of other classes loads everything except the rows of new classes."""

import logging
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
    [{**CATEGORIES[0], "name": "cube"}, {"id": 6, "name": "sky", "isthing": 0}, CATEGORIES[1]]
)


def _start(model: nn.Module, path: str, **options: Any) -> None:
    PanopticCheckpointer(model, training=True, **options).load_for_other_classes(path)


def _is_of_classes(name: str) -> bool:
    return name.startswith(("box_head.class_embed", "semantic_head"))


def _start_logged(
    model: nn.Module, path: str, caplog: pytest.LogCaptureFixture, **options: Any
) -> str:
    """Start from a file; return the one line about the class head."""
    with caplog.at_level(logging.INFO):
        _start(model, path, **options)
    (line,) = [r.getMessage() for r in caplog.records if "--init-from" in r.getMessage()]
    return line


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_rows_of_shared_classes_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str
) -> None:
    source, target = Model(pixels=True, classes=2), Model(pixels=True, classes=3)
    weights = {prefix + name: value for name, value in source.state_dict().items()}
    path = save_weights(tmp_path / "w.pth", weights, class_table=CATEGORIES)
    initial, theirs = _copy(target), source.state_dict()
    line = _start_logged(target, path, caplog, class_table=OTHER_TABLE)
    for name, value in target.state_dict().items():
        if _is_of_classes(name):
            rows = [*initial[name][:2], theirs[name][1]]
            rows += [theirs[name][2]] if name.startswith("box_head.") else []
            assert torch.equal(value, torch.stack(rows)), name
        else:
            assert torch.equal(value, theirs[name]), name
    assert line.endswith('class rows kept by name: grass, "no object"; new: cube, sky')


def test_focal_scoring_has_no_row_of_no_object(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The model adds one row to its classes: these have two and three.
    source, target = Model(classes=1), Model(classes=2)
    path = save_weights(tmp_path / "w.pth", source, class_table=CATEGORIES)
    initial, theirs = _copy(target), source.state_dict()
    line = _start_logged(target, path, caplog, class_table=OTHER_TABLE)
    for name in ("box_head.class_embed.weight", "box_head.class_embed.bias"):
        expected = torch.stack([*initial[name][:2], theirs[name][1]])
        assert torch.equal(target.state_dict()[name], expected), name
    assert line.endswith("class rows kept by name: grass; new: cube, sky")


def test_rows_of_another_scoring_are_not_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = Model(classes=1), Model(classes=3)  # focal, softmax
    path = save_weights(tmp_path / "w.pth", source, class_table=CATEGORIES)
    initial = _copy(target)
    line = _start_logged(target, path, caplog, class_table=OTHER_TABLE)
    assert_loaded(target, {k: v for k, v in initial.items() if _is_of_classes(k)})
    assert_loaded(target, {k: v for k, v in source.state_dict().items() if not _is_of_classes(k)})
    head = "box_head.class_embed.weight, box_head.class_embed.bias"
    assert line.endswith(f"grass; new: cube, sky; not loaded: {head}")


def test_without_a_class_table_the_class_head_keeps_its_initial_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = Model(classes=2)
    initial = _copy(target)
    path = save_weights(tmp_path / "w.pth", Model(classes=2))
    table = ClassTable.from_json(CATEGORIES)
    line = _start_logged(target, path, caplog, class_table=table)
    assert_loaded(target, {k: v for k, v in initial.items() if _is_of_classes(k)})
    assert "box_head.class_embed.weight, box_head.class_embed.bias" in line
    assert f"the classes of {path} are unknown" in line


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["Ball", "grass_merged"], 'Ball (ball), grass_merged (grass), "no object"; new: none'),
        (["cone"], 'kept by name: "no object"; new: cone'),
    ],
)
def test_log_names_the_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str], words: str
) -> None:
    path = save_weights(tmp_path / "w.pth", Model(), class_table=CATEGORIES)
    mine = [{**CATEGORIES[i], "name": name} for i, name in enumerate(names)]
    table = ClassTable.from_json(mine)
    line = _start_logged(Model(classes=len(names)), path, caplog, class_table=table)
    assert line.endswith(words)


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


def test_class_heads_of_single_layers_keep_rows_as_well(tmp_path: Path) -> None:
    source, target = Model(), Model(classes=3)
    for model in (source, target):
        model.box_head = nn.ModuleDict({"layers": nn.ModuleList([model.box_head])})
    initial, theirs = _copy(target), source.state_dict()
    path = save_weights(tmp_path / "w.pth", source, class_table=CATEGORIES)
    _start(target, path, class_table=OTHER_TABLE)
    name = "box_head.layers.0.class_embed.weight"
    rows = [*initial[name][:2], *theirs[name][1:]]
    assert torch.equal(target.state_dict()[name], torch.stack(rows))
    assert_loaded(target, {k: v for k, v in theirs.items() if "class_embed" not in k})


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
