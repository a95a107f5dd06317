"""From a command line to a checked, frozen config."""

import argparse
import logging
import os
import re
from collections.abc import Iterator, Sequence

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..batchformer.batchformer import TWO_STREAMS
from ..config import add_batchformer_panoptic_config
from ..data import setup_datasets
from ..errors import UserError, did_you_mean, one_line
from ..modeling.fast_inference import check_fast

logger = logging.getLogger(__name__)

_CHECKPOINTED_PARTS = ("backbone", "encoder", "decoder", "mask_head")


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Merge defaults, a YAML file and ``KEY VALUE`` pairs into an open (not frozen) config.

    Raises:
        UserError: a missing file, an unknown key (with the nearest known ones), a value of the
            wrong type, YAML that does not parse, a device that is not there, or an unknown model or
            backbone.
    """
    cfg = get_cfg()
    add_batchformer_panoptic_config(cfg)
    if config_file:
        _merge_file(cfg, config_file)
    _merge_options(cfg, opts)
    _check_device(cfg.MODEL.DEVICE)
    _check_names(cfg)
    return cfg


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    """Build the frozen config of a run and set up its logging, output folder and seed.

    Data sets are registered, what depends on them is filled in, and a negative ``SEED`` is
    replaced by a random one (logged, equal in all processes).

    Raises:
        UserError: see :func:`load_config` and ``setup_datasets``; settings that do not go together.
    """
    cfg = load_config(args.config_file, args.opts)
    _set_start(cfg, args)
    setup_datasets(cfg)
    _check_run(cfg, eval_only=args.eval_only)
    if cfg.SEED < 0:
        cfg.SEED = int(comm.shared_random_seed())
    cfg.freeze()
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be created: {error.strerror}"
        ) from None
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="batchformer_panoptic")
    default_setup(cfg, args)
    logger.info(f"SEED is {cfg.SEED}")
    return cfg


def _set_start(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Set ``MODEL.INIT_FROM``, which takes the place of ``MODEL.WEIGHTS`` of a config file.

    Both in one command are refused: ``config.yaml`` of a run that began with ``--init-from`` would
    else overrule the weights that a later command names.
    """
    if args.init_from and args.eval_only:
        raise UserError("--init-from starts a training; with --eval-only give MODEL.WEIGHTS")
    if args.init_from:
        cfg.MODEL.INIT_FROM = args.init_from
    given = dict(zip(args.opts[::2], args.opts[1::2], strict=True)).get("MODEL.WEIGHTS")
    if given and cfg.MODEL.INIT_FROM and not args.eval_only:
        raise UserError(
            f"a training starts from MODEL.WEIGHTS {given} or from --init-from "
            f"{cfg.MODEL.INIT_FROM}, not from both: leave one out, or add MODEL.INIT_FROM ''"
        )


def _merge_file(cfg: CfgNode, config_file: str) -> None:
    if not os.path.isfile(config_file):
        raise UserError(f"config file {config_file} does not exist")
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
    except KeyError as error:
        raise UserError(f"{config_file}: {_explain_key(cfg, error.args[0])}") from None
    except FileNotFoundError as error:
        raise UserError(f"{config_file}: its _BASE_ {error.filename} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = one_line(error)
        raise UserError(f"{config_file} is no readable YAML file: {reason}") from None
    except (AssertionError, ValueError) as error:
        raise UserError(f"{config_file}: {error}") from None
    except (TypeError, AttributeError):
        raise UserError(f"{config_file} is no mapping of config keys to values") from None


def _merge_options(cfg: CfgNode, opts: Sequence[str]) -> None:
    if len(opts) % 2:
        raise UserError(f"options come in pairs KEY VALUE; got {len(opts)} words: {' '.join(opts)}")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, KeyError, TypeError) as error:
            raise UserError(_explain_key(cfg, str(error.args[0]), key)) from None
        except (ValueError, SyntaxError) as error:
            raise UserError(f"bad value for {key}: {error}") from None


def _explain_key(cfg: CfgNode, message: str, key: str | None = None) -> str:
    """Say which config key does not exist and which ones are close."""
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
    except RuntimeError:
        raise UserError(f"unknown MODEL.DEVICE {name!r}; use cuda, cuda:1, ... or cpu") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"MODEL.DEVICE is {name!r}, but there is no CUDA here; use MODEL.DEVICE cpu"
        )


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
    if len(cfg.MODEL.BATCHFORMER.STREAM_WEIGHTS) != TWO_STREAMS.num_streams:
        raise UserError(
            "MODEL.BATCHFORMER.STREAM_WEIGHTS needs one weight per stream "
            f"{TWO_STREAMS.names}, not {cfg.MODEL.BATCHFORMER.STREAM_WEIGHTS}"
        )
    unknown = set(cfg.MODEL.ACTIVATION_CHECKPOINTING) - set(_CHECKPOINTED_PARTS)
    if unknown:
        raise UserError(
            f"MODEL.ACTIVATION_CHECKPOINTING names {sorted(unknown)[0]!r}; "
            f"known: {', '.join(_CHECKPOINTED_PARTS)}"
        )
    if cfg.SOLVER.GRADIENT_ACCUMULATION < 1:
        raise UserError(
            "SOLVER.GRADIENT_ACCUMULATION must be at least 1 batch, "
            f"not {cfg.SOLVER.GRADIENT_ACCUMULATION}"
        )
    if not 0 <= cfg.SOLVER.EMA_DECAY < 1:
        raise UserError(f"SOLVER.EMA_DECAY must be in [0, 1), not {cfg.SOLVER.EMA_DECAY}")
    if cfg.SOLVER.CHECKPOINT_PERIOD < 1:
        raise UserError(
            f"SOLVER.CHECKPOINT_PERIOD must be at least 1, not {cfg.SOLVER.CHECKPOINT_PERIOD}"
        )
    if cfg.MODEL.INIT_FROM and cfg.MODEL.MASK_HEAD.FREEZE_DETR and not eval_only:
        raise UserError(
            "MODEL.MASK_HEAD.FREEZE_DETR would freeze the class head that --init-from starts "
            "afresh: train it first, then the mask head from MODEL.WEIGHTS"
        )
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise UserError("TEST.PRECISE_BN.ENABLED is not supported; see SOLVER.EMA_DECAY")
    on_cpu = not cfg.MODEL.DEVICE.startswith("cuda")
    if comm.get_world_size() > 1 and on_cpu and torch.cuda.is_available():
        raise UserError(
            "several processes on the CPU of a machine with GPUs: hide these with "
            "CUDA_VISIBLE_DEVICES=''"
        )
