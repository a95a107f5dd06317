"""Run the package ``benchmarks``: ``python benchmarks/run.py NAME`` from any folder.

The benchmarks import this checkout's package, commands of ``tools`` and ``datasets``, and helpers
of ``tests``. The folders are passed in PYTHONPATH, so that spawned processes find the same modules.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", "projects", "datasets", "tests", "tools")


def main(argv: list[str] | None = None) -> int:
    folders = [str(ROOT / folder) for folder in FOLDERS]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks", *(sys.argv[1:] if argv is None else argv)]
    return subprocess.call(command, env={**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    sys.exit(main())
