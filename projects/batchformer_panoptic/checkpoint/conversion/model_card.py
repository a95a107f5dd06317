"""The model card of an exported folder: a README.md in the format of the Hugging Face hub."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from detectron2.config import CfgNode

from ...data.class_table import ClassTable

_CITATION = """\
@article{hou2022batchformerv2,
  title={BatchFormerV2: Exploring Sample Relationships for Dense Representation Learning},
  author={Hou, Zhi and Yu, Baosheng and Wang, Chaoyue and Zhan, Yibing and Tao, Dacheng},
  journal={arXiv preprint arXiv:2204.01254},
  year={2022}
}"""
# Keys whose values a reader of the card needs to train the model again.
_SETTINGS = (
    *("MODEL.DETR.TRANSFORMER_NAME", "MODEL.BACKBONE.NAME", "MODEL.DETR.NUM_OBJECT_QUERIES"),
    *("MODEL.BATCHFORMER.ENABLED", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"),
    *("SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "SEED"),
)


def model_card(
    cfg: CfgNode,
    classes: ClassTable | None,
    evaluation: Mapping[str, Any] | None,
    *,
    class_name: str,
) -> str:
    """Describe a model: use, data, quality, classes, settings, citation.

    The licence is left to the owner of the model, since it depends on the training data.

    Args:
        cfg: the config of the training.
        classes: of the model, or None if they are not known.
        evaluation: the content of ``model_best.json``, or None.
        class_name: the class of transformers that loads the folder.
    """
    task = "image-segmentation" if cfg.MODEL.MASK_ON else "object-detection"
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n- detectron2\n"
        "- batchformer\n---",
        f"# {class_name}",
        f"Trained with batchformer-panoptic {version('batchformer-panoptic')} on Detectron2, and "
        "exported for transformers.",
        f'```python\nfrom transformers import pipeline\n\npipe = pipeline("{task}", "FOLDER")\n'
        'print(pipe("photo.jpg"))\n```',
        "**Licence:** not stated. It depends on the data and the initial weights: add `license:` "
        "at the top of this file.",
        "## Data\n\n"
        + _table(
            ("split", "data sets"),
            [
                ("training", ", ".join(cfg.DATASETS.TRAIN)),
                ("evaluation", ", ".join(cfg.DATASETS.TEST)),
            ],
        ),
        f"## Quality\n\n{_quality(evaluation)}",
        "## Settings\n\n"
        + _table(("key", "value"), [(f"`{key}`", _value(cfg, key)) for key in _SETTINGS]),
    ]
    if classes is not None:
        rows = [
            (i, name, "thing" if is_thing else "stuff")
            for i, (name, is_thing) in enumerate(zip(classes.names, classes.is_thing, strict=True))
        ]
        parts.append("## Classes\n\n" + _table(("id", "name", "kind"), rows))
    parts.append(f"## Citation\n\n```\n{_CITATION}\n```")
    return "\n\n".join(parts) + "\n"


def _quality(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "No evaluation is recorded beside the exported weights."
    metric = evaluation["metric"].rpartition("/")[2]
    rows = [("all classes", f"{evaluation['value']:.1f}")]
    rows += [(name, f"{value:.1f}") for name, value in evaluation.get("per_class", {}).items()]
    return (
        f"{metric} in percent after {evaluation['iteration']} steps, measured in training, where "
        "the panoptic inference of this project was used.\n\n" + _table(("class", metric), rows)
    )


def _value(cfg: CfgNode, key: str) -> Any:
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", r"\|").replace("\n", " ")
