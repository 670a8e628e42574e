"""Logistic regressions on differences of features, cross-fitted: every fold is judged by one that never saw it.

A pair's margin is (features of chosen - features of rejected) . weights, without an intercept, so that the order in
which two responses are named does not matter. L2 is chosen by an inner fold, and by it margins are scaled to be
calibrated. The same bits on any number of threads.

Shapes: P pairs, F features, K folds.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.sparse import csr_matrix, issparse

from mmrm_fast.data.workers import idle_workers, in_order

FOLDS = 5
STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # variances of a weight under the prior: one over L2
WORTH_WORKERS = 1_000_000  # values; a fit of fewer is done before worker processes have started
USUAL = 0.1  # where there is nothing to choose by
CHOOSING_VALUES = 4_000_000  # of the pairs that L2 is chosen on
LEAST_PAIRS = 2  # that have a feature which is looked at

Matrix = csr_matrix | np.ndarray


@dataclass(frozen=True)
class Fitted:
    """Weights that give a response its score: of each fold's regression, fitted on the others, and of all pairs'."""

    weights_FK: np.ndarray  # float32 [F, K + 1], the last one's fitted on everything
    margins_P: np.ndarray  # of the pairs they were fitted on, each by its fold's

    @property
    def log_loss(self) -> float:
        """Cross-validated, NaN where there was no pair."""
        return log_loss(self.margins_P) if len(self.margins_P) else float("nan")


def cross_fit(differences_PF: Matrix, fold_P: np.ndarray) -> Fitted:
    """Fit a regression a fold, 0 to `FOLDS` - 1, and one on all pairs; the pairs of a record are in one fold."""
    kept = seen_columns(differences_PF)
    regressions = Regressions(differences_PF[:, kept], fold_P)
    num_workers = idle_workers() if regressions.signed_PF.size > WORTH_WORKERS else 0
    ranges = [range(fold, fold + 1) for fold in range(FOLDS + 1)]
    fits = list(in_order(regressions.fit, ranges, num_workers=num_workers, ahead=0))
    weights_FK = np.zeros((differences_PF.shape[1], FOLDS + 1), np.float32)
    weights_FK[kept] = np.stack(fits, axis=1)
    margins_PK = np.asarray(differences_PF @ weights_FK)
    margins_P = margins_PK[np.arange(len(fold_P)), fold_P].astype(float)
    return Fitted(weights_FK, margins_P)


def seen_columns(differences_PF: Matrix) -> np.ndarray:
    """The columns that `LEAST_PAIRS` pairs have."""
    if not issparse(differences_PF):
        return np.arange(differences_PF.shape[1])
    counts = np.bincount(differences_PF.indices, minlength=differences_PF.shape[1])
    return np.flatnonzero(counts >= LEAST_PAIRS)


class Regressions:
    """What one set of pairs is fitted with, fold by fold."""

    def __init__(self, differences_PF: Matrix, fold_P: np.ndarray):
        self.fold_P = fold_P
        self.label_P = np.where(np.arange(len(fold_P)) % 2, 1, -1)  # both classes, as a classifier wants them
        signs = self.label_P.astype(np.float32)[:, None]
        is_sparse = issparse(differences_PF)
        self.signed_PF = differences_PF.multiply(signs).tocsr() if is_sparse else differences_PF * signs
        values = self.signed_PF.nnz if is_sparse else self.signed_PF.size
        every = max(1, -(-values // CHOOSING_VALUES))
        self.choosing_P = np.arange(len(fold_P)) // 2 % every == 0

    def fit(self, fold: int) -> np.ndarray:
        """Calibrated weights [F] that are fitted without a fold, with the strength that the next fold chose."""
        from threadpoolctl import threadpool_limits

        inner, outside = (fold + 1) % (FOLDS + 1) % FOLDS, self.fold_P != fold
        judges = self.choosing_P & (self.fold_P == inner)
        with threadpool_limits(1):
            tried = list(self.tried(outside & self.choosing_P & (self.fold_P != inner), judges))
            _, strength, temperature = min(tried, default=(0.0, USUAL, 1.0))
            return self.weights(outside, strength) / temperature

    def tried(self, training_P: np.ndarray, judges_P: np.ndarray) -> Iterator[tuple[float, float, float]]:
        """(log-loss on the judges once calibrated, strength, temperature) of each strength."""
        if not judges_P.any():
            return
        judges_JF, label_J = self.signed_PF[judges_P], self.label_P[judges_P]
        for strength in STRENGTHS:
            margins = np.asarray(judges_JF @ self.weights(training_P, strength)) * label_J
            temperature = best_temperature(margins)
            yield log_loss(margins / temperature), strength, temperature

    def weights(self, training_P: np.ndarray, strength: float) -> np.ndarray:
        """Weights [F] float64 of a regression on some pairs; zeros where they are fewer than two."""
        from sklearn.exceptions import ConvergenceWarning  # a second to import, for what few commands do
        from sklearn.linear_model import LogisticRegression

        labels = self.label_P[training_P]
        if len(set(labels.tolist())) < 2:
            return np.zeros(self.signed_PF.shape[1])
        model = LogisticRegression(C=strength, fit_intercept=False, max_iter=300, tol=1e-4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(self.signed_PF[training_P], labels)
        return model.coef_[0].astype(float)


def log_loss(margins: np.ndarray) -> float:
    """Mean of -log sigmoid(margin)."""
    return float(np.mean(np.logaddexp(0, -margins)))


def best_temperature(margins: np.ndarray) -> float:
    """What margins are divided by for the least log-loss, between 1/100 and 100."""
    found = minimize_scalar(lambda log_t: log_loss(margins / np.exp(log_t)), bounds=(-np.log(100), np.log(100)))
    return float(np.exp(found.x))
