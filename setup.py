"""Puts the commands and configs of the checkout into the built package; setup.cfg has the rest."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("train_net.py", "demo/*.py", "tools/*.py", "datasets/*.py", "configs/**/*.yaml")
# These work on the checkout itself.
LEFT_OUT = tuple(
    f"tools/{name}.py" for name in ("count_structure", "make_model_zoo", "setup_env", "study")
)


class BuildWithCommands(build_py):
    """Copies the files to the places, relative to the package, that they have in the checkout."""

    def run(self) -> None:
        """Build, and copy; an editable installation uses the checkout all the same."""
        super().run()
        package = Path(self.build_lib, "batchformer_panoptic")
        for path in sorted(path for pattern in SHIPPED for path in Path().glob(pattern)):
            if path.as_posix() not in LEFT_OUT:
                self.mkpath(str((package / path).parent))
                self.copy_file(str(path), str(package / path))


setup(cmdclass={"build_py": BuildWithCommands})
