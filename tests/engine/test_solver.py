"""Parameter groups, clipping and schedules."""

from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from batchformer_panoptic.config import add_batchformer_panoptic_config
from batchformer_panoptic.engine.solver import (
    build_gradient_clipper,
    build_lr_scheduler,
    build_optimizer,
)
from batchformer_panoptic.errors import UserError
from helpers.tiny_classifier import classifier_cfg
from helpers.tiny_model import tiny_cfg


def _cfg(*opts: Any) -> CfgNode:
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.merge_from_list(list(opts))
    return cfg


def _model() -> nn.Module:
    model = nn.Module()
    model.backbone = nn.Linear(3, 4)
    model.encoder = nn.ModuleDict({"batchformer": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    model.head = nn.Linear(4, 2)
    return model


def _hyperparameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple]:
    names = {p: name for name, p in model.named_parameters()}
    return {
        names[p]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_each_parameter_gets_its_learning_rate_and_decay() -> None:
    model = _model()
    cfg = _cfg("SOLVER.BASE_LR", 0.2, "SOLVER.WEIGHT_DECAY", 0.03, "SOLVER.WEIGHT_DECAY_NORM", 0.0)
    cfg.merge_from_list(["SOLVER.BACKBONE_MULTIPLIER", 0.5, "MODEL.BATCHFORMER.LR_FACTOR", 2.0])
    found = _hyperparameters(build_optimizer(cfg, model), model)
    assert found == {
        "backbone.weight": (0.1, 0.03),
        "backbone.bias": (0.1, 0.03),
        "encoder.batchformer.weight": (0.4, 0.03),
        "encoder.batchformer.bias": (0.4, 0.03),
        "encoder.norm.weight": (0.2, 0.0),
        "encoder.norm.bias": (0.2, 0.0),
        "head.weight": (0.2, 0.03),
        "head.bias": (0.2, 0.03),
    }


def test_offsets_and_reference_points_of_deformable_detr_learn_slowly() -> None:
    cfg = tiny_cfg(
        MODEL__DETR__TRANSFORMER_NAME="deformable",
        MODEL__BATCHFORMER__ENABLED=True,
        SOLVER__BASE_LR=0.2,
        SOLVER__BACKBONE_MULTIPLIER=0.5,
        MODEL__DEFORMABLE__LR_FACTOR=0.25,
    )
    model = build_model(cfg)
    found = _hyperparameters(build_optimizer(cfg, model), model)
    slow = {name for name, (lr, _) in found.items() if lr == 0.05}
    layers = [
        *(f"encoder.layers.{i}.self_attn.sampling_offsets" for i in range(2)),
        *(f"decoder.layers.{i}.cross_attn.sampling_offsets" for i in range(2)),
        "reference_points",
    ]
    assert slow == {f"transformer.{x}.{part}" for x in layers for part in ("weight", "bias")}
    halved = {name for name, (lr, _) in found.items() if lr == 0.1}
    assert halved == {name for name in found if name.startswith("backbone.")}
    assert {lr for lr, _ in found.values()} == {0.05, 0.1, 0.2}


def test_no_norm_decay_given_means_the_decay_of_the_rest() -> None:
    model = _model()
    cfg = _cfg("SOLVER.WEIGHT_DECAY_NORM", None, "SOLVER.WEIGHT_DECAY", 0.03)
    decays = {decay for _, decay in _hyperparameters(build_optimizer(cfg, model), model).values()}
    assert decays == {0.03}


def test_frozen_parameters_are_left_out() -> None:
    model = _model()
    model.backbone.requires_grad_(False)
    found = _hyperparameters(build_optimizer(_cfg(), model), model)
    assert not [name for name in found if "backbone" in name]
    model.requires_grad_(False)
    with pytest.raises(UserError, match="trainable"):
        build_optimizer(_cfg(), model)


@pytest.mark.parametrize(("name", "kind"), [("ADAMW", torch.optim.AdamW), ("SGD", torch.optim.SGD)])
def test_optimizer_by_name(name: str, kind: type) -> None:
    assert isinstance(build_optimizer(_cfg("SOLVER.OPTIMIZER", name), _model()), kind)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.OPTIMIZER", "ADAMX"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "everything"),
        ("SOLVER.BIAS_LR_FACTOR", 2.0),
    ],
)
def test_unknown_choices_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{key}.*{value}"):
        build_optimizer(_cfg(key, value), _model())


def _with_gradients(model: nn.Module) -> list[nn.Parameter]:
    parameters = list(model.parameters())
    for index, p in enumerate(parameters):
        generator = torch.Generator().manual_seed(index)
        p.grad = torch.randn(p.shape, generator=generator) * 3
    return parameters


def test_full_model_clipping_is_that_of_torch() -> None:
    cfg = _cfg("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.1)
    ours, theirs = _with_gradients(_model()), _with_gradients(_model())
    norm = build_gradient_clipper(cfg)(ours)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 0.1))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.grad, other.grad)
    total = torch.cat([p.grad.flatten() for p in ours]).norm()
    torch.testing.assert_close(total, torch.tensor(0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("clip_type", ["norm", "value"])
def test_other_clipping_happens_in_the_step_and_the_norm_is_measured_before(clip_type: str) -> None:
    cfg = _cfg(
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip_type, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.1
    )
    model = _model()
    parameters = _with_gradients(model)
    before = torch.cat([p.grad.flatten() for p in parameters])
    norm = build_gradient_clipper(cfg)(parameters)
    torch.testing.assert_close(norm, before.norm())
    assert torch.equal(torch.cat([p.grad.flatten() for p in parameters]), before)
    build_optimizer(cfg, model).step()
    largest = max(p.grad.abs().max().item() for p in parameters)
    assert largest <= 0.1 + 1e-6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("WarmupMultiStepLR", [1.0, 1.0, 0.1, 0.1]),
        ("WarmupCosineLR", [1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_schedule_without_warm_up(name: str, expected: list[float]) -> None:
    cfg = _cfg("SOLVER.LR_SCHEDULER_NAME", name, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (2,))
    cfg.merge_from_list(["SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", 1.0])
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(4):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(expected)


def test_unknown_schedule_is_refused() -> None:
    cfg = _cfg("SOLVER.LR_SCHEDULER_NAME", "Downhill")
    with pytest.raises(UserError, match="Downhill"):
        build_lr_scheduler(cfg, torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0))


def test_a_classifier_decays_as_deit_does() -> None:
    """Vectors and embeddings do not decay; the block learns half as fast."""
    cfg = classifier_cfg(MODEL__BATCHFORMER__ENABLED=True, MODEL__BATCHFORMER__LR_FACTOR=0.5)
    cfg.merge_from_list(["SOLVER.BASE_LR", 0.2, "SOLVER.WEIGHT_DECAY", 0.05])
    model = build_model(cfg)
    plain = _hyperparameters(build_optimizer(cfg, model), model)
    assert {decay for _, decay in plain.values()} == {0.05}
    for key in ("NORM", "BIAS", "EMBED"):
        cfg.SOLVER[f"WEIGHT_DECAY_{key}"] = 0.0
    found = _hyperparameters(build_optimizer(cfg, model), model)
    embeddings = {"vit.model.pos_embed", "vit.model.cls_token"}
    for name, parameter in model.named_parameters():
        decays = parameter.dim() > 1 and name not in embeddings
        rate = 0.1 if "batchformer" in name else 0.2
        assert found[name] == (rate, 0.05 if decays else 0.0), name
    assert embeddings <= found.keys()


def test_weight_decay_of_embedding_layers() -> None:
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.05, 0.0
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4))
    decays = {
        id(parameter): group["weight_decay"]
        for group in build_optimizer(cfg, model).param_groups
        for parameter in group["params"]
    }
    assert decays.pop(id(model[0].weight)) == 0.0
    assert set(decays.values()) == {0.05}
    assert len(decays) == 2
