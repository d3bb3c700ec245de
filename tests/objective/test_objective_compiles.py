"""The objective's kernel, compiled ahead of time without a GPU: no spills, few registers, no float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from test_objective_kernel import GROUPS, inputs, ours

from benchmarks.harness.aot import FULLEST, TARGETS, compiling, resources
from lad_kernels import GRPOConfig, LADConfig
from lad_kernels.objective.config import DIVERGENCES, POLICY_LOSSES
from lad_kernels.objective.inputs import PackedInputs
from lad_kernels.objective.kernels import policy as kernel


def compile_everything(arch: str) -> list[dict]:
    """What is launched: objectives with everything on (for one target all of them), three plain forms, and a chunk."""
    given = inputs("cpu")
    rewards, ids, weights = torch.ones(6), torch.tensor(GROUPS), torch.ones(len(given["logprobs"]))
    everything = dict(
        rewards=rewards, group_ids=ids, rollout_is_weights=weights, weights_by_token=True, usable=weights > 0
    )
    shared = dict(advantage_scale="batch", kl_coef=0.1, entropy_coef=0.1, loss_agg_mode="seq-mean-token-mean")
    bounds = dict(epsilon_low=0.2, epsilon_high=0.2)
    lad = dict(importance_sampling_level="sequence", target_norm="group", centered=True, **bounds)
    plain = given | {"old_logprobs": None, "cu_seqlens": None}
    with compiling(arch) as compiled:
        for divergence in DIVERGENCES if arch == FULLEST else ("js",):
            ours(given, LADConfig(divergence=divergence, **lad, **shared), **everything)
        for loss in POLICY_LOSSES[:-1] if arch == FULLEST else ("ppo",):  # luspo is ppo
            level = "sequence_sum" if loss == "vespo" else "token"
            ours(given, GRPOConfig(policy_loss=loss, importance_sampling_level=level, **shared), **everything)
        for config in (LADConfig(), LADConfig(**bounds)):
            ours(plain, config, advantages=weights, advantages_by_token=True)
        summed = GRPOConfig(importance_sampling_level="sequence_sum")
        ours(given, summed, advantages=rewards, rollout_is_weights=rewards)
        config = LADConfig(loss_agg_mode="seq-mean-token-mean", target_norm="group")  # in chunks: two kernels
        packed = PackedInputs(weights.new_tensor(7.0), given["cu_seqlens"], rewards=rewards, group_ids=ids)
        rows = slice(0, len(weights) - 1)
        kernel.coefficients(given["logprobs"][rows], kernel.prepare(packed, config).chunk(rows), config)
    report = []
    for name, compiled_kernel in compiled.values():
        used = resources(name, compiled_kernel, arch)
        doubles = "f64" in (compiled_kernel.asm.get("ptx") or compiled_kernel.asm["amdgcn"])
        report.append(dict(registers=used.registers, spilled=used.spilled, doubles=doubles))
    return report


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, list[dict]]:
    """Compiled in a process of its own: this one may be interpreting its kernels."""
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    code = (
        "import json, test_objective_compiles as t; print(json.dumps({a: t.compile_everything(a) for a in t.TARGETS}))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("arch", TARGETS)
def test_compiles_without_spills(arch, compiled):
    report = compiled[arch]
    assert len(report) == (19 if arch == FULLEST else 8)
    assert max(row["spilled"] for row in report) == 0, report
    assert not any(row["doubles"] for row in report), report
    assert max(row["registers"] for row in report) <= 72, report  # 61 on triton 3.6.0, 66 on 3.9.0
