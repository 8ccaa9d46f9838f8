"""How noisy is a sweep? Losses of arms at shared seeds, split into arm means, seed effects and a pooled residual.

Seeds are paired: one seed means the same data order and the same initial weights in every arm, so most of what a seed
changes is common to all arms. The additive two-way model takes that common part out and leaves the noise that matters
when arms are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from scipy import stats

LEVEL = 0.90  # confidence level of every interval, two-sided
RESIDUAL_FIT_PARAMETERS = 3  # parameters of the parabola whose residuals stand in for noise when there are no seeds


@dataclass(frozen=True)
class Point:
    """One finished trial: the validation loss (nats per token) that `seed` reached at `rho`.

    Attributes:
        rho: Share of the inactive parameters in routed experts, in [0, 1]; 1 is pure MoE.
        seed: Trials with equal seeds share data order and, where shapes agree, initial weights.
        loss: Validation loss in nats per token.
        kind: `arm`, or a control: `no_module`, `one_row`, ... (see `sweeps.gains`), or `lr`.
        lr_scale: Factor on the learning rate; 1 except for kind `lr`.
    """

    rho: float
    seed: int
    loss: float
    kind: str = "arm"
    lr_scale: float = 1.0


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided interval at level `LEVEL`."""

    estimate: float
    low: float
    high: float


class NoiseSource(str, Enum):
    """Where the noise estimate comes from."""

    seeds = "seeds"  # pooled residual of the two-way model
    residuals = "residuals"  # one loss per rho: residuals of the all-points parabola
    none = "none"  # neither is possible


@dataclass(frozen=True)
class Noise:
    """Standard deviation (nats) of one trial once its seed's common shift is taken out.

    Attributes:
        sigma: Pooled residual standard deviation; NaN without degrees of freedom.
        df: Its degrees of freedom: (R - 1)(S - 1) for R arms and S seeds without gaps, R - 3 for `residuals`.
        source: What was pooled.
        seed_sd: Standard deviation of the seeds' common shifts, which pairing removes; NaN with one seed.
        num_rho: R.
        num_seeds: S.
        missing: Number of (rho, seed) cells without a loss.
    """

    sigma: float
    df: int
    source: NoiseSource
    seed_sd: float
    num_rho: int
    num_seeds: int
    missing: int

    @property
    def t_quantile(self) -> float:
        """The factor on a standard error for a two-sided interval at `LEVEL`; infinite without degrees of freedom."""
        return float(stats.t.ppf(0.5 + LEVEL / 2, self.df)) if self.df > 0 else math.inf


@dataclass(frozen=True)
class TwoWay:
    """Least-squares fit of loss[i] = mean[arm i] + seed effect[seed i] + e[i], seed effects summing to zero.

    Attributes:
        labels: (R,) the arms, sorted.
        seeds: (S,) the seeds, sorted.
        means: (R,) adjusted arm means, nats.
        seed_effects: (S,) nats.
        unscaled_cov: (R, R); times sigma^2 it is the covariance of `means`, the seeds taken as given.
        estimator: (R, n); means = estimator @ losses.
        residual_maker: (n, n); residuals = residual_maker @ losses.
        counts: (R,) losses per arm.
        residual_ss: Sum of squared residuals, nats^2.
        df: n - R - S + 1 for a connected layout.
        connected: False when some arms share no seed, directly or through others: their difference is not estimable.
    """

    labels: tuple
    seeds: tuple[int, ...]
    means: np.ndarray
    seed_effects: np.ndarray
    unscaled_cov: np.ndarray
    estimator: np.ndarray
    residual_maker: np.ndarray
    counts: np.ndarray
    residual_ss: float
    df: int
    connected: bool


def two_way(cells: Sequence[tuple[object, int, float]]) -> TwoWay:
    """Fit the additive two-way model to (arm, seed, loss) cells; missing cells are allowed.

    Raises:
        ValueError: A cell occurs twice, or there is none.
    """
    if not cells:
        raise ValueError("cells=[]: at least one (arm, seed, loss) is needed; run the sweep before fitting it")
    cells = sorted(cells, key=lambda cell: cell[:2])
    keys = [(label, seed) for label, seed, _ in cells]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"(rho, seed)={twice} has more than one loss: keep one trial for each arm and seed")
    labels = tuple(sorted({label for label, _ in keys}))  # type: ignore[type-var]
    seeds = tuple(sorted({seed for _, seed in keys}))
    num_arms, num_seeds, n = len(labels), len(seeds), len(cells)
    losses = np.array([loss for _, _, loss in cells], dtype=np.float64)
    design = np.zeros((n, num_arms + num_seeds - 1))
    for i, (label, seed) in enumerate(keys):
        design[i, labels.index(label)] = 1.0
        column = seeds.index(seed)
        if column < num_seeds - 1:
            design[i, num_arms + column] = 1.0
        else:  # the last seed's effect is minus the sum of the others
            design[i, num_arms:] = -1.0
    rank = int(np.linalg.matrix_rank(design))
    pseudo_inverse = np.linalg.pinv(design)  # (R + S - 1, n)
    coefficients = pseudo_inverse @ losses
    residual_maker = np.eye(n) - design @ pseudo_inverse
    effects = coefficients[num_arms:]
    return TwoWay(
        labels=labels,
        seeds=seeds,
        means=coefficients[:num_arms],
        seed_effects=np.append(effects, -effects.sum()),
        unscaled_cov=(pseudo_inverse @ pseudo_inverse.T)[:num_arms, :num_arms],
        estimator=pseudo_inverse[:num_arms],
        residual_maker=residual_maker,
        counts=design[:, :num_arms].sum(axis=0),
        residual_ss=float(np.sum((residual_maker @ losses) ** 2)),
        df=n - rank,
        connected=rank == num_arms + num_seeds - 1,
    )


def polynomial_residual_maker(rho: np.ndarray, num_parameters: int = RESIDUAL_FIT_PARAMETERS) -> np.ndarray:
    """The (R, R) projection onto what a polynomial of `num_parameters` coefficients in rho (R,) leaves over."""
    basis = np.vander(rho - rho.mean(), num_parameters)
    return np.eye(len(rho)) - basis @ np.linalg.pinv(basis)


def estimate_noise(layout: TwoWay) -> Noise:
    """Noise sigma = sqrt(residual sum of squares / df), pooled over arms and seeds, or from a parabola's residuals.

    With one seed there is nothing to pool. The residuals of the parabola through all points then stand in, with
    R - 3 degrees of freedom; where the true curve is no parabola this overstates the noise.
    """
    num_arms, num_seeds = len(layout.labels), len(layout.seeds)
    missing = num_arms * num_seeds - int(layout.counts.sum())
    if num_seeds >= 2:
        sigma = math.sqrt(layout.residual_ss / layout.df) if layout.df > 0 else math.nan
        source = NoiseSource.seeds if layout.df > 0 else NoiseSource.none
        seed_sd = float(np.std(layout.seed_effects, ddof=1))
        return Noise(sigma, layout.df, source, seed_sd, num_arms, num_seeds, missing)
    df = max(num_arms - RESIDUAL_FIT_PARAMETERS, 0)
    if df == 0:
        return Noise(math.nan, 0, NoiseSource.none, math.nan, num_arms, num_seeds, missing)
    residuals = polynomial_residual_maker(np.array(layout.labels, dtype=np.float64)) @ layout.means
    sigma = math.sqrt(float(residuals @ residuals) / df)
    return Noise(sigma, df, NoiseSource.residuals, math.nan, num_arms, num_seeds, missing)
