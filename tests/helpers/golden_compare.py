"""Comparisons of a model with what a golden file records.

``slack`` multiplies a tolerance: a defect is far off when it is seen through a large slack.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchformer_panoptic import PanopticDETR
from batchformer_panoptic.modeling.heads import MaskHead
from batchformer_panoptic.modeling.panoptic_detr import ModelPredictions
from batchformer_panoptic.modeling.set_prediction.matcher import Matching
from batchformer_panoptic.modeling.set_prediction.targets import TargetBatch
from batchformer_panoptic.modeling.transformer import TransformerOutput
from batchformer_panoptic.modeling.transformer.detr import SingleScaleTransformer
from batchformer_panoptic.modeling.transformer.layers import padding_mask
from helpers.golden_files import features_of, image_targets, our_name, sizes_of

OUTPUTS = 1e-4  # absolute: outputs of a model and what it computes on the way
MASKS = 2e-4  # absolute: behind the group norms of the mask head
LOSSES = 1e-5  # relative; of 0.1 for smaller ones
GRADIENTS = 1e-4  # of the tensor's largest value
# The files were recorded on a CPU; a GPU adds up in another order.
SLACK_OF = {"cpu": 1.0, "cuda": 10.0}
# Gradients that are zero by construction hold rounding errors only: a share of the total norm.
ROUNDING = 5e-7


def assert_near(ours: Tensor | float, recorded: Tensor | float, atol: float, what: str) -> None:
    """Shapes are equal, and no value is further than ``atol`` from what was recorded."""
    ours, recorded = torch.as_tensor(ours).detach().cpu(), torch.as_tensor(recorded)
    assert ours.shape == recorded.shape, (
        f"{what} is not as recorded: shape {tuple(ours.shape)} instead of {tuple(recorded.shape)}"
    )
    distance = (ours.double() - recorded.double()).abs().max().item() if ours.numel() else 0.0
    assert distance <= atol, f"{what} is not as recorded: off by {distance:.3g}, allowed {atol:.3g}"


def assert_padding_and_positions(
    golden: dict[str, Any], transformer: SingleScaleTransformer
) -> None:
    """Padding masks of image and maps, and the position encoding of the map that is read."""
    inputs = golden["inputs"]
    sizes, padded = sizes_of(golden)
    for name, mask in [("pixel_mask", inputs["pixel_mask"]), *inputs["masks"].items()]:
        ours = padding_mask(sizes, padded, tuple(mask.shape[-2:]), mask.device)
        assert torch.equal(ours, mask), f"padding mask {name}"
    (in_feature,) = transformer.in_features
    assert in_feature in inputs["pos"]
    for name, pos in inputs["pos"].items():
        ours = transformer.position_encoding(inputs["masks"][name]).permute(0, 3, 1, 2)
        assert_near(ours, pos, OUTPUTS, f"position encoding of {name}")


def assert_outputs(
    predictions: ModelPredictions,
    recorded_outputs: Mapping[str, Any],
    *,
    slack: float = 1.0,
    last_only: bool = False,
) -> None:
    """Classes and boxes of the decoder layers; of the last layer only in evaluation."""
    layers = [*recorded_outputs.get("aux_outputs", ()), recorded_outputs]
    layers = layers[-1:] if last_only else layers
    for key, ours in (("pred_logits", predictions.logits), ("pred_boxes", predictions.boxes)):
        recorded = torch.stack([layer[key] for layer in layers])
        assert_near(ours, recorded, slack * OUTPUTS, key)


def assert_states(
    output: TransformerOutput, recorded: Mapping[str, Tensor], *, slack: float = 1.0
) -> None:
    """Query states ``hs`` and, of one scale, ``memory``: a map or (tokens, images, channels)."""
    if "hs" in recorded:
        assert_near(output.hidden_states, recorded["hs"], slack * OUTPUTS, "hs")
    ours, memory = output.memory_map, recorded.get("memory")
    if memory is None:
        return
    tokens = ours.flatten(2).permute(2, 0, 1)
    if memory.dim() == 4:
        assert_near(ours, memory, slack * OUTPUTS, "memory")
    elif memory.shape[:2] == tokens.shape[:2]:
        assert_near(tokens, memory, slack * OUTPUTS, "memory")


def assert_masks(
    model: PanopticDETR,
    golden: dict[str, Any],
    predictions: ModelPredictions,
    recorded: Tensor,
    attention_map: Tensor | None = None,
    *,
    slack: float = 1.0,
) -> None:
    """Masks (B', Q, h, w) of all queries, and the attention maps (B', Q, heads, H, W) below."""
    assert isinstance(model.mask_head, MaskHead)
    maps: list[Tensor] = []
    handle = model.mask_head.attention.register_forward_hook(lambda *call: maps.append(call[-1]))
    everything = torch.ones(recorded.shape[:2]).nonzero(as_tuple=True)
    masks = predictions.last_masks(*everything)
    handle.remove()
    if attention_map is not None:
        tolerance = slack * OUTPUTS * attention_map.max().item()  # they are far below 1
        assert_near(maps[0], attention_map.flatten(0, 1), tolerance, "bbox_attention_map")
    assert_near(masks, recorded.flatten(0, 1), slack * MASKS, "pred_masks")


def assert_matching(matching: Matching, recorded_indices: Mapping[str, Any]) -> None:
    """The same query for the same object, in every layer and image, and no pair besides."""
    layers = [*recorded_indices["aux"], recorded_indices["final"]]
    pairs = 0
    for layer, images in enumerate(layers):
        for image, (queries, objects) in enumerate(images):
            here = (matching.layer == layer) & (matching.image == image)
            ours = torch.stack([matching.query[here], matching.local_target[here]]).cpu()
            wanted = torch.stack([queries, objects])
            assert torch.equal(ours, wanted), f"indices of image {image} in layer {layer}"
            pairs += len(queries)
    assert len(matching.query) == pairs, "indices: pairs of no recorded layer or image"


def assert_losses_and_gradients(
    model: nn.Module,
    losses: Mapping[str, Tensor],
    recorded: Mapping[str, Any],
    weights: Mapping[str, float],
    our_name: Callable[[str], str],
    *,
    slack: float = 1.0,
) -> None:
    """Each loss, their total, and after ``backward`` the gradients.

    Args:
        model: that gave the losses; its gradients are None.
        losses: the losses of the model, weighted; with two streams one of each name for each.
        recorded: ``losses`` (not weighted), ``weighted_total``, ``grads`` and so on.
        weights: the weights of the recorded losses by name, ``weight_dict`` of the file.
        our_name: official name of a parameter -> its name in the model.
        slack: multiplies the tolerances.
    """
    sums: dict[str, Tensor] = {}
    for name, value in losses.items():
        loss = name.split("/")[0]
        sums[loss] = sums[loss] + value if loss in sums else value
    wanted = {name: value for name, value in recorded["losses"].items() if name in weights}
    assert set(sums) == set(wanted), f"losses {set(sums) ^ set(wanted)}"
    for name, value in wanted.items():
        tolerance = slack * LOSSES * max(abs(value), 0.1)
        assert_near(sums[name].double() / weights[name], value, tolerance, name)
    total = torch.stack(list(losses.values())).sum()
    tolerance = slack * LOSSES * abs(recorded["weighted_total"])
    assert_near(total, recorded["weighted_total"], tolerance, "weighted_total")
    total.backward()
    assert_gradients(model, recorded, our_name, slack=slack)


def assert_gradients(
    model: nn.Module,
    recorded: Mapping[str, Any],
    our_name: Callable[[str], str],
    *,
    slack: float = 1.0,
) -> None:
    """Recorded gradients, the norm of every parameter's gradient, and who has none."""
    parameters = dict(model.named_parameters())
    without = {name for name, p in parameters.items() if p.requires_grad and p.grad is None}
    assert without == {our_name(n) for n in recorded["params_without_grad"]}, "without gradient"
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    total = recorded["grad_total_norm"]
    for name, gradient in recorded.get("grads", {}).items():
        tolerance = slack * _tolerance(gradient.abs().max().item(), total)
        assert_near(gradients[our_name(name)], gradient, tolerance, f"gradient of {name}")
    norms = recorded.get("grad_norms", {})
    assert not norms or {our_name(name) for name in norms} == set(gradients), "names of gradients"
    for name, norm in norms.items():
        ours = gradients[our_name(name)].norm()
        assert_near(ours, norm, slack * _tolerance(norm, total), f"norm of the gradient of {name}")
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert_near(norm, total, slack * GRADIENTS * total, "grad_total_norm")


def _tolerance(largest: float, total: float) -> float:
    """Of a gradient whose largest value or norm is ``largest``; ``total`` is the norm of all."""
    return ROUNDING * total if largest <= ROUNDING * total else GRADIENTS * largest


def assert_training_step(
    model: PanopticDETR,
    golden: dict[str, Any],
    targets: Sequence[Mapping[str, Tensor]],
    recorded: Mapping[str, Any],
    name_in_model: Callable[[str], str] = our_name,
    *,
    slack: float = 1.0,
    metrics: Sequence[str] = (),
) -> ModelPredictions:
    """One step of training as recorded: outputs, matching, losses and gradients.

    Args:
        model: in training mode.
        golden: the file's inputs and config.
        targets: the targets of the images, once.
        recorded: the results; outputs and states are compared where they are recorded.
        name_in_model: official name of a parameter -> its name in the model.
        slack: multiplies the tolerances.
        metrics: names of recorded losses that are metrics here.

    Returns:
        What the model predicted.
    """
    device = next(model.parameters()).device
    slack *= SLACK_OF[device.type]
    features, objects = features_of(golden, device), image_targets(targets, device)
    predictions = model.predict(features, *sizes_of(golden))
    if "outputs" in recorded:
        assert_outputs(predictions, recorded["outputs"], slack=slack)
        assert_states(predictions.transformer, recorded["intermediates"], slack=slack)
    expanded = predictions.streams.expand_list(objects)
    assert sum(map(len, expanded)) == recorded["num_targets_used"], "num_targets_used"
    matching = model.matcher(predictions, TargetBatch(expanded))
    assert_matching(matching, recorded["indices"])
    losses = model.losses(predictions, features, objects)
    for name in metrics:
        assert_near(losses.metrics[name], recorded["losses"][name], 1e-4, name)
    weights = golden["config"]["weight_dict"]
    assert_losses_and_gradients(model, losses, recorded, weights, name_in_model, slack=slack)
    return predictions


def assert_evaluates_as_plain(
    model: PanopticDETR, plain: PanopticDETR, golden: dict[str, Any]
) -> ModelPredictions:
    """In evaluation the block does nothing: bit for bit the plain model, which is returned."""
    inputs = features_of(golden), *sizes_of(golden)
    ours, theirs = model.eval().predict(*inputs), plain.eval().predict(*inputs)
    assert torch.equal(ours.logits, theirs.logits), "evaluation: logits"
    assert torch.equal(ours.boxes, theirs.boxes), "evaluation: boxes"
    return ours
