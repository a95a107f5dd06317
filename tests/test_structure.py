"""Limits on the package's structure, and on words that plain engineering English does not use."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from helpers.commands import REPO_ROOT, load_script

MAX_FILES = 140
MAX_SHORT_FILES = 20
MAX_FILES_OF_A_STEP = 20

FOLDERS = ("projects", "tests", "tools", "demo", "datasets", "benchmarks", "docs", "configs")
SUFFIXES = {".py", ".md", ".yaml"}
# Word: its pattern.
BANNED = {
    "nobody": r"\bnobody\b",
    "whoever": r"\bwhoever\b",
    "lies in memory": r"\blies? in memory\b",
    # In the sense of "only": prose, not a variable of this name, and no idiom.
    "alone": r"(?<=\S )(?<!left )(?<!leave )(?<!let )alone\b(?! =)(?![(\[.]\w)",
}


@pytest.fixture(scope="module")
def structure() -> ModuleType:
    return load_script("tools/count_structure.py")


@pytest.fixture(scope="module")
def files_of_a_step(structure: ModuleType) -> list[str]:
    return structure.files_of_training_step()


def test_the_package_has_few_files(structure: ModuleType) -> None:
    counts = structure.count_files(structure.PACKAGE)
    assert len(counts.lines) <= MAX_FILES
    assert len(counts.short_files) <= MAX_SHORT_FILES, counts.short_files


def test_a_file_name_occurs_at_most_twice(structure: ModuleType) -> None:
    names = Counter(Path(path).name for path in structure.count_files(structure.PACKAGE).lines)
    del names["__init__.py"]
    assert {name: count for name, count in names.items() if count > 2} == {}


def test_a_training_step_enters_few_files(files_of_a_step: list[str]) -> None:
    assert "batchformer/batchformer.py" in files_of_a_step
    assert "modeling/panoptic_detr.py" in files_of_a_step
    assert len(files_of_a_step) <= MAX_FILES_OF_A_STEP, files_of_a_step


def test_contributing_states_the_measured_numbers(
    structure: ModuleType, files_of_a_step: list[str]
) -> None:
    counts = structure.count_files(structure.PACKAGE)
    text = (REPO_ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(r"(\d+) files.*?one training step.*?enters (\d+) of them", text, re.S)
    assert found is not None
    assert found.groups() == (str(len(counts.lines)), str(len(files_of_a_step)))


def test_files_are_counted(structure: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text('"""Text."""\n\n# A comment.\nx = 1  # not a line\n')
    (tmp_path / "long.py").write_text('"""\n# No comment.\n"""\n' + "y = 2\n" * structure.SHORT)
    counts = structure.count_files(tmp_path)
    assert counts.lines == {"short.py": 4, "long.py": structure.SHORT + 3}
    assert counts.short_files == ["short.py"]
    assert counts.comment_lines == 1
    assert counts.comment_share == 1 / (structure.SHORT + 7)


def test_only_files_with_a_called_function_are_entered(
    structure: ModuleType, tmp_path: Path
) -> None:
    functions = {}
    for name in ("called", "waiting"):
        path = tmp_path / f"{name}.py"
        exec(compile("def f():\n    return 1\n", str(path), "exec"), functions)
        functions[name] = functions.pop("f")
    with structure.entered_files(tmp_path) as entered:
        functions["called"]()
    functions["waiting"]()
    assert entered == {"called.py"}


def test_the_command_prints_every_count(
    structure: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert structure.main([]) == 0
    printed = capsys.readouterr().out
    for expected in ("package files:", "below 60 lines:", "median / max", "comment lines:"):
        assert expected in printed
    assert "entered by one training step" in printed


def texts() -> Iterator[tuple[Path, str]]:
    paths = [path for folder in FOLDERS for path in (REPO_ROOT / folder).rglob("*")]
    for path in [*paths, *REPO_ROOT.glob("*.md"), REPO_ROOT / "train_net.py"]:
        if path.suffix in SUFFIXES and path != Path(__file__).resolve():
            yield path, path.read_text(encoding="utf-8")


@pytest.mark.parametrize("word", BANNED)
def test_no_banned_words(word: str) -> None:
    found = [
        f"{path.relative_to(REPO_ROOT)}:{text.count(chr(10), 0, match.start()) + 1}"
        for path, text in texts()
        for match in re.finditer(BANNED[word], text, re.I)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "banned"),
    [
        ("needs torch alone", True),
        ("trains on it alone.", True),
        ("Whoever reads", True),
        ("tokens lie in memory", True),
        ("a stand-alone file is left alone", False),
        ("let alone two; leave alone", False),
        ("    alone = model([image])", False),
        ("assert alone.shape; test_alone()", False),
    ],
)
def test_idioms_are_told_from_banned_words(text: str, banned: bool) -> None:
    assert any(re.search(pattern, text, re.I) for pattern in BANNED.values()) == banned
