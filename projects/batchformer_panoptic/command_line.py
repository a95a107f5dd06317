"""The command ``batchformer-panoptic``: each script of the checkout is one of its subcommands.

The scripts and configs stay where they are in a checkout; setup.py copies them into the package
that it builds, so that an installed package works without a checkout.
"""

import argparse
import ast
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

NAME = "batchformer-panoptic"
_PACKAGE = Path(__file__).resolve().parent
# The folder of train_net.py, configs, demo, tools and datasets.
ROOT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parents[1]

_DESCRIPTION = """\
{NAME} check-dataset ARGUMENTS stands for python tools/check_dataset.py ARGUMENTS,
and likewise for the other commands; {NAME} COMMAND --help explains one.

commands:
{commands}"""


class Script(NamedTuple):
    """A subcommand.

    Attributes:
        path: a file with a function ``main(argv)`` that returns the exit status.
        arguments: put before those of the user.
    """

    path: Path
    arguments: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The first line of its docstring, and the arguments."""
        docstring = ast.get_docstring(ast.parse(self.path.read_text(encoding="utf-8")))
        return " ".join([(docstring or "").partition("\n")[0], *self.arguments])


def scripts() -> dict[str, Script]:
    """Return the subcommands by name."""
    train = ROOT / "train_net.py"
    found = {"train": Script(train), "evaluate": Script(train, ("--eval-only",))}
    for folder in ("demo", "tools", "datasets"):
        for path in sorted((ROOT / folder).glob("*.py")):
            found[path.stem.replace("_", "-")] = Script(path)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: its name and its arguments; None: those of the process.

    Returns:
        The exit status of the subcommand.
    """
    words = sys.argv[1:] if argv is None else argv
    known = scripts()
    listed = "\n".join(f"  {name:<24}{script.summary}" for name, script in known.items())
    parser = argparse.ArgumentParser(
        prog=NAME,
        usage=f"{NAME} [-h] COMMAND [ARGUMENTS]",
        description=_DESCRIPTION.format(NAME=NAME, commands=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=known, metavar="COMMAND", help="one of those above")
    command = parser.parse_args(words[:1]).command
    script = known[command]
    spec = importlib.util.spec_from_file_location(script.path.stem, script.path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.path.stem] = module
    spec.loader.exec_module(module)
    sys.argv[0] = f"{NAME} {command}"  # for usage messages
    status: int = module.main([*script.arguments, *words[1:]])
    return status


if __name__ == "__main__":
    sys.exit(main())
