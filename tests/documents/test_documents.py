"""Links, file names, module paths and commands in the documents are valid."""

import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch

from helpers.commands import REPO_ROOT, documented_commands, load_script
from helpers.pennfudan_download import write_download

DOCUMENTS = sorted(
    p for folder in ("", "datasets", "docs") for p in (REPO_ROOT / folder).glob("*.md")
)
FENCE_OF_ANY_KIND = re.compile(r"```.*?```", re.S)

# Replacements that run the documented commands on less data.
SMALLER = {
    "--num-train 4000": "--num-train 12",
    "--num-val 200": "--num-val 4",
    "--num 12": "--num 2",
}
SHORT_TRAINING = "SOLVER.MAX_ITER 3 SOLVER.IMS_PER_BATCH 4 SOLVER.WARMUP_ITERS 0 TEST.EVAL_PERIOD 0"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_are_valid(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)]+)", text) + re.findall(r'src="([^"]+)"', text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_nothing_is_left_to_be_written(document):
    assert "TODO" not in document.read_text()


def anchors(document: Path) -> set[str]:
    """Anchors of the headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.+)$", FENCE_OF_ANY_KIND.sub("", document.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_new_module_paths_of_the_changelog_exist():
    text = (REPO_ROOT / "CHANGELOG.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 5
    for before, now in rows:
        first, *others = re.findall(r"`([\w.]+)`", now)
        parent = first.rpartition(".")[0]
        for path in [first, *(parent + other for other in others)]:
            assert pkgutil.resolve_name(path) is not None
        old_name = re.findall(r"`([\w.]+)`", before)[0]
        with pytest.raises((ImportError, AttributeError)):
            pkgutil.resolve_name(old_name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_named_files_exist(document):
    pattern = r"(?:configs|tools|demo|datasets)/[\w/]+\.(?:py|yaml)"
    for name in re.findall(pattern, document.read_text()):
        assert (REPO_ROOT / name).exists(), name


@pytest.mark.slow
def test_documented_commands_run_in_order(tmp_path, monkeypatch, capsys):
    for folder in ("configs", "demo", "tools"):
        (tmp_path / folder).symlink_to(REPO_ROOT / folder)
    monkeypatch.chdir(tmp_path)
    write_download(Path("PennFudanPed.zip"))
    lines = documented_commands(REPO_ROOT / "GETTING_STARTED.md")
    lines += documented_commands(REPO_ROOT / "datasets/README.md")
    assert len(lines) >= 9
    threads = torch.get_num_threads()
    for line in lines:
        for long, short in SMALLER.items():
            line = line.replace(long, short)
        script, *arguments = shlex.split(line)[1:]
        if script == "train_net.py" and "--eval-only" not in arguments:
            arguments += shlex.split(SHORT_TRAINING)
        if script == "datasets/prepare_shapes_panoptic.py" and Path("datasets").exists():
            arguments.append("--overwrite")
        assert load_script(script).main(arguments) == 0, (line, capsys.readouterr().err)
    torch.set_num_threads(threads)
    assert Path("output/quickstart/model_final.pth").exists()
    assert Path("output/with_block/model_final.pth").exists()
    assert len(list(Path("output/quickstart/pictures").glob("*"))) >= 2
    assert list(Path("output/quickstart/demo").glob("*"))
    assert len(list(Path("output/quickstart/predictions/overlays").glob("*"))) == 4
