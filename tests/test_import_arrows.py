"""Which part of the package may import which: dependencies point one way."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECTS = Path(__file__).resolve().parents[1] / "projects"
PACKAGE = "batchformer_panoptic"
SOURCES = sorted((PROJECTS / PACKAGE).rglob("*.py"))
COMMANDS = {"train_net", "tools", "demo", "datasets", "benchmarks", "tests", "conftest"}

# Part of the package -> parts it must not import.
FORBIDDEN = {
    "modeling": {"data", "engine", "evaluation", "solver", "checkpoint", "visualization"},
    "data": {"modeling", "engine", "evaluation", "solver", "checkpoint", "visualization"},
    "evaluation": {"engine"},
    "solver": {"engine"},
    "checkpoint": {"engine"},
    "visualization": {"engine"},
    "config": {"modeling", "data", "engine", "evaluation", "solver", "checkpoint"},
    "errors": {"config", "modeling", "data", "engine", "evaluation", "solver", "checkpoint"},
}
SET_PREDICTION = ["criterion", "matcher", "merge", "postprocessing", "segments"]


def module_name(path: Path) -> str:
    parts = path.relative_to(PROJECTS).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Yield absolute dotted names of everything that a module imports, at any depth of its code."""
    here = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            keep = len(here) - node.level + is_package if node.level else 0
            base = [*here[:keep], *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    return set(imports(path.read_text(), module, is_package=path.name == "__init__.py"))


def part_of(name: str) -> str | None:
    """Return the part ("modeling") a dotted name belongs to; None: not of this package."""
    head, _, tail = name.partition(".")
    return tail.partition(".")[0] if head == PACKAGE else None


def reached_from(module: str) -> set[str]:
    """Return the package's modules that a module imports, directly or through others."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imports_of(waiting.pop()):
            # `from .a import b`: b is a module, or a name in module a.
            found = name if name in MODULES else name.rpartition(".")[0]
            if found in MODULES and found not in seen:
                seen.add(found)
                waiting.append(found)
    return seen


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import a.b", "a.b"),
        ("from a import b as c", "a.b"),
        ("from . import x", "p.q.x"),
        ("from .m import x", "p.q.m.x"),
        ("from ..m import x", "p.m.x"),
        ("def f():\n    from ...other import x", "other.x"),
    ],
)
def test_imports_are_resolved(line: str, expected: str) -> None:
    assert list(imports(line, "p.q.r", is_package=False)) == [expected]


def test_imports_of_a_package_are_relative_to_itself() -> None:
    assert list(imports("from .m import x", "p.q", is_package=True)) == ["p.q.m.x"]


def test_the_walk_sees_the_package() -> None:
    parts = {part_of(module) for module in MODULES}
    assert {"layers", "batchformer", "modeling", "data", "engine", "config"} <= parts


@pytest.mark.parametrize("part", ["layers", "batchformer"])
def test_basic_parts_need_torch_alone(part: str) -> None:
    allowed = {*sys.stdlib_module_names, "torch"}
    for module in (name for name in MODULES if part_of(name) == part):
        strangers = {
            name
            for name in imports_of(module)
            if name.partition(".")[0] not in allowed and part_of(name) != part
        }
        assert not strangers, f"{module} imports {sorted(strangers)}"


@pytest.mark.parametrize("part", sorted(FORBIDDEN))
def test_parts_import_downwards(part: str) -> None:
    for module in (name for name in MODULES if part_of(name) == part):
        wrong = {name for name in imports_of(module) if part_of(name) in FORBIDDEN[part]}
        assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize("name", SET_PREDICTION)
def test_set_prediction_knows_no_transformer_and_no_config(name: str) -> None:
    reached = reached_from(f"{PACKAGE}.modeling.{name}")
    wrong = {
        module
        for module in reached
        if module.startswith((f"{PACKAGE}.modeling.transformer", f"{PACKAGE}.modeling.meta_arch"))
        or module == f"{PACKAGE}.config"
    }
    assert not wrong


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_package_imports_no_command(module: str) -> None:
    wrong = {name for name in imports_of(module) if name.partition(".")[0] in COMMANDS}
    assert not wrong


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name != PACKAGE))
def test_modules_do_not_import_through_the_top_of_the_package(module: str) -> None:
    # Its names are loaded on demand and point back at these modules.
    through_top = {
        name
        for name in imports_of(module)
        if part_of(name) is not None and f"{PACKAGE}.{part_of(name)}" not in MODULES
    }
    assert not through_top
