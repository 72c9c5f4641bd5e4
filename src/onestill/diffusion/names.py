"""The names of steps and solvers, without torch: settings are made of them."""

from typing import Literal

StepName = Literal["ddim", "heun", "midpoint"]
"""One step of the ODE, which a bootstrap target is made by."""
SolverName = Literal["ddim", "heun", "midpoint", "dpmsolver++"]
"""A whole trajectory: steps of one kind, or of one that remembers the step before."""
