"""Random weights of a full-size panoptic DETR in the names of facebookresearch/detr."""

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

NUM_CLASSES, NUM_QUERIES, WIDTH, HEADS = 250, 100, 256, 8


def official_weights() -> dict[str, Tensor]:
    """Random weights in the names of facebookresearch/detr, from PyTorch's own modules.

    Scaled so that no part saturates; statistics of the frozen batch norms are random, too.
    """
    resnet = torchvision.models.resnet50(norm_layer=FrozenBatchNorm2d)
    with torch.no_grad():
        for name, value in resnet.named_buffers():
            if name.endswith(("running_mean", "bias")):
                value.normal_(std=0.1)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            else:  # residual branches are small, or sixteen of them would add up to too much
                low, high = (0.2, 0.5) if ".bn3." in name else (0.6, 1.2)
                value.uniform_(low, high)
    layers = nn.Transformer(WIDTH, HEADS, 6, 6, 2048)
    detector = {
        **{f"backbone.0.body.{k}": v for k, v in resnet.state_dict().items() if "fc." not in k},
        # Post-norm encoders of DETR have no last norm.
        **{
            f"transformer.{k}": v
            for k, v in layers.state_dict().items()
            if not k.startswith("encoder.norm.")
        },
        "query_embed.weight": torch.randn(NUM_QUERIES, WIDTH),
        **prefixed("input_proj", nn.Conv2d(2048, WIDTH, 1)),
        **prefixed("class_embed", nn.Linear(WIDTH, NUM_CLASSES + 1)),
        **prefixed("bbox_embed.layers.0", nn.Linear(WIDTH, WIDTH)),
        **prefixed("bbox_embed.layers.1", nn.Linear(WIDTH, WIDTH)),
        **prefixed("bbox_embed.layers.2", nn.Linear(WIDTH, 4)),
    }
    mixed = WIDTH + HEADS
    widths = [mixed, mixed, 128, 64, 32, 16]
    mask_head = {
        **prefixed("bbox_attention.q_linear", nn.Linear(WIDTH, WIDTH)),
        **prefixed("bbox_attention.k_linear", nn.Linear(WIDTH, WIDTH)),
        **prefixed("mask_head.out_lay", nn.Conv2d(16, 1, 3)),
    }
    for i in range(5):
        mask_head |= prefixed(f"mask_head.lay{i + 1}", nn.Conv2d(widths[i], widths[i + 1], 3))
        mask_head |= prefixed(f"mask_head.gn{i + 1}", nn.GroupNorm(8, widths[i + 1]))
    for i, channels in enumerate((1024, 512, 256)):
        mask_head |= prefixed(f"mask_head.adapter{i + 1}", nn.Conv2d(channels, widths[i + 2], 1))
    state = {**{f"detr.{name}": value for name, value in detector.items()}, **mask_head}
    return {name: _telling(name, value) for name, value in state.items()}


def prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def _telling(name: str, value: Tensor) -> Tensor:
    """Initial values make all queries predict the same; these make queries and pixels differ."""
    if "backbone" in name:
        return value
    if value.dim() == 1:  # norms of ones and biases of zeros would hide that they were swapped
        return value + 0.1 * torch.randn_like(value)
    if name.endswith("in_proj_weight"):
        query_key, of_values = value.split([2 * WIDTH, WIDTH])
        return torch.cat([8 * query_key, of_values])
    if name == "mask_head.lay1.weight":
        of_image, of_attention = value.split([WIDTH, HEADS], dim=1)
        return torch.cat([of_image, 300 * of_attention], dim=1)
    gains = {
        "input_proj": 4,
        "multihead_attn.out_proj": 4,
        "bbox_attention": 6,
        "class_embed": 5,
        "bbox_embed.layers.2": 5,
        "mask_head.lay": 2,
    }
    return value * next((gain for part, gain in gains.items() if part in name), 1)
