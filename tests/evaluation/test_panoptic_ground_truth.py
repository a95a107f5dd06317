import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import Metadata, MetadataCatalog
from panopticapi.utils import id2rgb
from PIL import Image

from batchformer_panoptic.errors import UserError
from batchformer_panoptic.evaluation.panoptic_ground_truth import PanopticGroundTruth, read_id_map
from helpers.panoptic_sets import CATEGORIES, MAX_ID, random_set, registered


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_ids_survive_the_png(tmp_path, mode):
    id_map = np.array([[0, 1, 255, 256], [65535, 65536, MAX_ID - 1, MAX_ID]])
    path = tmp_path / "ids.png"
    image = Image.fromarray(id2rgb(id_map))
    if mode == "RGBA":
        image.putalpha(77)
    image.save(path)
    loaded = read_id_map(str(path))
    assert loaded.dtype == np.int32
    np.testing.assert_array_equal(loaded, id_map)


def test_unusable_pngs_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.png does not exist"):
        read_id_map(str(tmp_path / "gone.png"))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png is not a readable image"):
        read_id_map(str(tmp_path / "text.png"))
    Image.new("RGB", (300, 300), (1, 2, 3)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-60])
    with pytest.raises(UserError, match=r"cut\.png is not a readable image"):
        read_id_map(str(tmp_path / "cut.png"))
    Image.new("L", (3, 3)).save(tmp_path / "grey.png")
    with pytest.raises(UserError, match=r"grey\.png is an image of mode L"):
        read_id_map(str(tmp_path / "grey.png"))


def test_things_and_classes_come_from_the_json(tmp_path):
    truths, _ = random_set(0, num_images=2)
    with registered("truth_set", tmp_path / "truth", truths) as name:
        truth = PanopticGroundTruth(MetadataCatalog.get(name))
    assert truth.thing_ids == [3, 90, 201]
    assert truth.dataset_ids == {0: 3, 1: 7, 2: 90, 3: 200, 4: 201}
    assert list(truth.images) == [100, 101]
    np.testing.assert_array_equal(truth.read_id_map(truth.images[101]), truths[1].id_map)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not valid JSON"),
        ("[]", "no 'annotations' or 'categories'"),
        (json.dumps({"annotations": [{"id": 1}], "categories": []}), "is it the instances file"),
        (json.dumps({"annotations": [], "categories": CATEGORIES[1:]}), r"ids \[3\]"),
        (
            json.dumps(
                {
                    "annotations": [{"file_name": "7.png", "segments_info": [{"id": 1}]}],
                    "categories": CATEGORIES,
                }
            ),
            "annotation of image 7.png lacks 'category_id'",
        ),
        (
            json.dumps(
                {
                    "annotations": [{"image_id": 7, "file_name": "7.png", "segments_info": []}] * 2,
                    "categories": CATEGORIES,
                }
            ),
            "annotates image 7 more than once",
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
        with pytest.raises(UserError, match=rf"segment {segment_id} of image 000100.png .* 55"):
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
