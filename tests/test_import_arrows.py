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
    "modeling": {"data", "engine", "evaluation", "checkpoint", "visualization"},
    "data": {"modeling", "engine", "evaluation", "checkpoint", "visualization"},
    "evaluation": {"engine"},
    "checkpoint": {"engine"},
    "visualization": {"engine"},
    "deployment": {"engine", "evaluation", "visualization"},
    "config": {"modeling", "data", "engine", "evaluation", "checkpoint"},
    "errors": {"config", "modeling", "data", "engine", "evaluation", "checkpoint"},
}
# Parts that need torch only, besides the errors.
TORCH_ONLY = {"layers", "batchformer"}
# Parts of "modeling" that know neither a transformer nor a config.
INDEPENDENT = ("modeling.set_prediction", "modeling.postprocessing")


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


def forbidden_imports(module: str) -> Iterator[str]:
    """Yield one line for each import of a module that points the wrong way."""
    part = part_of(module)
    for name in imports_of(module):
        target = part_of(name)
        if target in FORBIDDEN.get(str(part), set()):
            yield f"{module} imports {name}: {part} must not depend on {target}"
        if part in TORCH_ONLY and target not in (part, "errors"):
            top = name.partition(".")[0]
            if target is not None or top not in {*sys.stdlib_module_names, "torch"}:
                yield f"{module} imports {name}: {part} needs torch only"
        if name.partition(".")[0] in COMMANDS:
            yield f"{module} imports the command {name}"
        # The names at the top of the package are loaded on demand and point back at these modules.
        if module != PACKAGE and target is not None and f"{PACKAGE}.{target}" not in MODULES:
            yield f"{module} imports {name} through the top of the package"
    if module.startswith(tuple(f"{PACKAGE}.{part}" for part in INDEPENDENT)):
        for name in reached_from(module):
            if name.startswith(f"{PACKAGE}.modeling.transformer") or name == f"{PACKAGE}.config":
                yield f"{module} reaches {name}"


def cycles() -> list[str]:
    """Return modules that reach themselves through their imports."""
    return sorted(module for module in MODULES if module in reached_from(module))


def test_imports_point_one_way() -> None:
    wrong = [line for module in sorted(MODULES) for line in forbidden_imports(module)]
    assert not wrong, "\n".join(wrong)


def test_no_module_reaches_itself() -> None:
    assert cycles() == []
