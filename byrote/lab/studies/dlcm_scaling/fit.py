"""Fit the scaling law of DLCM (Eq. 22, `law.Law`) to runs: a robust search from many starts.

Minimized, over the runs i, as Hoffmann et al. (2203.15556, section 3.3) do for their law:

    sum of huber(log L(N_i, D_i, R_i, P_i) - log loss_i)        huber(x) = x^2 / 2 for |x| <= delta, else
                                                                delta (|x| - delta / 2)

Coefficients are searched as logarithms, so that they stay positive, and a term by its value b at the runs' middle,

    b ((x + t) / (x_0 + t))^-exponent        x_0 the geometric mean of the runs' N (1 - P), N P or D; R^gamma likewise

because a itself moves by decades with its exponent. Given exponents and offsets, the law is linear in e0 and the b: a
start draws exponents and offsets, non-negative least squares gives the rest. Of `DRAWS` a start, the best are refined
by least squares, then with a delta that falls to its aim; the least sum wins.

How well the coefficients are known: the runs are drawn anew with replacement, the lines of one (N, R, P) together, and
the law is fitted to each draw from where the first fit ended. An interval is from the 2.5th to the 97.5th of 100.
A coefficient counts as determined if its interval lies within a factor of 2 of it, if the search did not end at a
bound, and if no change of coefficients that leaves the losses of all runs alone has a part in it.

Left out: weights of runs, offsets that vary by configuration, draws that find another minimum than the first fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
from scipy.optimize import least_squares, nnls

from byrote.lab.studies.dlcm_scaling.data import Runs
from byrote.lab.studies.dlcm_scaling.law import Law

NAMES = tuple(field.name for field in fields(Law))
SCALES = [NAMES.index(name) for name in ("a_token", "a_concept", "a_data")]
OFFSETS = [NAMES.index(name) for name in ("t_token", "t_concept", "t_data")]
EXPONENTS = [NAMES.index(name) for name in ("delta_token", "delta_concept", "alpha")]
GAMMA = NAMES.index("gamma")
DRAWS = 16
FACTOR = 2.0


@dataclass(frozen=True, eq=False)
class LawFit:
    """`samples`: the laws of the draws with replacement. `agreeing`: starts that ended within 1 % of the least sum."""

    runs: Runs
    law: Law
    samples: list[Law]
    fixed: dict[str, float]
    undetermined: set[str]
    starts: int
    agreeing: int

    @property
    def predicted(self) -> np.ndarray:
        return self.law.loss(self.runs.n, self.runs.d, self.runs.r, self.runs.p)

    @property
    def residuals(self) -> np.ndarray:
        """log loss less log prediction, [runs]."""
        return np.log(self.runs.loss) - np.log(self.predicted)

    @property
    def r2(self) -> float:
        spread = np.sum((self.runs.loss - self.runs.loss.mean()) ** 2)
        return float(1 - np.sum((self.runs.loss - self.predicted) ** 2) / spread)

    def interval(self, of: Callable[[Law], float]) -> tuple[float, float]:
        """95 % of what the samples say of a number."""
        low, high = np.percentile([of(law) for law in self.samples], (2.5, 97.5))
        return float(low), float(high)


def fit_law(
    runs: Runs,
    generator: np.random.Generator,
    *,
    fixed: Mapping[str, float] | None = None,
    delta: float = 1e-3,
    starts: int = 16,
    samples: int = 100,
) -> LawFit:
    """`fixed`: coefficients that are given; any but the three a. `delta`: where a residual begins to count linearly."""
    fixed = dict(fixed or {})
    _check(runs, fixed)
    if starts < 1 or samples < 2 or not delta > 0:
        raise ValueError(f"starts is {starts}, samples {samples}, delta {delta}; give at least 1, 2, and above 0")
    problem = _Problem(runs, fixed)
    drawn = sorted((problem.start(generator) for _ in range(DRAWS * starts)), key=lambda pair: pair[0])
    ends = [problem.solve(at, (np.inf, 10 * delta, delta)) for _, at in drawn[:starts]]
    cost, best = min(ends, key=lambda pair: pair[0])
    law = problem.law(best)
    groups = np.unique(np.stack([runs.n, runs.r, runs.p]), axis=1, return_inverse=True)[1].ravel()
    again = []
    for _ in range(samples):
        chosen = generator.integers(groups.max() + 1, size=groups.max() + 1)
        weight = np.bincount(chosen, minlength=groups.max() + 1)[groups].astype(float)
        again.append(problem.law(problem.solve(best, (delta,), weight)[1]))
    agreeing = sum(bool(other <= 1.01 * cost + 1e-20) for other, _ in ends)
    fit = LawFit(runs, law, again, fixed, problem.flat(best), starts, agreeing)
    for name in set(NAMES) - fixed.keys():
        value, (low, high) = getattr(law, name), fit.interval(lambda law, name=name: getattr(law, name))  # type: ignore[misc]
        if low * FACTOR < value or high > FACTOR * value:
            fit.undetermined.add(name)
    return fit


class _Problem:
    """Coordinates: logarithms of the free coefficients, with b in the place of a and t / x_0 in that of t."""

    def __init__(self, runs: Runs, fixed: Mapping[str, float]) -> None:
        raw = np.stack([runs.n * (1 - runs.p), runs.n * runs.p, runs.d])
        self.middle = np.exp(np.log(raw).mean(axis=1))  # x_0 [3]
        self.x = raw / self.middle[:, None]  # [3, runs]
        self.log_r0 = np.log(runs.r).mean()
        self.log_r = np.log(runs.r) - self.log_r0
        self.loss = runs.loss
        self.fixed = fixed
        self.given = np.array([fixed.get(name, np.nan) for name in NAMES])
        self.given[OFFSETS] /= self.middle
        self.free = np.flatnonzero(np.isnan(self.given))
        low, high = np.full(len(NAMES), 1e-5), np.full(len(NAMES), 4.0)
        low[0], high[0] = 1e-2 * runs.loss.min(), runs.loss.max()
        low[SCALES], high[SCALES] = 1e-5 * runs.loss.min(), 10 * runs.loss.max()
        low[OFFSETS], high[OFFSETS] = 1e-6, 10.0
        low[EXPONENTS] = 1e-2
        low[GAMMA] = 1e-3
        self.bounds = np.log(low[self.free]), np.log(high[self.free])

    def full(self, at: np.ndarray) -> np.ndarray:
        values = self.given.copy()
        values[self.free] = np.exp(at)
        return values

    def bases(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The terms for b = 1, and log((x + t) / (x_0 + t)), each [3, runs]."""
        offset = values[OFFSETS][:, None]
        distance = np.log(self.x + offset) - np.log1p(offset)
        terms = np.exp(-values[EXPONENTS][:, None] * distance)
        terms[1] *= np.exp(values[GAMMA] * self.log_r)
        return terms, distance

    def residuals(self, at: np.ndarray) -> np.ndarray:
        values = self.full(at)
        terms, _ = self.bases(values)
        return np.log(values[0] + values[SCALES] @ terms) - np.log(self.loss)

    def jacobian(self, at: np.ndarray) -> np.ndarray:
        """[runs, free]"""
        values = self.full(at)
        terms, distance = self.bases(values)
        terms = values[SCALES][:, None] * terms
        offset, exponent = values[OFFSETS][:, None], values[EXPONENTS][:, None]
        slopes = np.empty((len(NAMES), len(self.loss)))
        slopes[0] = values[0]
        slopes[SCALES] = terms
        slopes[OFFSETS] = -terms * exponent * offset * (1 / (self.x + offset) - 1 / (1 + offset))
        slopes[EXPONENTS] = -terms * exponent * distance
        slopes[GAMMA] = terms[1] * values[GAMMA] * self.log_r
        return (slopes / (values[0] + terms.sum(axis=0)))[self.free].T

    def start(self, generator: np.random.Generator) -> tuple[float, np.ndarray]:
        """(how far off, where)"""
        values = np.ones(len(NAMES))
        values[EXPONENTS] = np.exp(generator.uniform(np.log(0.05), np.log(1.5), 3))
        values[GAMMA] = np.exp(generator.uniform(np.log(0.02), 0))
        values[OFFSETS] = np.exp(generator.uniform(np.log(1e-3), 0, 3))
        values = np.where(np.isnan(self.given), values, self.given)
        terms, _ = self.bases(values)
        linear, columns = [0, *SCALES], np.stack([np.ones_like(self.loss), *terms])
        if not np.isnan(self.given[0]):
            linear, columns = SCALES, terms
        rest = self.loss - (0.0 if linear[0] == 0 else values[0])
        found, off = nnls((columns / self.loss).T, rest / self.loss)
        values[linear] = np.maximum(found, 1e-3 * self.loss.mean())
        return off, np.clip(np.log(values[self.free]), *self.bounds)

    def solve(
        self, at: np.ndarray, deltas: tuple[float, ...], weight: np.ndarray | None = None
    ) -> tuple[float, np.ndarray]:
        """(the sum at the last delta, where); `weight` [runs]: how often each run is there."""
        repeat = np.arange(len(self.loss)) if weight is None else np.repeat(np.arange(len(weight)), weight.astype(int))
        cost, slack = 0.0, 1e-9  # a start must lie inside the bounds
        for delta in deltas:
            robust = {"loss": "huber", "f_scale": delta} if np.isfinite(delta) else {}
            found = least_squares(
                lambda z: self.residuals(z)[repeat],
                at,
                jac=lambda z: self.jacobian(z)[repeat],
                bounds=(self.bounds[0] - slack, self.bounds[1] + slack),
                x_scale="jac",
                max_nfev=300,
                **robust,
            )
            cost, at = found.cost, np.clip(found.x, *self.bounds)
        return cost, at

    def law(self, at: np.ndarray) -> Law:
        values = self.full(at)
        scales = values[SCALES] * (self.middle * (1 + values[OFFSETS])) ** values[EXPONENTS]
        scales[1] *= np.exp(-values[GAMMA] * self.log_r0)
        values[SCALES] = scales
        values[OFFSETS] *= self.middle
        return Law(**{**dict(zip(NAMES, values.tolist(), strict=True)), **self.fixed})

    def flat(self, at: np.ndarray) -> set[str]:
        """Coefficients at a bound, or with a part in a direction in which no residual moves."""
        near = (at - self.bounds[0] < 1e-3) | (self.bounds[1] - at < 1e-3)
        _, sizes, directions = np.linalg.svd(self.jacobian(at), full_matrices=False)
        silent = np.abs(directions[sizes < 1e-9 * sizes[0]]).max(axis=0, initial=0.0) > 0.1
        names = {NAMES[i] for i in self.free[near | silent]}
        # a follows from b, the offset and the exponent of its term.
        for scale, offset, exponent in zip(SCALES, OFFSETS, EXPONENTS, strict=True):
            if names & {NAMES[offset], NAMES[exponent]}:
                names.add(NAMES[scale])
        return names


def _check(runs: Runs, fixed: Mapping[str, float]) -> None:
    for name, value in fixed.items():
        if name not in NAMES:
            raise ValueError(f"there is no coefficient {name!r}; there are {', '.join(NAMES)}")
        if NAMES.index(name) in SCALES:
            raise ValueError(f"{name} cannot be fixed: it means nothing without its exponent; fix the exponent instead")
        zero = name.startswith("t_") or name == "gamma"
        if not np.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise ValueError(f"{name} is fixed at {value}; give a number {'from' if zero else 'above'} 0")
    if fixed.get("e0", 0.0) >= runs.loss.min():
        raise ValueError(f"e0 is fixed at {fixed['e0']}, and the least loss is {runs.loss.min():g}: give less")
    free = len(NAMES) - len(fixed)
    if len(runs.loss) <= free:
        raise ValueError(
            f"{len(runs.loss)} runs are too few for {free} coefficients: give more than {free}, "
            "or fix some, as with t_token=0, t_concept=0, t_data=0"
        )
    if len(np.unique(runs.d)) == 1:
        raise ValueError(f"all runs have D={runs.d[0]:g}: e0 cannot be told from the data term; give several lengths")
    if len(np.unique(runs.r)) == 1 and "gamma" not in fixed:
        raise ValueError(f"all runs have R={runs.r[0]:g}: gamma cannot be told from a_concept; fix gamma=0")
