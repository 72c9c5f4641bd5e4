"""What draws, under a short name: the noise of a seed, and a sampler of a run or a folder."""

from onestill.core.tensors import noise
from onestill.runs.load import load_sampler
from onestill.runs.sample import sample

__all__ = ["load_sampler", "noise", "sample"]
