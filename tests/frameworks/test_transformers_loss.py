"""patch_loss: the supervised loss of transformers models, and of Trainer, against their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: nothing about patch_loss is tested")

from families import FAMILIES, GRADIENT_TOLERANCE, IDS, MASK, tiny_model

from lad_kernels.frameworks.transformers import attach_fused_head, patch_loss

LABELS = torch.where((MASK == 1) & (torch.arange(IDS.shape[1]) > 2), IDS, -100)  # [B, T]
NEAR = 1e-6  # relative; 2.2e-7 was measured, of 88 families


def step(model, **inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one forward with labels; dropout, where a family has one, draws the same numbers."""
    model.zero_grad()
    torch.manual_seed(0)
    out = model(**{"input_ids": IDS, "attention_mask": MASK, "labels": LABELS} | inputs)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check(model, **inputs) -> None:
    expected, truth = step(model, **inputs)
    head = patch_loss(model)
    step(model, **inputs)  # the first call measures the transform, and may run the model twice
    found, gradients = step(model, **inputs)
    head.detach()
    assert abs(found - expected) <= NEAR * abs(expected)
    assert gradients.keys() == truth.keys()
    largest = max(float(g.abs().max()) for g in truth.values())
    for name, gradient in truth.items():
        assert (gradients[name] - gradient).abs().max() <= GRADIENT_TOLERANCE * largest, name


NOT = {"xlm": "predicts the word itself, not the next", "xlstm": "its own training forward fails at 9 tokens"}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT][::8])
def test_family(family):
    check(tiny_model(family))


def test_every_family():
    for family in FAMILIES:
        if family not in NOT:
            check(tiny_model(family))


def test_a_loss_of_its_own_making_is_refused():
    with pytest.raises(ValueError, match="expected XLMWithLMHeadModel to compute its loss by transformers'"):
        patch_loss(tiny_model("xlm"))
    model = tiny_model("llama")
    model.loss_function = lambda logits, labels, **_: logits.mean()
    with pytest.raises(ValueError, match="expected LlamaForCausalLM to compute its loss by"):
        patch_loss(model)


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_the_divisor_of_accumulated_gradients(count):
    check(tiny_model("qwen3"), num_items_in_batch=count)


def test_labels_that_are_shifted_already():
    shifted = torch.cat([LABELS[:, 1:], torch.full((len(LABELS), 1), -100)], 1)
    check(tiny_model("llama"), labels=IDS, shift_labels=shifted)


def test_a_mixture_of_experts_adds_its_loss():
    model = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.3)
    check(model)
    patch_loss(model)
    plain = tiny_model("mixtral", output_router_logits=False)
    patch_loss(plain)
    assert step(model)[0] > step(plain)[0] + 0.1


def test_other_calls_stay_the_models_own():
    """In evaluation, where predictions are asked for, and without labels; `detach` leaves nothing behind."""
    model = tiny_model("llama")
    head = patch_loss(model)
    assert model(input_ids=IDS).logits.shape[:2] == IDS.shape
    assert model(input_ids=IDS, labels=LABELS).logits is None
    model.eval()
    assert model(input_ids=IDS, labels=LABELS).logits.shape[:2] == IDS.shape
    attach_fused_head(model).detach()
    model.train()
    assert model(input_ids=IDS, labels=LABELS).logits is not None
    assert head is not attach_fused_head(model)


def test_options_reach_the_loss():
    model = tiny_model("llama")
    plain = step(model)[0]
    patch_loss(model, z_loss=1e-2)
    logits = model.eval()(input_ids=IDS, attention_mask=MASK).logits[:, :-1]
    squares = logits.logsumexp(-1)[LABELS[:, 1:] != -100].square().mean()
    model.train()
    assert step(model)[0] == pytest.approx(float(plain + 1e-2 * squares), rel=1e-5)


def test_no_label_counts():
    model = tiny_model("llama")
    patch_loss(model)
    for count in ({}, {"num_items_in_batch": 0}, {"num_items_in_batch": torch.tensor(0)}):
        loss, gradients = step(model, labels=torch.full_like(LABELS, -100), **count)
        assert loss == 0 and not any(g.any() for g in gradients.values())


def test_trainer(tmp_path):
    """Losses of stock Trainer's steps with accumulation, in float32, whose prompts have different lengths."""
    from transformers import Trainer, TrainingArguments

    rows = [
        {"input_ids": IDS[i % 2], "labels": torch.where(torch.arange(9) > i % 5, IDS[i % 2], -100)} for i in range(8)
    ]
    losses = []
    for patched in (False, True):
        model = tiny_model("qwen3")
        if patched:
            patch_loss(model)
        args = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            learning_rate=1e-2,
            save_strategy="no",
            eval_strategy="no",
        )
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows[:2])
        trainer.train()
        losses.append([x["loss"] for x in trainer.state.log_history if "loss" in x])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][0] != pytest.approx(losses[0][2], rel=1e-2)
