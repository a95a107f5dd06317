"""The size that images, masks and class maps are padded to."""

from dataclasses import replace

import pytest
from torch.nn import functional as F

from batchformer_panoptic import PanopticDETR
from batchformer_panoptic.modeling import panoptic_detr
from batchformer_panoptic.modeling.set_prediction.mask_losses import pixel_class_loss
from helpers.tiny_model import random_inputs, tiny_model


@pytest.mark.parametrize(
    ("backbone", "transformer", "expected"), [(0, 0, 1), (32, 0, 32), (6, 4, 12)]
)
def test_padded_sizes_suit_all_parts(backbone, transformer, expected, monkeypatch):
    model = tiny_model()
    parts = ("backbone", "transformer", "mask_head", "box_head", "scoring")
    parts += ("matcher", "criterion", "inference_options")
    for part, divisibility in ((model.backbone, backbone), (model.transformer, transformer)):
        monkeypatch.setattr(type(part), "size_divisibility", divisibility, raising=False)
    again = PanopticDETR(
        **{name: getattr(model, name) for name in parts}, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3
    )
    height, width = again.preprocess(random_inputs([(37, 41)])).tensor.shape[-2:]
    assert height % expected == width % expected == 0
    assert height - 37 < expected
    assert width - 41 < expected


@pytest.mark.parametrize("resolution", ["target", "prediction"])
def test_masks_are_supervised_at_the_padded_size(resolution, monkeypatch):
    """Backbones with a size divisibility pad even a batch of one image."""
    model = tiny_model(MODEL__MASK_HEAD__LOSS_RESOLUTION=resolution).train()
    model.size_divisibility = 32
    (inputs,) = random_inputs([(40, 40)], [1])
    truth = F.pad(inputs["segment_map"].float() + 1, (0, 24, 0, 24))  # (64, 64)
    logits = F.interpolate(truth[None, None], size=(16, 16), mode="area")[0] * 40 - 20
    predict = model.predict

    def perfect(*args):
        return replace(predict(*args), masks=lambda _, __, query: logits[query * 0])

    monkeypatch.setattr(model, "predict", perfect)
    losses = model([inputs])
    assert losses["loss_dice"] < 0.1
    assert losses["loss_mask"] < 0.1


def test_class_maps_cover_the_padding_of_the_batch(monkeypatch):
    model = tiny_model(MODEL__SEMANTIC_AUX__ENABLED=True).train()
    model.size_divisibility = 32
    found = {}

    def recorded(logits, class_map, num_pixels):
        found["class_map"] = class_map
        return pixel_class_loss(logits, class_map, num_pixels)

    monkeypatch.setattr(panoptic_detr, "pixel_class_loss", recorded)
    model(random_inputs([(40, 40)]))
    assert found["class_map"].shape == (1, 64, 64)
    assert (found["class_map"][:, 40:] == -1).all()
    assert (found["class_map"][:, 2:40, :36] >= 0).all()
