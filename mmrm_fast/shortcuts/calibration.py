"""How well margins are calibrated, and by what they are divided to be."""

import numpy as np
from scipy.optimize import minimize_scalar


def log_loss(margins: np.ndarray) -> float:
    """Mean of -log sigmoid(margin)."""
    return float(np.mean(np.logaddexp(0, -margins)))


def best_temperature(margins: np.ndarray) -> float:
    """What margins are divided by for the least log-loss, between 1/100 and 100."""
    found = minimize_scalar(lambda log_t: log_loss(margins / np.exp(log_t)), bounds=(-np.log(100), np.log(100)))
    return float(np.exp(found.x))
