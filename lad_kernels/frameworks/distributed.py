"""Batches that are distributed over processes: context parallelism, global normalisers, groups on several ranks.

The functions are those of lad_kernels/objective/context_parallel.py, where their use is described; all are collective.

A vocabulary sharded over ranks needs nothing from here: pass `vocab_group`. In Megatron Core that is this function, as
`GPTModel.forward(..., output_processor=f)`, written from its documentation and not run:

    def f(hidden_states, output_layer, output_weight, labels, config, **_):  # [S, B, D]
        if config.sequence_parallel:  # dH is complete on every rank: the backward must split it, not sum it again
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        rows = output_layer.weight if output_weight is None else output_weight  # [V / tp, D]
        group = parallel_state.get_tensor_model_parallel_group()
        return linear_logprobs(hidden_states.transpose(0, 1), rows, labels, vocab_group=group).logprobs  # [B, S]

Padding rows of the last rank take part in the softmax, as in Megatron; cut them with `rows[:n]`. Do not call the output
layer as well: its hooks would sum dH a second time.
"""

from __future__ import annotations

import os
from typing import Any

from lad_kernels.objective import (
    ContextShard,
    context_parallel_loss,
    global_normalizer,
    group_advantages_across_ranks,
    shard_tokens,
    shift_and_shard,
)

__all__ = [
    "ContextShard",
    "context_parallel_loss",
    "global_normalizer",
    "group_advantages_across_ranks",
    "require_sound_ranks",
    "shard_tokens",
    "shift_and_shard",
]


def require_sound_ranks(accelerator: Any, *, reference_model: bool) -> None:
    """Refuse launches whose ranks would train apart or be scored against a wrong reference model.

    Args:
        accelerator: accelerate's, already prepared for this launch.
        reference_model: whether a second model is loaded to score the reference policy.

    Raises:
        RuntimeError: the launcher started several processes that train apart; or FSDP2 loads the reference model on one
            rank alone (`cpu_ram_efficient_loading`), which leaves its weights uninitialised on the others (TRL 1.16).
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and accelerator.num_processes == 1:
        raise RuntimeError(
            f"WORLD_SIZE: expected {started} processes that train together, as the launcher started, got one that "
            f"trains alone; on CPUs pass use_cpu=True (--use_cpu)"
        )
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if reference_model and fsdp is not None and fsdp.fsdp_version == 2 and fsdp.cpu_ram_efficient_loading:
        raise RuntimeError(
            "cpu_ram_efficient_loading: expected False with a reference model (beta > 0) under FSDP2, got True; the "
            "reference policy's weights would not be those of the model"
        )
