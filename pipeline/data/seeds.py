"""Every generator of random numbers in the process, seeded at once."""

import random

import numpy as np
import torch

from pipeline.data.philox import key_of


def seed_everything(*parts: object) -> None:
    low, high = key_of(*parts)
    torch.manual_seed(high << 32 | low)
    np.random.seed(low)
    random.seed(high << 32 | low)
