"""The verl adapter against verl itself, in verl's own environment (`make test-verl`); no network, no GPU."""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_module
from pages import snippets_of
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, PhiConfig, Qwen2Config
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config import FSDPActorConfig
from verl.workers.utils.losses import ppo_loss

from lad_kernels import LADConfig, lad_loss
from lad_kernels.frameworks.verl import LADPolicyLossConfig, linear_cross_entropy, status

ROOT = Path(__file__).resolve().parents[3]
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
TEMPERATURE = 0.7


def actor(**info) -> FSDPActorConfig:
    settings = {k: info.pop(k) for k in ("eta", "divergence", "importance_sampling_level") if k in info}
    config = FSDPActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=4, policy_loss=LADPolicyLossConfig(**settings)
    )
    config.global_batch_info.update(info)
    return config


def batch(rows: int = 8, length: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """[B, T] float32 inputs of a policy loss; a fully masked row, and garbage where the mask is 0."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (rows,), generator=g)
    lengths[1] = 0
    mask = torch.arange(length) < lengths[:, None]  # [B, T]
    logp = -torch.rand(rows, length, generator=g) * 3
    old = logp + 0.3 * torch.randn(rows, length, generator=g)
    return {
        "log_prob": logp.masked_fill(~mask, -5.0),
        "old_log_prob": old.masked_fill(~mask, float("nan")),
        "advantages": torch.randn(rows, 1, generator=g).expand(rows, length).contiguous(),
        "response_mask": mask,
        "rollout_is_weights": 0.5 + torch.rand(rows, length, generator=g),
    }


def part(data: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {name: x[rows] for name, x in data.items()}


def through_verl(data: dict[str, torch.Tensor], mode: str, config: FSDPActorConfig):
    """(loss, gradient [B, T], metrics) of the loss that verl finds under `lad`."""
    logp = data["log_prob"].clone().requires_grad_()
    loss, metrics = get_policy_loss_fn("lad")(**(data | {"log_prob": logp}), loss_agg_mode=mode, config=config)
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient, metrics


def js_with_verls_aggregation(data, mode: str, eta: float, level: str, info: dict):
    """The same in float64: the paper's formula per token, aggregated by verl's own agg_loss."""
    logp = data["log_prob"].double().requires_grad_()
    mask = data["response_mask"]
    d = torch.where(mask, logp - data["old_log_prob"].double(), 0.0)  # [B, T]
    if level == "sequence":
        d = (d.sum(-1) / mask.sum(-1).clamp(min=1))[:, None].expand_as(d)
    e = (data["advantages"].double() / eta).exp()
    x = d.exp() / e
    tokens = e * 0.5 * (x * x.log() - (x + 1) * ((x + 1) / 2).log()) * data["rollout_is_weights"].double()
    loss = agg_loss(tokens, mask, mode, **info)
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


def everything(data, mode: str) -> dict:
    counts = {"batch_num_tokens": int(data["response_mask"].sum()), "global_batch_size": 7}
    return counts | ({"loss_scale_factor": 32} if mode == "seq-mean-token-sum-norm" else {})


@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("with_info", (False, True))
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradient_with_every_aggregation(mode, with_info, level):
    data, eta = batch(), 0.8
    info = everything(data, mode) | {"dp_size": 4} if with_info else {}
    config = actor(eta=eta, importance_sampling_level=level, **info)
    loss, gradient, metrics = through_verl(data, mode, config)
    true_loss, true_gradient = js_with_verls_aggregation(data, mode, eta, level, info)
    print(f"relative errors: loss {relative(loss, true_loss):.1e}, gradient {relative(gradient, true_gradient):.1e}")
    assert relative(loss, true_loss) < 6e-7
    assert relative(gradient, true_gradient) < 6e-7
    assert torch.all(gradient[~data["response_mask"]] == 0)
    assert all(type(value) is float for value in metrics.values())
    assert metrics["actor/ppo_kl"] == metrics["actor/lad/approx_kl_k1"]


@pytest.mark.parametrize("mode", MODES)
def test_gradient_does_not_depend_on_micro_batches_or_ranks(mode):
    data = batch()
    counts = everything(data, mode)
    _, whole, _ = through_verl(data, mode, actor(**counts, dp_size=1))
    pieces = [
        through_verl(part(data, rows), mode, actor(**counts, dp_size=1))[1]
        for rows in (slice(0, 1), slice(1, 2), slice(2, 5), slice(5, 8))
    ]
    assert relative(torch.cat(pieces), whole) < 1e-6
    ranks = [through_verl(part(data, rows), mode, actor(**counts, dp_size=2))[1] for rows in (slice(0, 3), slice(3, 8))]
    assert relative(torch.cat(ranks) / 2, whole) < 1e-6  # FSDP averages over the ranks


def test_is_lad_loss():
    """Same number as the function itself, and metrics are means over the micro-batch whatever the global counts."""
    data = batch()
    settings = LADConfig(divergence="hd", eta=0.5)
    ours = lad_loss(
        data["log_prob"],
        data["old_log_prob"],
        data["advantages"],
        loss_mask=data["response_mask"],
        config=settings,
        rollout_is_weights=data["rollout_is_weights"],
    )
    for info in ({}, {"dp_size": 2, "batch_num_tokens": 1000}):
        loss, _, metrics = through_verl(data, "token-mean", actor(divergence="hd", eta=0.5, **info))
        assert metrics["actor/lad/loss_above_start"] == pytest.approx(ours.metrics["loss_above_start"].item(), rel=1e-5)
        assert metrics["actor/lad/ratio_mean"] == pytest.approx(ours.metrics["ratio_mean"].item(), rel=1e-6)
        share = 2 * int(data["response_mask"].sum()) / 1000 if info else 1
        assert loss.item() == pytest.approx(ours.loss.item() * share, rel=1e-6)


def test_a_masked_micro_batch_is_a_differentiable_zero():
    data = batch()
    data["response_mask"] = torch.zeros_like(data["response_mask"])
    for mode in MODES:
        loss, gradient, _ = through_verl(data, mode, actor(dp_size=2, batch_num_tokens=9, global_batch_size=4))
        assert loss == 0 and torch.all(gradient == 0)


def test_missing_global_counts_are_refused():
    with pytest.raises(ValueError, match="batch_num_tokens because dp_size is 2"):
        through_verl(batch(), "token-mean", actor(dp_size=2))
    with pytest.raises(ValueError, match="global_batch_size because dp_size is 2"):
        through_verl(batch(), "seq-mean-token-mean", actor(dp_size=2))
    with pytest.raises(ValueError, match="loss_agg_mode: expected one of"):
        through_verl(batch(), "token-median", actor())


def test_settings_that_would_be_ignored_are_refused():
    data, config = batch(), actor()
    plain = FSDPActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=4)  # cannot hold LAD settings
    assert through_verl(data, "token-mean", plain)[0] == through_verl(data, "token-mean", config)[0]
    untyped = SimpleNamespace(policy_loss={"loss_mode": "lad", "eta": 1.0}, global_batch_info={})
    with pytest.raises(TypeError, match="expected LADPolicyLossConfig, got dict"):
        through_verl(data, "token-mean", untyped)


def test_autocast_changes_neither_the_loss_nor_the_dtype():
    """verl's FSDP engine calls model and loss inside torch.autocast."""
    data, ids = batch(), torch.arange(7)[None]
    model = FAMILIES["bias"]()
    apply_monkey_patch(model, use_fused_kernels=True, fused_kernels_backend="lad_kernels")
    call = {"input_ids": ids, "temperature": TEMPERATURE, "return_dict": True, "use_cache": False}
    outside, exact = through_verl(data, "token-mean", actor()), model(**call)
    with torch.autocast("cpu", torch.bfloat16):
        inside, out = through_verl(data, "token-mean", actor()), model(**call)
    assert torch.equal(inside[0], outside[0]) and torch.equal(inside[1], outside[1])
    assert out.log_probs.dtype == out.entropy.dtype == torch.float32
    error = relative(out.log_probs.detach(), exact.log_probs.detach())
    print(f"relative error of bfloat16 autocast: {error:.1e}")
    assert 0 < error < 0.02


def test_settings_from_the_command_line():
    """verl's own hydra configuration with the overrides of the page, as workers instantiate it."""
    (snippet,) = snippets_of("docs/frameworks/verl.md", "diff")
    overrides = [word for word in shlex.split(snippet.after.replace("\\\n", " ")) if "=" in word]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            overrides=[
                *overrides,
                "+actor_rollout_ref.actor.policy_loss.divergence=kl",
                "+actor_rollout_ref.actor.policy_loss.log_ratio_clamp=3.0",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
            ],
        )
    settings = omega_conf_to_dataclass(config.actor_rollout_ref.actor).policy_loss
    assert isinstance(settings, LADPolicyLossConfig)
    assert settings.get("loss_mode") == "lad"
    assert settings.lad_config() == LADConfig(eta=0.25, divergence="kl", log_ratio_clamp=3.0)
    assert config.actor_rollout_ref.model.fused_kernel_options.impl_backend == "lad_kernels"
    with pytest.raises(ValueError, match="divergence: expected one of"):
        LADPolicyLossConfig(divergence="jss")


def test_through_verls_ppo_loss():
    """The call as a worker makes it: jagged tensors, padding, global counts, metrics of two micro-batches."""
    data, prompts = batch(rows=4), torch.tensor([3, 1, 2, 4])
    data["response_mask"][1, :2] = True  # verl expects a response in every row
    data["old_log_prob"] = data["log_prob"] - 0.1
    lengths = data["response_mask"].sum(-1)  # [B]
    counts = {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 16}

    def micro_batch(rows: slice):
        n, m = prompts[rows], lengths[rows]
        logp = [
            torch.cat([torch.zeros(int(p) - 1), row[: int(r)], torch.zeros(1)])
            for p, r, row in zip(n, m, data["log_prob"][rows])
        ]
        leaf = torch.cat(logp).requires_grad_()  # [N]

        def jagged(x):  # [B, T]
            parts = [row[: int(r)].clone() for row, r in zip(x[rows], m)]
            return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

        fields = {name: jagged(data[name]) for name in ("advantages", "response_mask", "rollout_is_weights")}
        fields["old_log_probs"], fields["responses"] = jagged(data["old_log_prob"]), jagged(torch.zeros(4, 6).long())
        fields["prompts"] = torch.nested.as_nested_tensor([torch.zeros(int(p)) for p in n], layout=torch.jagged)
        loss, metrics = ppo_loss(actor(eta=0.5), {"log_probs": leaf}, tu.get_tensordict(fields, counts))
        loss.backward()
        ends = [int(x) for x in (n + m).cumsum(0)]
        return [leaf.grad[end - int(r) - 1 : end - 1] for end, r in zip(ends, m)], metrics

    found = [micro_batch(slice(0, 1)), micro_batch(slice(1, 4))]
    gradients = torch.nn.utils.rnn.pad_sequence([g for rows, _ in found for g in rows], batch_first=True)  # [B, T]
    _, truth = js_with_verls_aggregation(data, "token-mean", 0.5, "token", counts)
    assert relative(gradients, truth[:, : gradients.shape[1]]) < 2e-6
    merged = found[0][1]["actor/lad/ratio_mean"]
    merged.append(found[1][1]["actor/lad/ratio_mean"])
    assert merged.aggregate() == pytest.approx(math.exp(0.1), rel=1e-5)


@pytest.mark.parametrize("shape", ((1, 40), (40,), (2, 20)))
def test_linear_cross_entropy_is_verls(shape):
    """float32, temperature, both outputs and both gradients: as close to float64 as verl's own PyTorch path."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(*shape, 32, generator=g), torch.randn(300, 32, generator=g)
    labels = torch.randint(0, 300, shape, generator=g)
    upstream = torch.randn(2, 40, generator=g)

    def run(function, dtype):
        h, w = (x.to(dtype).detach().requires_grad_() for x in (hidden, weight))
        outputs = [x.reshape(-1) for x in function(h, w)]
        loss = sum((x * u.to(x.dtype)).sum() for x, u in zip(outputs, upstream))
        return [*(x.detach() for x in outputs), *(x.flatten() for x in torch.autograd.grad(loss, (h, w)))]

    def dense(h, w):
        logp = (h @ w.T / TEMPERATURE).log_softmax(-1)
        return logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp).sum(-1)

    truth = run(dense, torch.float64)
    ours = run(lambda h, w: linear_cross_entropy(h, w, labels, TEMPERATURE, "none", None), torch.float32)
    verls = run(lambda h, w: FusedLinearForPPO()(h, w, labels, temperature=TEMPERATURE), torch.float32)
    names = ("log_probs", "entropy", "dhidden", "dweight")
    print(
        {n: f"ours {relative(a, t):.1e}, verl's {relative(b, t):.1e}" for n, a, b, t in zip(names, ours, verls, truth)}
    )
    assert all(relative(a, t) < 1e-6 for a, t in zip(ours, truth))
    assert all(relative(a, b) < 4e-6 for a, b in zip(ours, verls))
    out = linear_cross_entropy(hidden, weight, labels)
    assert all(x.shape == (40,) and x.dtype == torch.float32 and x.is_contiguous() for x in out)
    with pytest.raises(ValueError, match="reduction: expected 'none'"):
        linear_cross_entropy(hidden, weight, labels, 1.0, "mean")


def tiny(config_class, **more):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager", **more,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "lm_head" in name or "embed" in name:  # logits of order 1, so that a transform shows
            torch.nn.init.normal_(parameter, std=0.4)
    return model


FAMILIES = {
    "untied": lambda: tiny(Qwen2Config, tie_word_embeddings=False),
    "softcap": lambda: tiny(Gemma2Config, head_dim=8, final_logit_softcapping=2.0),
    "scale": lambda: tiny(CohereConfig, logit_scale=0.25),
    "bias": lambda: tiny(PhiConfig),
}


def scored(model, inputs, labels, fused: bool):
    """log-probs and entropy [B, T] and the gradients of a loss on both, called as verl's FSDP engine does."""
    model.zero_grad()
    if fused:
        out = model(**inputs, temperature=TEMPERATURE, return_dict=True, shift_labels=labels, use_cache=False)
        logp, entropy = out.log_probs, out.entropy
        assert logp.dtype == entropy.dtype == torch.float32 and logp.is_contiguous() and entropy.is_contiguous()
    else:
        log_p = (model(**inputs).logits / TEMPERATURE).log_softmax(-1)
        logp = log_p.gather(-1, (inputs["input_ids"].roll(-1, -1) if labels is None else labels)[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
    (logp * torch.linspace(-1, 1, logp.shape[-1]) + 0.3 * entropy).sum().backward()
    return logp.detach(), entropy.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("given_labels", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_head_keeps_what_the_model_does_to_its_logits(family, given_labels):
    ids = torch.arange(14).reshape(2, 7) * 5 % 97
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(7).expand(2, 7)}
    labels = (ids + 11) % 97 if given_labels else None
    plain, model = FAMILIES[family](), FAMILIES[family]()
    truth = scored(plain.double(), inputs, labels, fused=False)
    apply_monkey_patch(model, use_fused_kernels=True, fused_kernels_backend="lad_kernels")
    found = scored(model, inputs, labels, fused=True)
    print(family, [f"{relative(a, t):.1e}" for a, t in zip(found, truth)])
    assert all(relative(a, t) < 2e-6 for a, t in zip(found, truth))
    found, truth = (x(input_ids=ids, labels=ids) for x in (model, plain))  # without `temperature` nothing has changed
    assert relative(found.logits, truth.logits) < 2e-6 and relative(found.loss, truth.loss) < 2e-6


def test_verls_own_backend_ignores_the_softcap(monkeypatch):
    """Why the backend exists; also shows that the test above can fail."""
    model = FAMILIES["softcap"]()
    ids = torch.arange(7)[None]
    truth = scored(model, {"input_ids": ids}, None, fused=False)[0]
    monkeypatch.setattr(type(model), "forward", type(model).forward)  # verl patches the class
    apply_monkey_patch(model, use_fused_kernels=True, fused_kernels_backend="torch")
    assert relative(model(input_ids=ids, temperature=TEMPERATURE, return_dict=True).log_probs.detach(), truth) > 0.1


def test_fused_head_under_peft():
    """verl wraps with PEFT after patching; LoRA on every linear layer but the head."""
    from peft import LoraConfig, get_peft_model

    model = FAMILIES["untied"]()
    apply_monkey_patch(model, use_fused_kernels=True, fused_kernels_backend="lad_kernels")
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    )
    ids = torch.arange(7)[None]
    found = model(input_ids=ids, temperature=TEMPERATURE, return_dict=True, use_cache=False)
    log_p = (model(input_ids=ids).logits / TEMPERATURE).log_softmax(-1)
    truth = log_p.gather(-1, ids.roll(-1, -1)[..., None])[..., 0]
    assert relative(found.log_probs, truth) < 2e-6
    found.log_probs.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_entry_point_registers_us(tmp_path, monkeypatch):
    """verl finds an installed package by itself; status() tells when it does not."""
    info = tmp_path / "as_installed-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: as_installed\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\nlad = lad_kernels.frameworks.verl\n")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    assert "are registered" in status()
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    assert "NOT registered (loss: False, backend: False)" in status()


def test_a_plugin_that_fails_is_heard():
    code = "import sys; sys.modules['verl.trainer.ppo.core_algos'] = None\nimport verl"
    variables = os.environ | {"PYTHONPATH": str(ROOT), "VERL_USE_EXTERNAL_MODULES": "lad_kernels.frameworks.verl"}
    found = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert "lad_kernels: cannot register with this verl: ModuleNotFoundError" in found.stderr
