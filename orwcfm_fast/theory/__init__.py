"""The method's exact recursion in one and two dimensions, by quadrature."""

from orwcfm_fast.theory.bounds import BoundChain, bound_chain, paper_drift
from orwcfm_fast.theory.density import Density, GaussianMixture, Grid, GridDensity
from orwcfm_fast.theory.recursion import Recursion, Round, exact_recursion
from orwcfm_fast.theory.refit import refit
from orwcfm_fast.theory.velocity import ExactVelocity

__all__ = [
    "BoundChain",
    "Density",
    "ExactVelocity",
    "GaussianMixture",
    "Grid",
    "GridDensity",
    "Recursion",
    "Round",
    "bound_chain",
    "exact_recursion",
    "paper_drift",
    "refit",
]
