"""lad_kernels/frameworks/trl_sft.py: supervised runs beside stock SFTTrainer's, and what is refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed; FusedLossMixin goes untested")

import trl
from datasets import Dataset
from transformers import LlamaConfig, MixtralConfig
from trl_cases import ON_CPU, SIZES, TOKENIZER, load, save_model

from lad_kernels.frameworks import trl_sft
from lad_kernels.frameworks.trl_options import trl_has_fused_head
from lad_kernels.frameworks.trl_sft import FusedLossMixin

pytestmark = [
    ON_CPU,
    pytest.mark.skipif(
        not trl_has_fused_head, reason="TRL 1.14 has no fused head to stand in for; lost: FusedLossMixin"
    ),
]
ROWS = Dataset.from_list([{"prompt": f"{i}+{i * i}=", "completion": f"{i + i * i}" + "0" * (i % 3)} for i in range(16)])
NEAR = 5e-6  # of TRL's own losses and gradient norms in float32


class FusedTrainer(FusedLossMixin, trl.SFTTrainer):
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    experts = {k: v for k, v in SIZES.items() if k != "head_dim"}
    configs = {
        "qwen3": None,
        "llama": LlamaConfig(**SIZES),
        "mixtral": MixtralConfig(**experts, num_local_experts=3, output_router_logits=True, router_aux_loss_coef=0.2),
    }
    return {name: save_model(tmp_path_factory.mktemp(name), config) for name, config in configs.items()}


def run(kind, folder: str, tmp_path, **given) -> list[dict]:
    """What every step logs, and the evaluation after them."""
    args = trl.SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=4, max_steps=3, seed=1,
        gradient_accumulation_steps=2, learning_rate=1e-3, logging_steps=1, report_to="none", save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, dataloader_pin_memory=False, max_length=None, **given,
    )  # fmt: skip
    trainer = kind(load(folder), args, train_dataset=ROWS, eval_dataset=ROWS, processing_class=TOKENIZER)
    trainer.train()
    trainer.evaluate()
    return [x for x in trainer.state.log_history if "loss" in x or "eval_loss" in x]


def check(folder: str, tmp_path, **given) -> None:
    expected, found = (run(kind, folder, tmp_path, **given) for kind in (trl.SFTTrainer, FusedTrainer))
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected):
        for name, value in theirs.items():
            if not name.endswith(("runtime", "per_second")):
                assert ours[name] == pytest.approx(value, rel=NEAR, abs=NEAR), name
    assert found[0]["mean_token_accuracy"] < 1 and found[0]["entropy"] > 0


@pytest.mark.parametrize("model", ["qwen3", "llama", "mixtral"])
def test_losses_and_metrics_are_trls(model, folders, tmp_path):
    check(folders[model], tmp_path)


@pytest.mark.parametrize(
    "given", [{"loss_type": "dft"}, {"completion_only_loss": False}, {"label_smoothing_factor": 0.1}]
)
def test_options(given, folders, tmp_path):
    """With smoothed labels TRL's loss needs logits, and the head gives metrics alone."""
    check(folders["qwen3"], tmp_path, **given)


def test_gradients_that_are_not_alike_are_noticed(folders, tmp_path):
    """A later TRL that weighs labels under the same name of a loss."""

    class Later(trl.SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            out = model(**inputs, fused_lm_head=True)
            return -(out.log_probs * torch.arange(out.log_probs.shape[1])).sum()

    class Fused(FusedLossMixin, Later):
        pass

    with pytest.raises(RuntimeError, match="loss_type: 'nll' was to weigh all labels alike"):
        run(Fused, folders["llama"], tmp_path)


def test_a_batch_without_labels():
    loss, logprobs = torch.zeros((), requires_grad=True), torch.zeros(2, 3)
    out = trl_sft._AlikeLogprobs.apply(loss, logprobs, torch.zeros(2, 3, dtype=torch.bool))
    out.sum().backward()
    assert loss.grad == 0


def test_refused(folders):
    class Wrong(FusedLossMixin):
        pass

    with pytest.raises(TypeError, match=r"Wrong: expected trl\.SFTTrainer after FusedLossMixin"):
        Wrong(load(folders["llama"]))

    class Smoothed(FusedTrainer):
        head_options = {"z_loss": 1e-4}  # noqa: RUF012

    with pytest.raises(TypeError, match="head_options: expected tail_mass, tail or backward, got z_loss"):
        Smoothed(load(folders["llama"]))


def test_options_of_the_head(folders, tmp_path):
    """Routed, with a tail mass that drops nothing."""

    class Exact(FusedTrainer):
        head_options = {"tail_mass": 1e-9, "backward": "routed"}  # noqa: RUF012

    plain, exact = (run(kind, folders["llama"], tmp_path) for kind in (FusedTrainer, Exact))
    assert exact[2]["loss"] == pytest.approx(plain[2]["loss"], rel=NEAR)
