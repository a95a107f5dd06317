"""The panoptic ground truth: categories, images, and errors of unusable annotations."""

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import Metadata, MetadataCatalog

from batchformer_panoptic.errors import UserError
from batchformer_panoptic.evaluation.panoptic_ground_truth import PanopticGroundTruth
from helpers.panoptic_sets import CATEGORIES, random_set, registered


def test_things_and_classes_come_from_the_json(tmp_path):
    truths, _ = random_set(0, num_images=2)
    with registered("truth_set", tmp_path / "truth", truths) as name:
        truth = PanopticGroundTruth(MetadataCatalog.get(name))
    assert truth.thing_ids == [3, 90, 201]
    assert truth.dataset_ids == {0: 3, 1: 7, 2: 90, 3: 200, 4: 201}
    assert list(truth.images) == [100, 101]
    np.testing.assert_array_equal(truth.read_segment_map(truth.images[101]), truths[1].segment_map)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not valid JSON"),
        ("[]", "holds a list, not COCO's JSON object"),
        (json.dumps({"annotations": []}), "no list 'categories'"),
        (
            json.dumps(
                {
                    "annotations": [{"id": 1, "image_id": 7, "file_name": "7.png"}],
                    "categories": CATEGORIES,
                }
            ),
            "7.png: annotation without a list 'segments_info'.* instances JSON",
        ),
        (json.dumps({"annotations": [], "categories": CATEGORIES[1:]}), r"ids \[3\]"),
        (
            json.dumps(
                {
                    "annotations": [
                        {"image_id": 7, "file_name": "7.png", "segments_info": [{"id": 1}]}
                    ],
                    "categories": CATEGORIES,
                }
            ),
            "7.png, segment 1: category_id None is not among the categories",
        ),
        (
            json.dumps(
                {
                    "annotations": [{"image_id": 7, "file_name": "7.png", "segments_info": []}] * 2,
                    "categories": CATEGORIES,
                }
            ),
            "2 annotations have the image_id 7",
        ),
    ],
)
def test_an_unusable_json_is_named(tmp_path, content, message):
    truths, _ = random_set(0, num_images=1)
    with registered("truth_set", tmp_path / "truth", truths) as name:
        metadata = MetadataCatalog.get(name)
        path = Path(metadata.panoptic_json)
        path.unlink()
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=rf"truth\.json.*{message}"):
            PanopticGroundTruth(metadata)


def test_an_unknown_category_names_segment_and_image(tmp_path):
    truths, _ = random_set(0, num_images=1)
    truths[0].segments_info[0]["category_id"] = 55
    with registered("truth_set", tmp_path / "truth", truths) as name:
        segment_id = truths[0].segments_info[0]["id"]
        with pytest.raises(UserError, match=rf"000100.png, segment {segment_id}: category_id 55"):
            PanopticGroundTruth(MetadataCatalog.get(name))


def test_separate_numbering_of_things_and_stuff_is_refused(tmp_path):
    truths, _ = random_set(0, num_images=1)
    with registered("truth_set", tmp_path / "truth", truths) as name:
        separate = Metadata(
            **{
                **MetadataCatalog.get(name).as_dict(),
                "thing_dataset_id_to_contiguous_id": {3: 0, 90: 1, 201: 2},
                "stuff_dataset_id_to_contiguous_id": {7: 1, 200: 2},
            }
        )
        with pytest.raises(UserError, match=r"class 1 is both 90 and 7; .* one id space"):
            PanopticGroundTruth(separate)
