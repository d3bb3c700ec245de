"""The fused head in verl's Megatron engine; importing this module installs it.

    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.external_lib=lad_kernels.frameworks.verl_megatron

Two names in verl's fused forward are replaced. Its kernel returns each tensor-parallel rank's part of dH and relies
on the backward of sequence parallelism's gather to sum the parts; without sequence parallelism nothing does. Ours sums
dH itself, so that the gather's backward must only split it. Both cases are then correct.

Only the head's weight reaches either kernel: no head bias, softcap or scale of muP is in these log-probs.

Raises on import:
    ImportError: verl or Megatron Core is not installed, or verl's fused forward lacks one of the two names; then
        nothing is replaced.
"""

from __future__ import annotations

import sys
from functools import partial

from verl.models.mcore import model_forward_fused

from lad_kernels.frameworks.verl import linear_cross_entropy

for name in ("linear_cross_entropy", "gather_from_sequence_parallel_region"):
    if not callable(getattr(model_forward_fused, name, None)):  # with one name replaced alone, dH would be wrong
        version = getattr(sys.modules.get("verl"), "__version__", "of unknown version")
        raise ImportError(
            f"verl.models.mcore.model_forward_fused.{name}: expected a function to replace, got none; verl {version} "
            "is not supported by lad_kernels.frameworks.verl_megatron"
        )
model_forward_fused.linear_cross_entropy = linear_cross_entropy
model_forward_fused.gather_from_sequence_parallel_region = partial(
    model_forward_fused.gather_from_sequence_parallel_region, tensor_parallel_output_grad=False
)
