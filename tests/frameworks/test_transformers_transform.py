"""What a model or its user does to logits after the head, and may change in the next call: exact, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed: changes of the transform are not tested")

from families import HIDDEN, IDS, MASK, VOCABULARY, compare, fused, fused_logprobs, own_logprobs, tiny_model
from transformers import LlamaForCausalLM

from lad_kernels import linear_logprobs
from lad_kernels.frameworks import logit_transform
from lad_kernels.frameworks.logit_transform import LogitTransform, known_numbers
from lad_kernels.frameworks.transformers import attach_fused_head


class Llama(LlamaForCausalLM):
    """Its logits go through `after(model, logits)`."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.after(self, out.logits)
        return out


def model_with(after) -> Llama:
    model = tiny_model("llama").eval()
    model.__class__, model.after, model.scale = Llama, after, 1.0
    attach_fused_head(model)
    return model


def test_an_attribute_that_changes_is_followed():
    model = model_with(lambda model, z: z * model.scale)
    for scale in (1.0, 0.25, 3.0, 3.0, 1.0):
        model.scale = scale
        compare(model)


def test_training_and_evaluation_may_differ():
    model = model_with(lambda model, z: z * (0.5 if model.training else 2.0))
    head, passes = attach_fused_head(model), []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    for training in (True, False, True, False):
        model.train(training)
        compare(model)
    assert len(head._checked) == 2
    passes.clear()
    fused_logprobs(model.train())
    fused_logprobs(model.eval())
    assert len(passes) == 2  # both are remembered


def test_a_scale_by_the_length_of_the_sequence_is_followed():
    model = model_with(None)
    length = []
    model.model.register_forward_hook(lambda module, args, out: length.append(out[0].shape[1]))
    model.after = lambda model, z: z * (10 / length[-1])
    for n in (9, 6, 9, 4):
        ids = IDS[:, :n]
        own = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        ours = model(
            input_ids=ids, fused_head=lambda h, w, ids=ids, **head: linear_logprobs(h[:, :-1], w, ids[:, 1:], **head)
        ).result.logprobs
        torch.testing.assert_close(ours, own, rtol=0, atol=1e-5)


def test_a_softcap_that_changes_is_followed():
    model = tiny_model("gemma2").eval()
    attach_fused_head(model)
    for cap in (3.0, 5.0, 3.0):
        model.config.final_logit_softcapping = cap
        compare(model)
    model = model_with(lambda model, z: model.scale * torch.tanh(z / model.scale))
    for model.scale in (3.0, 5.0, 3.0):
        compare(model)


def test_what_a_transform_became_is_refused_where_it_is_none():
    model = model_with(lambda model, z: z * model.scale)
    fused_logprobs(model)
    model.after = lambda model, z: z.relu() * 2
    with pytest.raises(ValueError, match="scale and a softcap"):
        fused_logprobs(model)


def test_a_scale_that_changes_within_a_call_is_refused():
    model = model_with(lambda model, z: z * model.scale)
    fused_logprobs(model)

    def after(model, z):
        model.scale += 1
        return z * model.scale

    model.after = after
    with pytest.raises(ValueError, match=r"alike in every call, got .*=2\.0.* and then .*=3\.0"):
        fused_logprobs(model)


def test_a_change_on_one_of_several_ranks_is_refused_until_forgotten(monkeypatch):
    model = model_with(lambda model, z: z * model.scale)
    fused_logprobs(model)
    model.scale = 2.0
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(
        ValueError, match=r"got LogitTransform\(logit_scale=2\.0.*attach_fused_head\(model\)\.forget\(\)"
    ):
        fused_logprobs(model)
    attach_fused_head(model).forget()
    compare(model)


def test_the_device_asserts_instead_of_the_host():
    """CUDA's branch, here with an operation that knows the CPU too; nothing is read."""

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

        def __bool__(self):
            raise AssertionError("a host sync")

    given = known_numbers(2, torch.device("cpu"))
    transform = LogitTransform(2.0, 5.0)
    logits = transform(given).as_subclass(Elsewhere)
    assert logit_transform.unchanged(transform, given, logits, "Llama")
    with pytest.raises(RuntimeError, match=r"Llama scales its logits otherwise .* attach_fused_head\(model\)\.forget"):
        logit_transform.unchanged(LogitTransform(2.5, 5.0), given, logits, "Llama")
    with pytest.raises(RuntimeError, match="otherwise"):
        logit_transform.unchanged(LogitTransform(2.0), given, logits, "Llama")


@pytest.mark.parametrize("start", [1.0, 1.7])
def test_a_learned_scale_is_refused_until_it_is_frozen(start):
    model = model_with(lambda model, z: z * model.learned)
    model.learned = nn.Parameter(torch.tensor(start))
    with pytest.raises(ValueError, match="a parameter that requires grad, whose gradient would be lost; freeze it"):
        fused_logprobs(model)
    with torch.no_grad():  # scoring loses nothing, whatever the parameter became
        for _ in range(2):
            torch.testing.assert_close(fused_logprobs(model), own_logprobs(model), rtol=0, atol=1e-5)
            model.learned += 0.5
    with pytest.raises(ValueError, match="requires grad"):
        fused_logprobs(model)
    model.learned.requires_grad_(False)
    compare(model)


def test_a_scale_per_token_is_named():
    """The cure of the message: the inverse as a temperature, which is exact."""
    factor = 0.5 + torch.rand(2, 9, 1, generator=torch.Generator().manual_seed(4))  # [B, T, 1]
    model = model_with(lambda model, z: z * factor)
    with pytest.raises(ValueError, match=r"got a scale per token .*switch it off .* `temperature`"):
        fused_logprobs(model)
    own = own_logprobs(model)
    model.after = lambda model, z: z

    def function(hidden, weight, **head):
        return fused(hidden, weight, **head, temperature=1 / factor[:, :-1, 0])

    ours = model(input_ids=IDS, attention_mask=MASK, fused_head=function).result
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-5)


def test_a_scale_per_token_that_comes_later_is_named():
    model = model_with(lambda model, z: z)
    fused_logprobs(model)
    model.after = lambda model, z: z * torch.ones(2, 9, 1)
    with pytest.raises(ValueError, match="got a scale per token"):
        fused_logprobs(model)


class Noisy(nn.Linear):
    def forward(self, x):
        z = super().forward(x)
        return z + torch.randn_like(z) if self.training else z


class Dropping(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


@pytest.mark.parametrize("kind", [Noisy, Dropping])
@pytest.mark.parametrize("first", [True, False])
def test_a_head_with_noise_in_training_is_refused_there(kind, first):
    model = tiny_model("llama")
    model.lm_head = kind(HIDDEN, VOCABULARY, bias=False)
    attach_fused_head(model)
    for training in (first, not first, first):
        model.train(training)
        if training:
            with pytest.raises(ValueError, match=rf"expected the head, {kind.__name__}, .* in training mode"):
                fused_logprobs(model)
        else:
            compare(model)


def test_the_check_leaves_shared_modules_in_their_mode():
    """Another thread may be in the middle of a training step: flags are not switched for a moment either."""
    model = tiny_model("llama").train()
    attach_fused_head(model)
    switched = []

    class Watched(nn.Linear):
        def __setattr__(self, name, value):
            if name == "training":
                switched.append(value)
            super().__setattr__(name, value)

    model.lm_head.__class__ = Watched
    fused_logprobs(model)
    assert not switched


HOOKS = {
    "scales": lambda module, args, out: out * 0.5,
    "repeats": lambda module, args, out: out * 2,
    "casts": lambda module, args, out: out.float(),
    "clamps": lambda module, args, out: torch.clamp(out, -1, 1),
    "learned": lambda module, args, out: out * module.weight.mean(),
    "every tensor": lambda module, args, out: tuple(x * 0.5 for x in out) if isinstance(out, tuple) else out * 0.5,
    "in place": lambda module, args, out: [x.mul_(0.5) for x in out] and None,
    "another": lambda module, args, out: torch.zeros(2, 9, VOCABULARY),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("late", [False, True])
def test_hooks_that_change_the_output_of_the_head_are_refused(name, late):
    model = tiny_model("llama").eval().requires_grad_(False)
    attach_fused_head(model)
    if late:
        fused_logprobs(model)
    handle = model.lm_head.register_forward_hook(HOOKS[name])
    with pytest.raises(TypeError, match=r"lm_head: expected forward hooks that leave .* got <lambda>.*remove the hook"):
        fused_logprobs(model)
    handle.remove()
    compare(model.requires_grad_())


def test_a_scale_in_the_forward_instead_of_a_hook():
    """The other cure of the message about hooks."""
    model = tiny_model("llama").eval()
    plain = model.forward

    def scaled(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    model.forward = scaled
    attach_fused_head(model)
    compare(model)


def test_hooks_that_look_or_change_the_input_work():
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(type(out)))
    model.lm_head.register_full_backward_hook(lambda module, before, after: None)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.7,))
    compare(model)
    assert tuple in seen
    with torch.inference_mode():
        torch.testing.assert_close(fused_logprobs(model), own_logprobs(model), rtol=0, atol=1e-5)


class Passing(torch.autograd.Function):
    """What ZeRO-3 puts behind a module's outputs: the same numbers, and a node of autograd."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.detach()

    @staticmethod
    def backward(ctx, g):
        ctx.seen.append(g)
        return g, None


def test_nodes_of_wrappers_are_kept():
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    seen = []
    model.lm_head.register_forward_hook(
        lambda module, args, out: torch.utils._pytree.tree_map(lambda x: Passing.apply(x, seen), out)
    )
    compare(model)
    assert len(seen) == 2  # of the model's own backward and of ours


def test_a_library_that_replaces_the_forward_is_named():
    model = tiny_model("llama").eval()
    attach_fused_head(model)
    ours = model.forward

    def another_forward(input_ids=None, attention_mask=None, fused_head=None, **kwargs):
        return LlamaForCausalLM.forward(model, input_ids, attention_mask, **kwargs)

    model.forward = another_forward
    with pytest.raises(TypeError, match=r"got .*another_forward, which somebody put in its place; attach after"):
        fused_logprobs(model)
    model.forward = ours
    attach_fused_head(model).detach()
    model.forward = another_forward
    attach_fused_head(model)
    compare(model)


class Bare(LlamaForCausalLM):
    """No use_cache, no return_dict and no **kwargs."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask, use_cache=False)


def test_a_forward_without_use_cache():
    model = tiny_model("llama").eval()
    model.__class__ = Bare
    attach_fused_head(model)
    own = model(input_ids=IDS, attention_mask=MASK).logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(fused_logprobs(model), own * MASK[:, 1:], rtol=0, atol=1e-5)


def test_a_model_without_logits_in_its_output_is_refused():
    model = model_with(lambda model, z: None)
    with pytest.raises(ValueError, match="expected Llama to return logits, it returned none"):
        fused_logprobs(model)
