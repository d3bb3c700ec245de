"""The objective: log-probabilities and rewards in, a loss and its gradient out. Others import from here alone."""

from lad_kernels.objective.advantages import group_advantages
from lad_kernels.objective.config import DIVERGENCES, GRPOConfig, LADConfig
from lad_kernels.objective.inputs import Config, PolicyInputs, validate
from lad_kernels.objective.losses import grpo_loss, lad_loss
from lad_kernels.objective.policy import PolicyTerms
from lad_kernels.objective.terms import compute_terms

__all__ = [
    "DIVERGENCES",
    "Config",
    "GRPOConfig",
    "LADConfig",
    "PolicyInputs",
    "PolicyTerms",
    "compute_terms",
    "group_advantages",
    "grpo_loss",
    "lad_loss",
    "validate",
]
