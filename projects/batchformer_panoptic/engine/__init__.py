"""Training and evaluation runs: set-up, trainer, training step, output."""

from .run import argument_parser, run
from .setup import load_config, setup_cfg
from .trainer import PanopticTrainer

__all__ = ["PanopticTrainer", "argument_parser", "load_config", "run", "setup_cfg"]
