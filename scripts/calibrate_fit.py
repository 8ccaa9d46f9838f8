"""Calibrate the fit by simulation: false minima on monotone and flat truths, power and interval coverage on valleys.

Writes one Markdown table to benchmarks/results/fit_calibration.md. A few minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sweeps.shape_test import ALPHA
from sweeps.simulate import (
    FLAT,
    GRIDS,
    MONOTONE,
    NOISE_SD,
    VALLEYS,
    Curve,
    accepted_as_interior,
    half_parabolas,
    interval_coverage,
    minimum_of,
    simulate,
)
from train.files import atomic_write

LAYOUTS = ((2, 6), (2, 7), (3, 7), (5, 8))  # seeds, values of rho
PAPER_GRID = np.array([0.40, 0.51, 0.60, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 1.0])
PAPER_VALLEY = half_parabolas(0.77, 0.0139 * (0.77 / 0.37) ** 2, 0.0139)  # rises by 0.0139 to rho = 1 and to rho = 0.40


def false_minima(curves: int, rng: np.random.Generator) -> Iterator[str]:
    """Share of monotone and flat truths accepted as an interior minimum."""
    yield f"## Accepted as an interior minimum without being one ({curves} sweeps a cell, size of the test {ALPHA})\n"
    yield f"Noise of one trial {NOISE_SD} nats; monotone truths differ by 0.1 nats between their ends.\n"
    columns = [f"{seeds} seeds, {arms} rho" for seeds in (2, 3, 5) for arms in GRIDS]
    yield "| truth | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1)
    for name, curve in {**MONOTONE, **FLAT}.items():
        shares = [
            accepted_as_interior(grid, simulate(curve, grid, seeds, curves, rng)).mean()
            for seeds in (2, 3, 5)
            for grid in GRIDS.values()
        ]
        yield f"| {name} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |"


def other_noise(curves: int, rng: np.random.Generator) -> Iterator[str]:
    """The same where the noise breaks the assumptions: heavy tails, or three times as large at one end."""
    yield "\n## The same with noise the test does not assume\n"
    yield "| truth | noise | 2 seeds, 6 rho | 3 seeds, 7 rho | 5 seeds, 8 rho |\n|---|---|---|---|---|"
    for name, curve in {**MONOTONE, **FLAT}.items():
        for kind in ("t with 3 degrees of freedom", "three times as large at rho = 1"):
            shares = []
            for seeds, arms in ((2, 6), (3, 7), (5, 8)):
                grid = GRIDS[arms]
                shape = (curves, arms, seeds)
                noise = rng.standard_t(3, shape) / np.sqrt(3) if kind.startswith("t ") else rng.standard_normal(shape)
                if not kind.startswith("t "):
                    noise[:, -1] *= 3
                shares.append(accepted_as_interior(grid, curve(grid)[None, :, None] + NOISE_SD * noise).mean())
            yield f"| {name} | {kind} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |"


def power_and_coverage(curves: int, rng: np.random.Generator) -> Iterator[str]:
    """How often a valley is seen, and how often the 90 % interval then holds its true minimum."""
    yield f"\n## Power, and coverage of the 90 % interval of rho* among the accepted ({curves} sweeps a row)\n"
    yield "The forms were chosen on the truths without a star; those with one were added afterwards, unseen.\n"
    yield "| truth | rho* | seeds | rho values | noise | accepted | covered | median width |\n|" + "---|" * 8
    for name, curve in VALLEYS.items():
        for seeds, arms in LAYOUTS:
            for sigma in (0.01, 0.015, 0.02):
                yield _row(name, curve, GRIDS[arms], seeds, sigma, curves, rng)
        # so little noise that the forms' own error decides
        yield _row(name, curve, GRIDS[8], 5, 0.005, curves, rng)
    for seeds in (2, 3, 5):
        for sigma in (0.001, 0.002):
            yield _row("paper's size: 0.0139", PAPER_VALLEY, PAPER_GRID, seeds, sigma, curves, rng)


def _row(
    name: str, curve: Curve, grid: np.ndarray, seeds: int, sigma: float, curves: int, rng: np.random.Generator
) -> str:
    found = interval_coverage(curve, grid, simulate(curve, grid, seeds, curves, rng, sigma))
    numbers = f"{100 * found['power']:.0f} % | {100 * found['coverage']:.0f} % | {found['width']:.2f}"
    return f"| {name} | {minimum_of(curve):.2f} | {seeds} | {len(grid)} | {sigma:g} | {numbers} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", type=int, default=5000, help="simulated sweeps per cell of the first tables")
    parser.add_argument("--fits", type=int, default=500, help="simulated sweeps per row of the last table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fit_calibration.md"))
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    lines = ["# Calibration of the fit\n", "Written by `python -m scripts.calibrate_fit`.\n"]
    for part in (false_minima(args.curves, rng), other_noise(args.curves, rng), power_and_coverage(args.fits, rng)):
        for line in part:
            print(line, flush=True)
            lines.append(line)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
