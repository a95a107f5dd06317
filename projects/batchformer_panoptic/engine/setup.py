"""Command line to config: shared arguments, loading, checks, and the set-up of a run."""

import argparse
import logging
import os
import random
import re
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng

from ..command_line import ROOT
from ..config import add_batchformer_panoptic_config
from ..data import load_dataset_dicts, setup_datasets
from ..data.io import write_text
from ..errors import UserError, did_you_mean, one_line
from ..modeling.compiled import check_key
from ..modeling.fast_inference import check_fast
from ..modeling.precision import amp_dtype, set_tf32
from ..visualization.curves import METRICS_NAME
from ..visualization.report import REPORT_NAME
from .output_folder import hold, put_back, release, remove_temporaries, set_aside
from .ranges import check_values, warn_of_keys_without_effect
from .solver import apply_epochs
from .trackers import check_loggers
from .writers import start_logging

logger = logging.getLogger(__name__)

_ONE_NAME = re.compile(r"[^\s,()\[\]'\"]+")  # not a list or tuple
_CHECKPOINTED_PARTS = ("backbone", "encoder", "decoder", "mask_head")


# Arguments that the commands share.


def command_parser(
    description: str | None, *, config_of: str = "the model", config_required: bool = True
) -> ArgumentParser:
    """Return a parser with ``--config-file`` and ``--opts``, the arguments of `load_config`.

    Args:
        description: the docstring of the command, shown by ``--help`` with its line breaks.
        config_of: what the config describes, for the help text.
        config_required: False: without the argument, it is "", and all settings are options.
    """
    parser = ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        required=config_required,
        default="",
        metavar="FILE",
        help=f"YAML config of {config_of}; configs/... is also found where the package is",
    )
    add_opts_argument(parser)
    return parser


def add_opts_argument(parser: ArgumentParser) -> None:
    """Add ``--opts``, an argument of `load_config`."""
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="config changes, KEY VALUE ...; must come last",
    )


def add_threshold_argument(parser: ArgumentParser) -> None:
    """Add ``--confidence-threshold``, the argument of `configure_for_drawing`."""
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        metavar="T",
        help="draw what scores more than T, 0 to 1 (default: as in evaluation; boxes: 0.5)",
    )


def add_sample_arguments(parser: ArgumentParser, split: str) -> None:
    """Add the choice of images of a data set: ``--dataset``, ``--num``, ``--seed``, ``--output``.

    Args:
        parser: changed in place.
        split: "TRAIN" or "TEST", the DATASETS key with the default data set.
    """
    parser.add_argument("--dataset", metavar="NAME", help=f"default: first of DATASETS.{split}")
    parser.add_argument(
        "--num", type=at_least(1), default=12, metavar="N", help="number of images (default: 12)"
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="S", help="of random choices (default: 0)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")


def at_least(low: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number that is not below ``low``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} on")
        return int(text)

    return parse


def integer_between(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type: an integer from ``low`` to ``high``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {low} to {high}")
        return int(text)

    return parse


def choose_dataset(cfg: CfgNode, split: str, name: str | None) -> str:
    """Register the data sets of an open config and return the one that a command reads.

    Args:
        cfg: completed in place by `setup_datasets`.
        split: "TRAIN" or "TEST".
        name: from ``--dataset``, replaces ``DATASETS.<split>``; None: the first one named there.

    Raises:
        UserError: no data set is named, or one that does not exist.
    """
    if name:
        cfg.DATASETS[split] = (name,)
    if not cfg.DATASETS[split]:
        raise UserError(f"DATASETS.{split} is empty: name a data set with --dataset")
    setup_datasets(cfg)
    chosen: str = cfg.DATASETS[split][0]
    return chosen


def sample_images(dataset: str, num: int, seed: int) -> list[dict[str, Any]]:
    """Return dataset dicts of up to ``num`` images drawn with a seed, in the data set's order."""
    dataset_dicts = load_dataset_dicts([dataset], filter_empty=False)
    chosen = random.Random(seed).sample(range(len(dataset_dicts)), min(num, len(dataset_dicts)))
    return [dataset_dicts[index] for index in sorted(chosen)]


# Config of a run.


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Merge defaults, a YAML file and ``KEY VALUE`` pairs into an open (not frozen) config.

    Raises:
        UserError: a missing file, an unknown key (with the closest known ones), a value of the
            wrong type or outside its range, invalid YAML, an unavailable device, or an unknown
            model or backbone.
    """
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    if config_file:
        _merge_file(cfg, find_config(config_file))
    _merge_options(cfg, opts)
    _check_device(cfg.MODEL.DEVICE)
    _check_names(cfg)
    check_values(cfg)
    if comm.is_main_process():
        warn_of_keys_without_effect(cfg)
    return cfg


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    """Build the frozen config of a run and set up its logging, output folder and seed.

    Data sets are registered and the keys that depend on them are filled in, among them the schedule
    of a training with ``SOLVER.EPOCHS``. A negative ``SEED`` is
    replaced by a random one, which is logged and the same in all processes.

    Raises:
        UserError: see `load_config` and ``setup_datasets``; or settings that contradict each other.
    """
    args.config_file = find_config(args.config_file)  # Detectron2 logs its content
    cfg = load_config(args.config_file, args.opts)
    _set_start(cfg, args)
    setup_datasets(cfg)  # fills in NUM_CLASSES and THING_CLASS_IDS
    _check_run(cfg, eval_only=args.eval_only)
    schedule = ""
    if cfg.SOLVER.EPOCHS and not args.eval_only:
        images = load_dataset_dicts(
            cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
        schedule = apply_epochs(cfg, len(images), fixed=args.opts[::2])
    # Every process must have the same seed, since the data loader divides one permutation.
    if cfg.SEED < 0:
        cfg.SEED = int(comm.shared_random_seed())
    cfg.freeze()
    if comm.is_main_process():
        _prepare_output_dir(cfg, args)
    comm.synchronize()
    start_logging(cfg.OUTPUT_DIR, with_tables=args.eval_only)
    logger.debug(f"Environment:\n{collect_env_info()}")
    logger.debug(f"Arguments: {args}")
    logger.debug(f"Config:\n{cfg.dump()}")
    logger.info(f"environment, config, model and all results: {cfg.OUTPUT_DIR}/log.txt")
    logger.info(f"SEED is {cfg.SEED}")
    seed_all_rng(cfg.SEED + comm.get_rank())
    set_tf32(cfg)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not args.eval_only
    if schedule:
        logger.info(schedule)
    if not args.eval_only:
        _warn_about_warm_up(cfg)
    return cfg


# Files that a training leaves in OUTPUT_DIR, besides the folder of its evaluations.
_RUN_FILES = (
    "model_[0-9]*.pth",
    *("model_final.pth", "model_best.pth", "model_best.json", "model_nonfinite.pth"),
    *("last_checkpoint", METRICS_NAME, "events.out.tfevents.*", "log.txt*", REPORT_NAME),
    "*_run_id",
)
_CONFIG = "config.yaml"


def _prepare_output_dir(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Create and lock the folder, and write ``config.yaml``; set an earlier run aside if asked to.

    An evaluation leaves the ``config.yaml`` of a training as it is; a resumed training writes it
    when it is clear that it can be resumed.
    """
    folder = Path(cfg.OUTPUT_DIR)
    if args.overwrite and (args.resume or args.eval_only):
        raise UserError("--overwrite starts a training anew: leave out --resume and --eval-only")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        hold(folder)
        remove_temporaries(folder, (*_RUN_FILES, _CONFIG))
        _start_folder(folder, cfg, args)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {folder} cannot be used: {error.strerror}") from None
    except UserError:
        release(folder)
        raise


def _start_folder(folder: Path, cfg: CfgNode, args: argparse.Namespace) -> None:
    put_back(folder)  # after a kill between `set_aside` and the first step
    files = [path for pattern in _RUN_FILES for path in folder.glob(pattern)]
    # A training that has made a step has metrics; weights may also come from elsewhere.
    metrics = folder / METRICS_NAME
    is_used = (metrics.is_file() and metrics.stat().st_size > 0) or any(
        path.suffix == ".pth" for path in files
    )
    if is_used and not (args.overwrite or args.resume or args.eval_only):
        raise UserError(
            f"OUTPUT_DIR {folder} has an earlier run: continue it with --resume, delete it with "
            "--overwrite, or name another OUTPUT_DIR"
        )
    for weights in filter(None, (cfg.MODEL.WEIGHTS, cfg.MODEL.INIT_FROM)):
        if args.overwrite and Path(weights).resolve() in [path.resolve() for path in files]:
            raise UserError(
                f"--overwrite would delete {weights}, from which the training starts: name "
                "another OUTPUT_DIR"
            )
    if args.overwrite:
        others = [folder / _CONFIG, folder / "inference"]
        set_aside(folder, [*files, *(path for path in others if path.exists())])
    if not ((folder / _CONFIG).exists() if args.eval_only else args.resume):
        write_text(folder / _CONFIG, cfg.dump())


def _set_start(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Set ``MODEL.INIT_FROM``, which overrides ``MODEL.WEIGHTS`` of a config file.

    Both in one command are refused. Otherwise the ``config.yaml`` of a run that began with
    ``--init-from`` would override the weights given to a later command.
    """
    if args.init_from and args.eval_only:
        raise UserError("--init-from is for training; with --eval-only give MODEL.WEIGHTS")
    if args.init_from:
        cfg.MODEL.INIT_FROM = args.init_from
    given = dict(zip(args.opts[::2], args.opts[1::2], strict=True)).get("MODEL.WEIGHTS")
    if given and cfg.MODEL.INIT_FROM and not args.eval_only:
        raise UserError(
            f"training starts from MODEL.WEIGHTS {given} or from --init-from "
            f"{cfg.MODEL.INIT_FROM}, not from both: leave one out, or add MODEL.INIT_FROM ''"
        )


def find_config(config_file: str) -> str:
    """Return the path of a config: as given, or else relative to the checkout or the package."""
    if not os.path.isfile(config_file) and (ROOT / config_file).is_file():
        return str(ROOT / config_file)
    return config_file


def _merge_file(cfg: CfgNode, config_file: str) -> None:
    if not os.path.isfile(config_file):
        raise UserError(f"config file {config_file} does not exist")
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
    except KeyError as error:
        raise UserError(f"{config_file}: {_explain_key(cfg, error.args[0])}") from None
    except FileNotFoundError as error:
        raise UserError(
            f"{config_file}: its _BASE_ {error.filename} does not exist; the configs of this "
            f"project are in {ROOT / 'configs'}"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{config_file} is not a readable YAML file: {one_line(error)}") from None
    except (AssertionError, ValueError) as error:
        raise UserError(f"{config_file}: {one_line(error)}") from None
    except RecursionError:
        raise UserError(f"{config_file}: its _BASE_ files include each other") from None
    except (TypeError, AttributeError):  # yacs reads the attributes of a mapping
        raise UserError(f"{config_file} is not a mapping of config keys to values") from None


def _merge_options(cfg: CfgNode, opts: Sequence[str]) -> None:
    if len(opts) % 2:
        raise UserError(f"options are pairs KEY VALUE; got {len(opts)} words: {' '.join(opts)}")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        is_one_name = key in ("DATASETS.TRAIN", "DATASETS.TEST") and _ONE_NAME.fullmatch(value)
        try:
            cfg.merge_from_list([key, (value,) if is_one_name else value])
        except (AssertionError, KeyError, TypeError) as error:
            raise UserError(_explain_key(cfg, str(error.args[0]), key)) from None
        except (ValueError, SyntaxError) as error:
            raise UserError(f"bad value for {key}: {one_line(error)[:300]}") from None


def _explain_key(cfg: CfgNode, message: str, key: str | None = None) -> str:
    """Name the config key that does not exist, and the known keys close to it."""
    found = re.search(r"Non-existent (?:config )?key: (\S+)", message)
    if key is None and found is None:
        return message
    name = key if key is not None else found.group(1)  # type: ignore[union-attr]
    return f"unknown config key {name}{did_you_mean(name, list(_keys(cfg)))}"


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown MODEL.DEVICE {name!r}; use cuda, cuda:1, ... or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"MODEL.DEVICE is {name!r}, but CUDA is not available; use MODEL.DEVICE cpu"
        )
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"MODEL.DEVICE is {name!r}, but this machine has {gpus} GPUs, from cuda:0")


def _check_names(cfg: CfgNode) -> None:
    for key, name, registry in (
        ("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY),
    ):
        if name not in registry:
            raise UserError(f"unknown {key} {name!r}{did_you_mean(name, dict(registry))}")


def _check_run(cfg: CfgNode, *, eval_only: bool) -> None:
    split = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[split]:
        raise UserError(f"DATASETS.{split} is empty; name a data set")
    check_fast(cfg)
    amp_dtype(cfg)
    if cfg.SOLVER.COMPILE and not eval_only:
        check_key("SOLVER.COMPILE", cfg.MODEL.DEVICE)
    check_loggers(cfg.LOGGERS)
    unknown = set(cfg.MODEL.ACTIVATION_CHECKPOINTING) - set(_CHECKPOINTED_PARTS)
    if unknown:
        raise UserError(
            f"MODEL.ACTIVATION_CHECKPOINTING names {sorted(unknown)[0]!r}; "
            f"known: {', '.join(_CHECKPOINTED_PARTS)}"
        )
    if cfg.MODEL.INIT_FROM and cfg.MODEL.MASK_HEAD.FREEZE_DETR and not eval_only:
        raise UserError(
            "MODEL.MASK_HEAD.FREEZE_DETR would freeze the class head, whose rows of new classes "
            "--init-from leaves untrained: train it first, then the mask head from MODEL.WEIGHTS"
        )
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise UserError("TEST.PRECISE_BN.ENABLED is not supported; see SOLVER.EMA_DECAY")
    on_cpu = not cfg.MODEL.DEVICE.startswith("cuda")
    if comm.get_world_size() > 1 and on_cpu and torch.cuda.is_available():
        raise UserError(
            "several CPU processes on a machine with GPUs: hide the GPUs with "
            "CUDA_VISIBLE_DEVICES=''"
        )


def _warn_about_warm_up(cfg: CfgNode) -> None:
    steps, warm_up = cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS
    if steps < warm_up:
        logger.warning(
            f"SOLVER.MAX_ITER {steps} ends within the warm-up of {warm_up} iterations, so that the "
            f"learning rate stays below SOLVER.BASE_LR: set SOLVER.WARMUP_ITERS {steps // 10}"
        )
