#!/usr/bin/env python3
"""Fits the functions that tfm.h's vector kernels compute GELU with, and prints their coefficients.

GELU is x (1/2 + r(x)), r odd, between -1/2 and 1/2. r(x) is fitted by F(u) = u (15 - 10 u^2 + 3 u^4) / 16, which is 1/2 and
flat at 1, with u = x P(x^2) / Q(x^2) held within [-1, 1]: P and Q such that the largest error of r is as small as it can
be, up to some x. From there on P and Q may stay what they are, for u is nearly 1.

    fit_gelu.py         for each of the two: the errors, and the coefficients of P and Q, the highest power's first

Needs numpy.
"""
import math

import numpy as np
from numpy.polynomial.polynomial import polyval

# name, r, degrees of P and Q, largest x
FORMS = [
    ("gelu", np.vectorize(lambda x: math.erf(x / math.sqrt(2)) / 2), 6, 0, 5.2),
    ("gelu_tanh", lambda x: np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)) / 2, 5, 2, 5.1),
]


def step(u):
    """F(u), and its derivative."""
    u = np.clip(u, -1, 1)
    return u * (15 - 10 * u**2 + 3 * u**4) / 16, 15 / 16 * (1 - u**2) ** 2


def solve(equations, wanted):
    """Least squares, with columns of all sizes."""
    scale = np.linalg.norm(equations, axis=0)
    return np.linalg.lstsq(equations / scale, wanted, rcond=1e-14)[0] / scale


class Fit:
    def __init__(self, r, p_degree, q_degree, largest):
        self.x = largest * np.sin((np.arange(1500) + 0.5) / 1500 * math.pi / 2)
        self.r = r(self.x)
        self.n_p = p_degree + 1
        self.powers = np.concatenate([np.arange(p_degree + 1), np.arange(1, q_degree + 1)])
        # Begin near u = F^-1(r): P - u / x (Q - 1) = u / x, linear in the coefficients
        grid = np.linspace(0, 1, 200001)
        u = np.interp(self.r, step(grid)[0], grid)
        weights = step(u)[1] + 1e-9
        self.c = np.zeros(len(self.powers))
        self.c = solve(self.columns(u) * weights[:, None], u * weights)

    def columns(self, u):
        """The derivatives of u Q by the coefficients."""
        of_p, of_q = self.powers[: self.n_p], self.powers[self.n_p :]
        return np.hstack([self.x[:, None] ** (2 * of_p + 1), -u[:, None] * self.x[:, None] ** (2 * of_q)])

    def q(self, x):
        return polyval(x * x, np.append(1, self.c[self.n_p :]))

    def u(self, x):
        return x * polyval(x * x, self.c[: self.n_p]) / self.q(x)

    def error(self):
        return np.abs(step(self.u(self.x))[0] - self.r)

    def refine(self, free, rounds):
        """Moves the coefficients `free` to where the largest error is smallest: Gauss-Newton steps for weighted least
        squares, the weights growing where the error is large (Lawson's method)."""
        weights, best, best_error = np.ones(len(self.x)), self.c, math.inf
        for _ in range(rounds):
            error = self.error()
            if error.max() < best_error:
                best, best_error = self.c, error.max()
            weights *= np.sqrt(error / error.max() + 1e-3)
            weights /= weights.mean()
            u = self.u(self.x)
            f, slope = step(u)
            equations = self.columns(u)[:, free] * (slope / self.q(self.x) * np.sqrt(weights))[:, None]
            self.c = self.c.copy()
            self.c[free] += solve(equations, (self.r - f) * np.sqrt(weights))
        self.c = best

    def round(self):
        """Rounds one coefficient after the other, Q's first; those that are left make up for it."""
        order = [*range(self.n_p, len(self.c)), *range(self.n_p - 1, -1, -1)]
        for i, k in enumerate(order):
            self.c[k] = np.float32(self.c[k])
            if order[i + 1 :]:
                self.refine(order[i + 1 :], 150)


def text(coefficients):
    return ", ".join(f"{c:.9g}f" for c in reversed(coefficients))


for name, function, p_degree, q_degree, largest in FORMS:
    fit = Fit(function, p_degree, q_degree, largest)
    fit.refine(np.arange(len(fit.c)), 400)
    print(f"{name}: error of r {fit.error().max():.2g}", end="")
    fit.round()
    print(f", {fit.error().max():.2g} with coefficients in fp32; r({largest}) = 1/2 - {0.5 - step(fit.u(largest))[0]:.2g}")
    print(f"  P: {text(fit.c[: fit.n_p])}")
    if q_degree:
        print(f"  Q: {text(np.append(1, fit.c[fit.n_p:]))}")
