"""The noise processes, under the short name that one's own network is wrapped with."""

from onestill.diffusion.process import VE, CosineVP, DiscreteVP, FlowMatching, Process

__all__ = ["VE", "CosineVP", "DiscreteVP", "FlowMatching", "Process"]
