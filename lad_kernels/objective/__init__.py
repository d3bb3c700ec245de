"""The objective: log-probabilities and rewards in, a loss and its gradient out. Others import from here alone."""

from lad_kernels.objective.advantages import group_advantages
from lad_kernels.objective.config import (
    DIVERGENCES,
    LEVELS,
    SETTINGS,
    GRPOConfig,
    LADConfig,
    PolicyConfig,
    check_choice,
    check_number,
    check_tail,
)
from lad_kernels.objective.context_parallel import (
    ContextShard,
    context_parallel_loss,
    global_normalizer,
    group_advantages_across_ranks,
    shard_tokens,
    shift_and_shard,
)
from lad_kernels.objective.flat import INPUTS, flat_inputs, inputs_of
from lad_kernels.objective.inputs import PolicyInputs, validate, without_columns
from lad_kernels.objective.losses import grpo_loss, lad_loss
from lad_kernels.objective.policy import metric_names
from lad_kernels.objective.terms import Objective

__all__ = [
    "DIVERGENCES",
    "INPUTS",
    "LEVELS",
    "SETTINGS",
    "ContextShard",
    "GRPOConfig",
    "LADConfig",
    "Objective",
    "PolicyConfig",
    "PolicyInputs",
    "check_choice",
    "check_number",
    "check_tail",
    "context_parallel_loss",
    "flat_inputs",
    "global_normalizer",
    "group_advantages",
    "group_advantages_across_ranks",
    "grpo_loss",
    "inputs_of",
    "lad_loss",
    "metric_names",
    "shard_tokens",
    "shift_and_shard",
    "validate",
    "without_columns",
]
