"""What fits, what is refused, and with which words."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from batchformer_panoptic.checkpoint import PanopticCheckpointer, read_class_table
from batchformer_panoptic.data.categories import ClassTable
from batchformer_panoptic.errors import UserError

CATEGORIES = [
    {"id": 1, "name": "ball", "isthing": 1, "color": [1, 2, 3]},
    {"id": 5, "name": "grass", "isthing": 0, "color": [4, 5, 6]},
]


class Model(nn.Module):
    """The names of the real one with a few weights."""

    def __init__(self, *, block: bool = False, masks: bool = False, classes: int = 2) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"stem": nn.Linear(2, 3), "res2": nn.BatchNorm1d(3)})
        self.transformer = nn.ModuleDict({"layer": nn.Linear(3, 3)})
        if block:
            self.transformer["batchformer"] = nn.Linear(3, 3)
        self.box_head = nn.Linear(3, classes + 1)
        if masks:
            self.mask_head = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))


def _save(path: Path, model: nn.Module | dict[str, Any], **extra: Any) -> str:
    weights = model.state_dict() if isinstance(model, nn.Module) else model
    torch.save({"model": weights, **extra}, path)
    return str(path)


def _load(model: nn.Module, path: str, *, training: bool = False, **options: Any) -> None:
    checkpointer = PanopticCheckpointer(model, training=training, **options)
    checkpointer.resume_or_load(path, resume=False)


def _assert_loaded(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        if name in weights:
            assert torch.equal(value, weights[name]), name


def test_weights_that_fit_are_loaded(tmp_path: Path) -> None:
    source, target = Model(), Model()
    _load(target, _save(tmp_path / "w.pth", source))
    _assert_loaded(target, source.state_dict())


def test_bare_weights_are_loaded(tmp_path: Path) -> None:
    source, target = Model(), Model()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    _load(target, str(tmp_path / "w.pth"))
    _assert_loaded(target, source.state_dict())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("block", [False, True])
def test_block_may_be_absent_or_superfluous(tmp_path: Path, block: bool, training: bool) -> None:
    source, target = Model(block=block), Model(block=not block)
    _load(target, _save(tmp_path / "w.pth", source), training=training)
    _assert_loaded(target, source.state_dict())


def test_mask_head_may_be_absent_in_training_alone(tmp_path: Path) -> None:
    source, target = Model(), Model(masks=True)
    path = _save(tmp_path / "w.pth", source)
    with pytest.raises(UserError, match=r"4 keys missing \(mask_head.*MASK_ON False"):
        _load(target, path)
    _load(target, path, training=True)
    _assert_loaded(target, source.state_dict())


def _without_a_key(weights: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in weights.items() if k != key}


@pytest.mark.parametrize(
    ("weights", "target", "words"),
    [
        pytest.param(
            lambda: Model(classes=4).state_dict(),
            Model,
            r"2 shapes differ \(box_head\.weight \(5, 3\) instead of \(3, 3\).*NUM_CLASSES",
            id="number of classes",
        ),
        pytest.param(
            lambda: _without_a_key(Model().state_dict(), "transformer.layer.bias"),
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
            lambda: _without_a_key(Model(masks=True).state_dict(), "mask_head.0.bias"),
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
def test_misfit_is_refused(
    tmp_path: Path,
    weights: Callable[[], dict[str, Tensor]],
    target: Callable[[], nn.Module],
    words: str,
    training: bool,
) -> None:
    path = _save(tmp_path / "w.pth", weights())
    with pytest.raises(UserError, match=words) as error:
        _load(target(), path, training=training)
    assert "\n" not in str(error.value)


def _image_net_pkl(path: Path, extra: dict[str, np.ndarray]) -> str:
    weights = {k: v.numpy() for k, v in Model().backbone.state_dict().items()}
    weights = {k: v for k, v in weights.items() if "num_batches" not in k} | extra
    content = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    return str(path)


def test_image_net_weights_start_a_training(tmp_path: Path) -> None:
    classifier = {"stem.fc.weight": np.ones((5, 3)), "stem.fc.bias": np.ones(5)}
    path = _image_net_pkl(tmp_path / "R-50.pkl", classifier)
    model = Model(block=True, masks=True)
    _load(model, path, training=True)
    expected = pickle.loads((tmp_path / "R-50.pkl").read_bytes())["model"]
    np.testing.assert_array_equal(model.backbone["stem"].weight.detach(), expected["stem.weight"])
    with pytest.raises(UserError, match="keys missing"):
        _load(Model(), path)


def test_image_net_weights_must_all_land_in_the_backbone(tmp_path: Path) -> None:
    path = _image_net_pkl(tmp_path / "R-50.pkl", {"res9.conv.weight": np.ones(3)})
    with pytest.raises(UserError, match=r"1 keys unknown \(res9\.conv\.weight\)"):
        _load(Model(), path, training=True)


class Exploit:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_code_in_a_file_is_not_run(tmp_path: Path, suffix: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / f"w.{suffix}"
    content = {"model": {"w": Exploit(trace)}, "__author__": "x"}
    if suffix == "pth":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="cannot be read"):
        _load(Model(), str(path))
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "truncated"])
@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_damaged_file_is_one_line(tmp_path: Path, content: bytes | str, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    if isinstance(content, str):
        _save(path, Model())
        content = path.read_bytes()[:600]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"w\.p.* cannot be read") as error:
        _load(Model(), str(path))
    assert "\n" not in str(error.value)


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pth not found"):
        _load(Model(), str(tmp_path / "none.pth"))


def test_class_table_travels_with_the_checkpoint(tmp_path: Path) -> None:
    table = ClassTable.from_json(CATEGORIES)
    checkpointer = PanopticCheckpointer(Model(), str(tmp_path), class_table=table)
    checkpointer.save("w")
    assert read_class_table(str(tmp_path / "w.pth")) == table
    _load(Model(), str(tmp_path / "w.pth"), class_table=table)
    other = ClassTable.from_json([CATEGORIES[0], {**CATEGORIES[1], "name": "sand"}])
    with pytest.raises(UserError, match="class 1 is 'sand' against 'grass'"):
        _load(Model(), str(tmp_path / "w.pth"), class_table=other)


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
