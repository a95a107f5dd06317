"""The report of a run: one HTML file that needs no other file, no script and no network.

It is made from what the run has written to its folder: ``metrics.json`` and the results of the
evaluation. The pictures of a panoptic evaluation are those of its ``examples``.
"""

import base64
import io
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import cv2
import matplotlib
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.figure import Figure

from ..config import classifies
from ..data.class_table import ClassTable
from ..data.images import ImageArray, read_image
from ..data.io import read_json, write_text
from ..data.segment_maps import read_segment_map
from ..evaluation.panoptic_evaluator import RESULTS_NAME as PANOPTIC_RESULTS
from ..evaluation.top_k import RESULTS_NAME as TOP_K_RESULTS
from .curves import METRICS_NAME, read_curves
from .drawing import automatic_scale, draw_scene, enlarge
from .scene import Region, Scene, Segment, SharedSegmentMap, scene_of_annotation

REPORT_NAME = "report.html"

_MAX_PICTURE_BYTES = 2_000_000  # of all pictures together, as text
_PICTURE_SIDE = 640  # pixels
_MAX_MATRIX = 15  # classes; with more, the most frequent confusions are listed
_MAX_LISTED = 20
_PACKAGES = ("torch", "torchvision", "detectron2", "sal-detectron2", "timm", "numpy", "Pillow")

_Results = Mapping[str, Mapping[str, Any]]
_Row = Sequence[object]


class Html(str):
    """Text that is HTML already. All other text is escaped before it becomes part of the report."""


class ExamplePictures(NamedTuple):
    """Truth and prediction of an example, drawn."""

    role: str  # "first", "worst" or "best"
    file_name: str
    pq: float | None  # 0 to 1
    truth: ImageArray
    prediction: ImageArray


def write_report(
    cfg: CfgNode, results: _Results | None, *, weights: str, trained: bool = True
) -> Path:
    """Write ``report.html`` to ``OUTPUT_DIR`` and return its path.

    Args:
        cfg: of the run.
        results: of the last evaluation, per data set of DATASETS.TEST and then per task, as
            Detectron2 returns them; None: there was none.
        weights: the file that was evaluated, for the heading.
        trained: whether to describe the training data, too.

    Raises:
        UserError: a file cannot be read or written.
    """
    folder = Path(cfg.OUTPUT_DIR)
    names = [*(cfg.DATASETS.TRAIN if trained else ()), *cfg.DATASETS.TEST]
    parts = [_heading(cfg, weights), _curves(folder / METRICS_NAME)]
    budget = _MAX_PICTURE_BYTES
    for name in cfg.DATASETS.TEST if results else ():
        assert results is not None
        parts.append(_evaluation(name, results[name], folder / "inference" / name, budget))
        budget -= len(parts[-1])
    parts += [_data(list(dict.fromkeys(names))), _setting(cfg)]
    title, body = escape(f"Report of {folder.name}"), "\n".join(filter(None, parts))
    write_text(folder / REPORT_NAME, _PAGE.substitute(title=title, body=body))
    return folder / REPORT_NAME


def has_examples(results: Mapping[str, Any], folder: Path) -> bool:
    """Whether the results are those of `PanopticEvaluator`, which has written to this folder."""
    return "panoptic_seg" in results and (folder / PANOPTIC_RESULTS).is_file()


def example_pictures(folder: Path, roles: Sequence[str]) -> Iterator[ExamplePictures]:
    """Draw the examples of a panoptic evaluation.

    Args:
        folder: ``OUTPUT_DIR/inference/<data set>``, where the evaluator has written them.
        roles: "first", "worst", "best": which of them, in this order.
    """
    content = read_json(folder / PANOPTIC_RESULTS)
    table = ClassTable.from_metadata(MetadataCatalog.get(content["dataset"]))
    wanted = [row for role in roles for row in content["examples"] if row["role"] == role]
    ids = {row["image_id"] for row in wanted}
    dataset_dicts = DatasetCatalog.get(content["dataset"])
    dicts = {d["image_id"]: d for d in dataset_dicts if d["image_id"] in ids}
    for row in wanted:
        dataset_dict = dicts[row["image_id"]]
        segment_map = SharedSegmentMap(read_segment_map(folder / row["png"]))
        height, width = segment_map.ids.shape
        # The run has read the image already, whatever its size.
        image = read_image(dataset_dict["file_name"], "RGB", max_pixels=None)
        image = enlarge(image, (height, width))
        predicted = [
            Region(
                table.contiguous_ids[info["category_id"]],
                Segment(segment_map, info["id"]),
                score=info.get("score"),
            )
            for info in row["segments_info"]
        ]
        scale = min(automatic_scale(image), _PICTURE_SIDE / max(image.shape[:2]))
        truth, prediction = (
            draw_scene(image, scene, table, scale=scale)
            for scene in (scene_of_annotation(dataset_dict), Scene(predicted, True))
        )
        name = Path(dataset_dict["file_name"]).name
        yield ExamplePictures(row["role"], name, row["pq"], truth, prediction)


# Sections.


def _heading(cfg: CfgNode, weights: str) -> str:
    model = cfg.MODEL.META_ARCHITECTURE
    if not classifies(cfg):
        model += f", transformer {cfg.MODEL.DETR.TRANSFORMER_NAME}"
    block = "with" if cfg.MODEL.BATCHFORMER.ENABLED else "without"
    about = (
        f"Model: {model}, {block} BatchFormerV2. Weights: {weights}. "
        f"Written on {datetime.now():%Y-%m-%d at %H:%M}."
    )
    return f"<h1>Report of {escape(Path(cfg.OUTPUT_DIR).name)}</h1>{_note(about)}"


def _curves(path: Path) -> str:
    """Charts of the metrics over the iterations; "" without a training."""
    if not path.is_file():
        return ""
    series = read_curves(path)
    quality = r"(.*/)?(PQ|PQ_th|PQ_st|AP|mIoU|top1|top5)"
    charts = [
        _chart(title, {name: series[name] for name in series if re.fullmatch(pattern, name)})
        for title, pattern in (
            ("Loss", r"(\w+/)?total_loss"),
            ("Quality, %", quality),
            ("Learning rate", "lr"),
        )
    ]
    return _section("Training", '<div class="charts">' + "".join(charts) + "</div>")


def _chart(title: str, series: Mapping[str, Mapping[int, float]]) -> str:
    """A line chart over iterations as inline SVG; "" without any point."""
    if not any(series.values()):
        return ""
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="iteration")
    for name, points in series.items():
        step = max(1, len(points) // 300)
        shown = sorted(points.items())[::-step][::-1]  # with the last point
        marker = "o" if len(shown) <= 20 else ""
        axes.plot(*zip(*shown, strict=True), label=name, marker=marker, markersize=3)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize="x-small", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    buffer = io.StringIO()
    # Text stays text; the title keeps the ids of several charts apart.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML needs no name spaces


def _evaluation(name: str, results: Mapping[str, Any], folder: Path, budget: int) -> str:
    cards = "".join(
        f'<div class="card"><b>{value:.1f}</b><span>{escape(_METRIC_NAMES[key])}</span></div>'
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if (key := f"{task}/{metric}") in _METRIC_NAMES and value == value  # not NaN
    )
    parts = [f'<div class="cards">{cards}</div>']
    if has_examples(results, folder):
        content = read_json(folder / PANOPTIC_RESULTS)
        colors = ClassTable.from_metadata(MetadataCatalog.get(name))
        parts += [
            _quality_per_class(content, colors),
            _errors(content),
            _confusion(content),
            _pictures(folder, budget),
        ]
    elif "classification" in results:
        parts.append(_accuracy_per_class(read_json(folder / TOP_K_RESULTS)))
    parts += [_ap_per_class(task, results[task]) for task in ("bbox", "segm") if task in results]
    return _section(f"Evaluation on {name}", "".join(parts))


def _quality_per_class(content: Mapping[str, Any], colors: ClassTable) -> str:
    color_of = dict(zip(colors.dataset_ids, colors.colors, strict=True))
    errors = _error_counts(content)
    rows: list[_Row] = []
    for row in content["per_class"]:
        key = row["category_id"]
        swatch = '<i style="background:rgb({},{},{})"></i>'.format(*color_of[key])
        kinds = [
            errors["missed", key, None],
            errors["invented", None, key],
            errors["poor_mask", key, key],
            sum(n for (kind, true, _), n in errors.items() if (kind, true) == ("confused", key)),
            sum(n for (kind, _, found), n in errors.items() if (kind, found) == ("confused", key)),
        ]
        rows.append(
            [
                Html(swatch + escape(row["name"])),
                "thing" if row["is_thing"] else "stuff",
                _bar(row["pq"]),
                _percent(row["sq"]),
                _percent(row["rq"]),
                *(row[count] for count in ("tp", "fp", "fn")),
                *kinds,
            ]
        )
    headers = ["class", "kind", "PQ", "SQ", "RQ", "TP", "FP", "FN", "missed", "invented"]
    headers += ["poor mask", "taken for another", "another taken for it"]
    note = (
        "PQ = SQ * RQ. SQ is the mean IoU of the matches (TP), RQ = TP / (TP + FP/2 + FN/2). "
        "FN = missed + poor mask + taken for another; FP = invented + poor mask + another taken "
        "for it."
    )
    return _titled("Quality per class, %", _table(headers, rows) + _note(note))


def _errors(content: Mapping[str, Any]) -> str:
    counts: Counter[str] = Counter()
    for (kind, _, _), number in _error_counts(content).items():
        counts[kind] += number
    # A pair is a false negative and a false positive.
    lost = {kind: counts[kind] * (1 if kind in ("missed", "invented") else 2) for kind in _KINDS}
    total = sum(lost.values())
    if not total:
        return _titled("Errors", _note("There are none."))
    rows: list[_Row] = []
    bar = ""
    for kind, (name, color, meaning) in _KINDS.items():
        share = 100 * lost[kind] / total
        swatch = f'<i style="background:{color}"></i>'
        rows.append([Html(swatch + name), counts[kind], lost[kind], f"{share:.1f} %", meaning])
        bar += f'<span style="width:{share:.2f}%;background:{color}"></span>'
    table = _table(["error", "count", "FP and FN in it", "share", "definition"], rows)
    return _titled("Which errors", f'<div class="stack">{bar}</div>{table}')


def _confusion(content: Mapping[str, Any]) -> str:
    """The matrix of few classes, or the most frequent pairs of many."""
    names = {row["category_id"]: row["name"] for row in content["per_class"]}
    pairs = {key: n for key, n in _error_counts(content).items() if key[0] == "confused"}
    title = "Confusion of classes"
    if len(names) > _MAX_MATRIX:
        frequent = sorted(pairs.items(), key=lambda item: -item[1])[:_MAX_LISTED]
        listed: list[_Row] = [[names[true], names[found], n] for (_, true, found), n in frequent]
        return _titled(title, _table(["true class", "predicted class", "segments"], listed))
    rows: list[_Row] = []
    for row in content["per_class"]:
        true = row["category_id"]
        cells = [
            row["tp"] if true == found else pairs.get(("confused", true, found), 0)
            for found in names
        ]
        cells.append(row["tp"] + row["fn"] - sum(cells))
        size = max(1, sum(cells))
        rows.append([row["name"], *(_shaded(n, n / size) for n in cells)])
    of_found = {
        found: row["fp"] - sum(n for (_, _, other), n in pairs.items() if other == found)
        for row in content["per_class"]
        for found in [row["category_id"]]
    }
    rows.append(["no true segment", *of_found.values(), ""])
    note = (
        "Rows are true segments, columns the class of the predicted segment with an IoU above 0.5. "
        "A row adds up to the true segments of its class, a column to its predicted segments."
    )
    headers = ["true \\ predicted", *names.values(), "no match"]
    return _titled(title, _table(headers, rows) + _note(note))


def _pictures(folder: Path, budget: int) -> str:
    figures = {"worst": "", "best": ""}
    for pictures in example_pictures(folder, list(figures)):
        pq = "n/a" if pictures.pq is None else f"{100 * pictures.pq:.1f}"
        images = "".join(
            f'<div><img alt="" src="data:image/jpeg;base64,{_jpeg(picture)}">{label}</div>'
            for label, picture in (("Truth", pictures.truth), ("Prediction", pictures.prediction))
        )
        caption = escape(f"{pictures.file_name}: PQ {pq}")
        figure = f"<figure><figcaption>{caption}</figcaption>{images}</figure>"
        budget -= len(figure)
        if budget < 0:
            break
        figures[pictures.role] += figure
    return "".join(
        _titled(f"{role.capitalize()} images", html) for role, html in figures.items() if html
    )


def _accuracy_per_class(content: Mapping[str, Any]) -> str:
    rows: list[_Row] = [
        [
            row["name"],
            _bar(row["num_top1"] / row["num_images"] if row["num_images"] else None),
            row["num_top1"],
            row["num_images"],
        ]
        for row in content["per_class"]
    ]
    return _titled("Accuracy per class, %", _table(["class", "top-1", "right", "images"], rows))


def _ap_per_class(task: str, metrics: Mapping[str, float]) -> str:
    rows: list[_Row] = [
        [name.removeprefix("AP-"), _bar(None if value != value else value / 100)]
        for name, value in metrics.items()
        if name.startswith("AP-")
    ]
    kind = {"bbox": "boxes", "segm": "masks"}[task]
    return _titled(f"AP of {kind} per class, %", _table(["class", "AP"], rows)) if rows else ""


def _data(names: Sequence[str]) -> str:
    """Images and annotations per class of each data set."""
    sizes: list[_Row] = []
    counts: dict[str, Counter[int]] = {}
    table = None
    for name in names:
        dicts = DatasetCatalog.get(name)
        table = ClassTable.from_metadata(MetadataCatalog.get(name))
        counts[name] = Counter(
            item["category_id"]
            for d in dicts
            for item in d.get("segments_info", d.get("annotations", ()))
        )
        counts[name].update(d["label"] for d in dicts if "label" in d)
        shapes = [(d["width"], d["height"]) for d in dicts if "width" in d and "height" in d]
        low, high = (f"{w} x {h}" for w, h in (min(shapes), max(shapes))) if shapes else ("", "")
        sizes.append([name, len(dicts), sum(counts[name].values()), low, high])
    if table is None:
        return ""
    headers = ["data set", "images", "annotations", "narrowest, pixels", "widest, pixels"]
    kinds = ["thing" if is_thing else "stuff" for is_thing in table.is_thing]
    rows: list[_Row] = [
        [class_name, kinds[index], *(counts[name][index] for name in names)]
        for index, class_name in enumerate(table.names)
    ]
    per_class = _table(["class", "kind", *names], rows)
    return _section("Data", _table(headers, sizes) + _titled("Annotations per class", per_class))


def _setting(cfg: CfgNode) -> str:
    rows: list[_Row] = [["seed", cfg.SEED], ["device", cfg.MODEL.DEVICE]]
    rows += [["Python", platform.python_version()], ["system", platform.platform()]]
    for package in _PACKAGES:
        try:
            rows.append([package, version(package)])
        except PackageNotFoundError:
            continue
    config = f"<details><summary>Configuration</summary><pre>{escape(cfg.dump())}</pre></details>"
    return _section("Setting", _table(["", "value"], rows) + config)


# Parts of sections.


def _error_counts(content: Mapping[str, Any]) -> Counter[tuple[str, int | None, int | None]]:
    return Counter(
        {
            (row["kind"], row["true_class"], row["predicted_class"]): row["count"]
            for row in content["errors"]
        }
    )


def _section(title: str, html: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{html}</section>"


def _titled(title: str, html: str) -> str:
    return f"<h3>{escape(title)}</h3>{html}"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _table(headers: Sequence[str], rows: Sequence[_Row]) -> str:
    """A table; columns of numbers are aligned to the right."""
    columns = zip(*rows, strict=True) if rows else [()] * len(headers)
    kinds = ["n" if all(map(_is_number, column)) else "t" for column in columns]
    head = "".join(
        f'<th class="{kind}">{escape(header)}</th>'
        for kind, header in zip(kinds, headers, strict=True)
    )
    lines = (
        "".join(
            f'<td class="{kind}">{_text(cell)}</td>' for kind, cell in zip(kinds, row, strict=True)
        )
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _text(value: object) -> str:
    return value if isinstance(value, Html) else escape(str(value))


def _is_number(value: object) -> bool:
    text = re.sub("<[^>]*>", "", value) if isinstance(value, Html) else str(value)
    return re.fullmatch(r"([\d.]+( %)?|n/a)?", text) is not None


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f}"


def _bar(value: float | None) -> Html:
    width = 0.0 if value is None else 100 * value
    return Html(f'<div class="bar" style="--w:{width:.1f}%">{_percent(value)}</div>')


def _shaded(number: int, share: float) -> Html:
    return Html(f'<div class="cell" style="--a:{share:.2f}">{number}</div>')


def _jpeg(picture: ImageArray) -> str:
    _, data = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return base64.b64encode(data.tobytes()).decode("ascii")


_METRIC_NAMES = {
    "panoptic_seg/PQ": "PQ",
    "panoptic_seg/SQ": "SQ",
    "panoptic_seg/RQ": "RQ",
    "panoptic_seg/PQ_th": "PQ of things",
    "panoptic_seg/PQ_st": "PQ of stuff",
    "sem_seg/mIoU": "mean IoU",
    "bbox/AP": "AP of boxes",
    "bbox/AP50": "AP50 of boxes",
    "segm/AP": "AP of masks",
    "segm/AP50": "AP50 of masks",
    "classification/top1": "top-1",
    "classification/top5": "top-5",
}

# Kind of error: name, colour, definition.
_KINDS = {
    "missed": ("missed", "#4c78a8", "A true segment that no other kind explains."),
    "invented": ("invented", "#f58518", "A predicted segment that no other kind explains."),
    "confused": (
        "confused class",
        "#e45756",
        "A true and a predicted segment with an IoU above 0.5, but of different classes.",
    ),
    "poor_mask": (
        "mask too poor",
        "#72b7b2",
        "A true and a predicted segment of the same class with an IoU from 0.1 to 0.5.",
    ),
}

_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .8rem; border-bottom: 2px solid #ddd; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
table { border-collapse: collapse; font-size: .87rem; }
th { font-weight: 600; background: #f4f4f4; vertical-align: bottom; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e5e5e5; }
.t { text-align: left; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
td:first-child { white-space: nowrap; }
td i { display: inline-block; width: .8em; height: .8em; margin-right: .5em; border-radius: 2px; }
.wide { overflow-x: auto; }
.note { color: #555; font-size: .87rem; margin: .5rem 0; }
.cards { display: flex; flex-wrap: wrap; gap: .6rem; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .5rem 1rem; min-width: 5.5rem; }
.card b { display: block; font-size: 1.5rem; }
.card span { color: #555; font-size: .8rem; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; }
.charts svg { width: 340px; height: auto; }
.bar { min-width: 7rem; text-align: right; background: linear-gradient(#bcd4ec, #bcd4ec)
  no-repeat left / var(--w) 100%; padding: 0 .3rem; }
.cell { text-align: right; background: rgb(76 120 168 / calc(var(--a) * .6)); padding: 0 .3rem; }
.stack { display: flex; height: 1.3rem; margin-bottom: .6rem; border-radius: 4px;
  overflow: hidden; }
figure { margin: 0 0 1rem; display: grid; grid-template-columns: 1fr 1fr; gap: 0 .6rem;
  max-width: 900px; color: #555; font-size: .82rem; break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; }
figcaption { grid-column: 1 / 3; overflow-wrap: anywhere; color: #222; font-weight: 600; }
pre { font-size: .78rem; background: #f7f7f7; padding: .8rem; overflow-x: auto; }
@media print { body { margin: 0; } * { print-color-adjust: exact; } }
</style></head><body>
$body
</body></html>
""")
