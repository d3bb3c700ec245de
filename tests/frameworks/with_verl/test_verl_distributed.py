"""verl's own distributed code with our head in it, on two CPU ranks (gloo).

Megatron: the transformer is a stub whose last hidden states are leaves; everything after them is verl's and Megatron's.
FSDP2: verl's own wrapping, in which an untied head is a unit of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[3]
TOKENS, HIDDEN, VOCABULARY, TEMPERATURE = 6, 8, 22, 0.7


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x - truth).norm() / truth.norm()).item()


def legacy_forward(module, hidden, weight, labels, sequence_parallel: bool):
    """The patched GPTModel.forward, which verl takes for Megatron Core before 0.18."""
    model = SimpleNamespace(
        config=SimpleNamespace(sequence_parallel=sequence_parallel),
        post_process=True,
        output_layer=SimpleNamespace(weight=weight),
        _preprocess=lambda **inputs: (None,) * 5,
        decoder=lambda **inputs: hidden,
    )
    return module._fused_GPTModel_forward(model, None, None, None, labels=labels, temperature=TEMPERATURE)


def hook_forward(module, hidden, weight, labels, sequence_parallel: bool):
    """The output processor, which verl takes from 0.18 on."""
    return module.fused_output_processor(
        hidden_states=hidden,
        output_layer=SimpleNamespace(weight=weight),
        output_weight=None,
        labels=labels,
        context=module.FusedOutputProcessorContext(TEMPERATURE),
        config=SimpleNamespace(sequence_parallel=sequence_parallel),
    )


def megatron(rank: int) -> None:
    torch.cuda.current_device = lambda: "cpu"  # where Megatron allocates what it gathers
    from megatron.core import parallel_state
    from verl.models.mcore import model_forward_fused as module

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    gather = module.gather_from_sequence_parallel_region
    import lad_kernels.frameworks.verl_megatron  # noqa: F401

    torch.manual_seed(0)
    h = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.float64, requires_grad=True)  # [s, b, D]
    w = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, requires_grad=True)
    labels, upstream = torch.randint(0, VOCABULARY, (1, TOKENS)), torch.randn(2, TOKENS, dtype=torch.float64)

    def loss(logp, entropy):
        return (upstream[0] * logp + upstream[1] * entropy).sum()

    log_p = (h[:, 0] @ w.T / TEMPERATURE).log_softmax(-1)  # [s, V]
    truth = log_p.gather(-1, labels[0, :, None])[:, 0]  # [s]
    loss(truth, -(log_p.exp() * log_p).sum(-1)).backward()
    half = TOKENS // 2
    rows, own = slice(rank * VOCABULARY // 2, (rank + 1) * VOCABULARY // 2), slice(rank * half, (rank + 1) * half)

    def errors(forward, sequence_parallel):
        """Of log-probs, dH (of this rank's tokens under sequence parallelism) and dW of this rank's rows."""
        part = own if sequence_parallel else slice(None)
        hidden, weight = h.detach()[part].requires_grad_(), w.detach()[rows].requires_grad_()
        out = forward(module, hidden, weight, labels, sequence_parallel)
        loss(out.log_probs, out.entropy).backward()
        return relative(out.log_probs, truth), relative(hidden.grad, h.grad[part]), relative(weight.grad, w.grad[rows])

    for forward in (legacy_forward, hook_forward):
        for sequence_parallel in (True, False):
            found = errors(forward, sequence_parallel)
            assert all(e < 1e-12 for e in found), (forward.__name__, sequence_parallel, found)
    module.gather_from_sequence_parallel_region = gather  # without the second replacement dH is summed twice
    assert abs(errors(hook_forward, True)[1] - 1) < 1e-12


def fsdp2(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import AutoModelForCausalLM, Qwen2Config
    from verl.models.transformers.monkey_patch import apply_monkey_patch
    from verl.utils.fsdp_utils import apply_fsdp2

    import lad_kernels.frameworks.verl  # noqa: F401

    mesh = init_device_mesh("cpu", (2,))
    for tied in (False, True):
        config = Qwen2Config(
            vocab_size=33,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
            dtype="float64",
            attn_implementation="eager",
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        whole = AutoModelForCausalLM.from_config(config)
        whole.load_state_dict(model.state_dict())
        data = [torch.randint(0, 33, (1, 9)) for _ in range(2)]  # one sequence per rank
        for ids in data:
            log_p = (whole(ids).logits / TEMPERATURE).log_softmax(-1)
            logp = log_p.gather(-1, ids.roll(-1, -1)[..., None])[..., 0]
            ((logp - (log_p.exp() * log_p).sum(-1)).sum() / 2).backward()  # FSDP2 averages over ranks
        apply_monkey_patch(model, use_fused_kernels=True, fused_kernels_backend="lad_kernels")
        apply_fsdp2(model, {"mesh": mesh, "reshard_after_forward": True}, {})
        model.eval()
        with torch.no_grad():  # old log-probs are computed before each update
            model(input_ids=data[rank], temperature=TEMPERATURE, return_dict=True, use_cache=False)
        model.train()
        out = model(input_ids=data[rank], temperature=TEMPERATURE, return_dict=True, use_cache=False)
        (out.log_probs + out.entropy).sum().backward()
        truth = dict(whole.named_parameters())
        found = {name: relative(p.grad.full_tensor(), truth[name].grad) for name, p in model.named_parameters()}
        assert all(e < 1e-10 for e in found.values()), (tied, found)


def run(case: str, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, case, str(rank), str(tmp_path / "rendezvous")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and out.endswith("passed\n"), err[-3000:]


def test_megatron_sums_dhidden_once(tmp_path):
    run("megatron", tmp_path)


def test_fsdp2_reduces_the_heads_gradient(tmp_path):
    run("fsdp2", tmp_path)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    case, rank, rendezvous = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=2)
    {"megatron": megatron, "fsdp2": fsdp2}[case](int(rank))
    print("passed")
