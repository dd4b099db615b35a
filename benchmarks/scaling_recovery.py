"""What `byrote lab dlcm-scaling` recovers of a law that is known: made-up coefficients, ten draws of the noise.

    paper    the paper's runs: three sizes, R 2, 4, 8, P 30, 50, 70 %; eight lengths each
    wide     five sizes over two decades
    given    the same, with the three offsets fixed at their values

Predictions, best P at 3e8 parameters a token, exponents (true value, then least, median and greatest of the draws), and
how often a coefficient was marked as not determined.

    python benchmarks/scaling_recovery.py
"""

import itertools
import statistics

import numpy as np

from byrote.lab.studies.dlcm_scaling.data import Runs
from byrote.lab.studies.dlcm_scaling.fit import NAMES, fit_law
from byrote.lab.studies.dlcm_scaling.law import MADE_UP as LAW

PAPER, WIDE = (274e6, 468e6, 833e6), (3e7, 1e8, 3e8, 1e9, 3e9)
OFFSETS = {name: getattr(LAW, name) for name in ("t_token", "t_concept", "t_data")}
CASES = {  # sizes, noise, share of runs that are 10 % too high, fixed
    "paper": (PAPER, 3e-3, 0.0, {}),
    "paper, outliers": (PAPER, 3e-3, 0.1, {}),
    "wide": (WIDE, 3e-3, 0.0, {}),
    "given": (WIDE, 3e-3, 0.0, OFFSETS),
}
DRAWS, COST = 10, 3e8


def main() -> None:
    for name, (sizes, noise, outliers, fixed) in CASES.items():
        errors, shares, inside, fits = [], [], 0, []
        for seed in range(DRAWS):
            generator = np.random.default_rng(seed)
            points = itertools.product(sizes, (2, 4, 8), (0.3, 0.5, 0.7), np.geomspace(1e9, 2e11, 8))
            n, r, p, d = np.array(list(points), float).T
            clean = LAW.loss(n, d, r, p)
            loss = clean * np.exp(noise * generator.standard_normal(len(n)))
            loss[generator.random(len(n)) < outliers] *= 1.1
            fit = fit_law(Runs(n, d, r, p, loss), generator, fixed=fixed)
            fits.append(fit)
            errors.append(100 * np.abs(fit.predicted / clean - 1).max())
            for ratio in (2, 4, 8):
                true = LAW.best_share(COST, ratio)
                low, high = fit.interval(lambda law, ratio=ratio: law.best_share(COST, ratio))
                shares.append(abs(fit.law.best_share(COST, ratio) - true))
                inside += low <= true <= high
        print(f"{name}: largest error of a loss {statistics.median(errors):.2f} %, at worst {max(errors):.2f} %")
        print(f"  best P off by {statistics.median(shares):.3f}, at worst {max(shares):.3f}; ", end="")
        print(f"in its interval {inside} of {len(shares)} times")
        for exponent in ("delta_token", "delta_concept", "gamma", "alpha"):
            found = sorted(getattr(fit.law, exponent) for fit in fits)
            print(
                f"  {exponent} {getattr(LAW, exponent)}: {found[0]:.3f} {statistics.median(found):.3f} {found[-1]:.3f}"
            )
        marked = {coefficient: sum(coefficient in fit.undetermined for fit in fits) for coefficient in NAMES}
        print("  not determined:", ", ".join(f"{key} {count}" for key, count in marked.items() if count) or "none")


if __name__ == "__main__":
    main()
