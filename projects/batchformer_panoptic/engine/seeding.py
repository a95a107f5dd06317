"""Random numbers of a training iteration as a function of (seed, iteration, rank)."""

import random

import numpy as np
import torch


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Seed torch (all devices), numpy and random for one training iteration of one process.

    A generator state need not be saved: an iteration draws the same numbers whether the run came
    here in one go or was stopped and resumed, evaluated in between or not.

    Args:
        seed: of the run, at least 0, the same in all processes.
        iteration: counted from 0.
        rank: of the process, so that processes draw different numbers.
    """
    mixed = int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
