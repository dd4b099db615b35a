"""The scaling laws of DLCM (arXiv 2512.24617, sections 6.2 and 6.3), and the share of concept parameters they favor.

    Law     L(N, D, R, P) = e0 + a_token / (N (1 - P) + t_token)^delta_token                              Eq. 22
                               + a_concept R^gamma / (N P + t_concept)^delta_concept
                               + a_data / (D + t_data)^alpha
    Decay   (L_stable - L_decayed) / L_stable = k L_stable^a R^b N^c                                      Eq. 23

N parameters, P the share of them in the concept layers, D tokens, R tokens a concept. The paper's delta_1 and delta_2
are delta_token and delta_concept here. It prints no value of any coefficient, and none is here.

best_share: at R and at a fixed cost a token (parameters that a token passes; times 2 its FLOPs of a forward)

    C = N (1 - P) + N P / R        so        N(P) = C / (1 - P + P / R)

the P that minimizes L. D has no say in it. With n = N (1 - P) and m = N P a step along C exchanges dm = -R dn, so

    a_token delta_token (n + t_token)^(-delta_token - 1)
        = R a_concept R^gamma delta_concept (m + t_concept)^(-delta_concept - 1)

The logarithm of the right side less that of the left falls all the way as P rises (both terms are convex along C), so
there is one root at most. Where there is none, an offset t is so large that one kind of parameter is not worth having
at all: the best P is then 0 or 1.

Shapes: N, D, R, P broadcast against each other.  Left out: embeddings and attention over the context, which C does not
count; the choice of N against D; the paper's remark that offsets may vary by configuration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import expit

REACH = 40.0  # the root is sought where |log(P / (1 - P))| is at most this


@dataclass(frozen=True, kw_only=True)
class Law:
    """The scaling law of DLCM with its eleven constants (arXiv 2512.24617, Eq. 22): loss of N, R, P and D."""

    e0: float
    a_token: float
    t_token: float
    delta_token: float
    a_concept: float
    gamma: float
    t_concept: float
    delta_concept: float
    a_data: float
    t_data: float
    alpha: float

    def loss(self, n: ArrayLike, d: ArrayLike, r: ArrayLike, p: ArrayLike) -> np.ndarray:
        n, d, r, p = (np.asarray(x, np.float64) for x in (n, d, r, p))
        token = self.a_token / (n * (1 - p) + self.t_token) ** self.delta_token
        concept = self.a_concept * r**self.gamma / (n * p + self.t_concept) ** self.delta_concept
        return self.e0 + token + concept + self.a_data / (d + self.t_data) ** self.alpha

    def best_share(self, cost: float, r: float) -> float:
        """P in [0, 1]: 0 or 1 where the law wants no concept, or no token, parameters at this cost."""
        if not (math.isfinite(cost) and cost > 0):
            raise ValueError(f"cost is {cost}; give the parameters that a token passes, above 0")
        if not (math.isfinite(r) and r >= 1):
            raise ValueError(f"R is {r}; a concept has at least 1 token")

        def gain(logit: float) -> float:
            """log of what the last bit of cost buys in concept layers over what it buys in token layers."""
            share, rest = expit(logit), expit(-logit)
            n = cost / (rest + share / r)
            concept = math.log(r * self.a_concept * self.delta_concept) + self.gamma * math.log(r)
            concept -= (self.delta_concept + 1) * math.log(n * share + self.t_concept)
            token = math.log(self.a_token * self.delta_token)
            return concept - token + (self.delta_token + 1) * math.log(n * rest + self.t_token)

        if gain(-REACH) <= 0:
            return 0.0
        if gain(REACH) >= 0:
            return 1.0
        return float(expit(brentq(gain, -REACH, REACH, xtol=1e-12)))


# Of no model, and in no paper: a fit is tested by what it recovers of this law.
MADE_UP = Law(
    e0=1.6,
    a_token=80.0,
    t_token=1e7,
    delta_token=0.28,
    a_concept=60.0,
    gamma=0.15,
    t_concept=3e7,
    delta_concept=0.25,
    a_data=400.0,
    t_data=1e9,
    alpha=0.29,
)


@dataclass(frozen=True, kw_only=True)
class Decay:
    """What decaying the rate gains, k L^a R^b N^c as a share of the loss (arXiv 2512.24617, Eq. 23)."""

    k: float
    a: float
    b: float
    c: float

    def reduction(self, stable: ArrayLike, r: ArrayLike, n: ArrayLike) -> np.ndarray:
        """(L_stable - L_decayed) / L_stable."""
        stable, r, n = (np.asarray(x, np.float64) for x in (stable, r, n))
        return self.k * stable**self.a * r**self.b * n**self.c


def cost_of(n: ArrayLike, r: ArrayLike, p: ArrayLike) -> np.ndarray:
    """C: the parameters that a token passes."""
    n, r, p = (np.asarray(x, np.float64) for x in (n, r, p))
    return n * (1 - p) + n * p / r


def size_at(cost: ArrayLike, r: ArrayLike, p: ArrayLike) -> np.ndarray:
    """N at which a token passes `cost` parameters."""
    cost, r, p = (np.asarray(x, np.float64) for x in (cost, r, p))
    return cost / (1 - p + p / r)
