"""The head: hidden states, weight and targets in, log-probs out; coefficients in, gradients out. No RL in here.

What the rest of the package uses of it.
"""

from lad_kernels.head.dispatch import Sparsity
from lad_kernels.head.head import Head
from lad_kernels.head.logprobs import linear_logprobs, token_outputs
from lad_kernels.head.operands import ARGUMENTS, SCHEMA, HeadArguments, Layout, Operands, in_autocast_dtype, prepare
from lad_kernels.head.plan import (
    BackwardPlan,
    forward_for_backward,
    one_pass_chunks,
    plan_backward,
    select_active,
    takes_one_pass,
)
from lad_kernels.head.profile import SparsityProfile, profile_sparsity
from lad_kernels.head.records import HeadForward, HeadGradients, LogitGradient, Needs, select

__all__ = [
    "ARGUMENTS",
    "SCHEMA",
    "BackwardPlan",
    "Head",
    "HeadArguments",
    "HeadForward",
    "HeadGradients",
    "Layout",
    "LogitGradient",
    "Needs",
    "Operands",
    "Sparsity",
    "SparsityProfile",
    "forward_for_backward",
    "in_autocast_dtype",
    "linear_logprobs",
    "one_pass_chunks",
    "plan_backward",
    "prepare",
    "profile_sparsity",
    "select",
    "select_active",
    "takes_one_pass",
    "token_outputs",
]
