"""Tokens that a pretrained policy sampled, and the hidden states that predict them: the data kind `real`.

python -m benchmarks.states show [--policy FOLDER]         samples what is not cached; entropies and lengths
python -m benchmarks.states pack OUT [--policy FOLDER]     one file for a machine without network, OUT/states.pt

A policy is a folder of transformers. By default it is SmolLM2-135M-Instruct, which `lad_kernels.pretrained` provides.
The prompts are those of prompts.json: eight problems of reasoning-gym (0 and 1 with seed 7 of chain_sum,
basic_arithmetic, gsm_symbolic and letter_counting) and four plain instructions. A policy that was trained on others
has a prompts.json of its own in its folder (`make demo ARGS=--keep-models` writes it), and the policy `untrained` is
SmolLM2 on those. Completions are sampled from the whole distribution (no top-k, no top-p) in bfloat16, as by a rollout
engine, and cached in the user's cache folder. Hidden states and old log-probs are those of a float32 forward, the
states taken before the head.

The temperature of the loss need not be that of sampling. Hidden states are divided by it, so that every provider, with
a temperature option or without, sees the same logits.

A packed head has 8-bit rows: blocks of 32 with a float16 scale, as in the GGUF (Q8_0) that SmolLM2 comes in, of which
nothing is lost. Any other head is rounded; the file says by how much. Packed states are bfloat16.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = "prompts.json"
CARRIED = ROOT / ".carry" / "states"  # where carry.sh packs
PACKED, POLICY = "LAD_KERNELS_STATES", "LAD_KERNELS_POLICY"  # environment: a packed folder, a policy's folder
TEMPERATURES = (1.0, 0.6, 0.3)
MAX_BYTES = 60 << 20  # of a packed file
BLOCK = 32  # entries of a packed row that share a scale
TOLERANCE = 1e-4  # of logits, relative to the largest: the head must be a plain product


class Prompts(NamedTuple):
    """What a policy is asked, read from a prompts.json."""

    texts: list[str]
    completions: int  # of each prompt
    length: int  # tokens of a completion at most
    chat: bool  # asked by the tokenizer's chat template, or as a question where it has none; else continued as they are

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()[:8]


class Sampled(NamedTuple):
    """Completions of one policy at one temperature, one after the other, first one of every prompt."""

    hidden: Tensor  # [N, D] float32: hidden[n] predicts targets[n]
    targets: Tensor  # [N] int64
    old_logprobs: Tensor  # [2, N] float32: of the targets at the sampling temperature, and at 1
    lengths: Tensor  # [completions] int64


class States(NamedTuple):
    """What a loss of one temperature gets from a policy."""

    name: str  # of the policy
    hidden: Tensor  # [N, D] float32, divided by the loss temperature
    weight: Tensor  # [V, D] float32
    targets: Tensor  # [N] int64
    old_logprobs: Tensor  # [N] float32, at the loss temperature


# ------------------------------------------------------------------------------------------------------- sampling


def prompts_of(folder: Path | None = None) -> Prompts:
    """A policy's own prompts, or those that all others are asked."""
    own = None if folder is None else folder / PROMPTS
    path = own if own is not None and own.exists() else Path(__file__).with_name(PROMPTS)
    return Prompts(**json.loads(path.read_text()))


@torch.no_grad()
def sample(folder: Path, temperature: float, asked: Prompts) -> Sampled:
    """Completions of every prompt, then their states in a second forward."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    sampler, model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for dtype in (torch.bfloat16, torch.float32)
    )
    chat = asked.chat and tokenizer.chat_template is not None
    question = "Question: {}\nAnswer:" if asked.chat else "{}"
    ask = lambda text: tokenizer.apply_chat_template(  # noqa: E731
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    texts = [ask(text) if chat else question.format(text) for text in asked.texts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    torch.manual_seed(0)
    ids = sampler.generate(
        **inputs,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=asked.length,
        num_return_sequences=asked.completions,
        pad_token_id=pad,
    )  # [prompts * completions, P + T]
    order = torch.arange(len(ids)).view(-1, asked.completions).T.flatten()  # first one completion of every prompt
    ids, start = ids[order], inputs["input_ids"].shape[1]
    ended = ids[:, start:] == tokenizer.eos_token_id  # [B, T]
    mask = ended.cumsum(1) - ended.long() == 0  # [B, T]; the end is a token of the completion
    attention = inputs["attention_mask"].repeat_interleave(asked.completions, 0)[order]  # [B, P]
    attention = torch.cat([attention, mask.long()], 1)  # [B, P + T]
    parts = states_of(model, ids, attention, mask, temperature)
    hidden, targets, old = zip(*parts)
    return Sampled(torch.cat(hidden), torch.cat(targets), torch.cat(old, 1), mask.sum(1))


def states_of(
    model, ids: Tensor, attention: Tensor, mask: Tensor, temperature: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(hidden [n, D], targets [n], log-probs [2, n]) of the masked tokens of each four sequences of ids [B, P + T]."""
    head, seen, length = model.get_output_embeddings(), [], mask.shape[1]
    with head.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        for rows in torch.arange(len(ids)).split(4):
            a, m = attention[rows], mask[rows]  # [4, P + T], [4, T]
            positions = (a.cumsum(1) - 1).clamp(min=0)
            inputs = {"input_ids": ids[rows], "attention_mask": a, "position_ids": positions}
            logits = model(**inputs, logits_to_keep=length + 1).logits[:, :-1][m].float()  # [n, V]
            hidden = seen.pop()[:, :-1][m]  # [n, D]
            off = (hidden[:8] @ head.weight.T - logits[:8]).abs().max() / logits[:8].abs().max()
            if off > TOLERANCE:
                raise ValueError(
                    f"the head of {type(model).__name__} does more than one product: logits off by {off:g}"
                )
            y = ids[rows][:, -length:][m]  # [n]
            at = [(logits / t).log_softmax(-1).gather(1, y[:, None])[:, 0] for t in (temperature, 1.0)]  # [n] each
            yield hidden, y, torch.stack(at)


# -------------------------------------------------------------------------------------------------- cache and head


def write(path: Path, record: dict[str, object]) -> None:
    """torch.save; whoever reads `path` meanwhile sees the old file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        try:
            torch.save(record, file)
            file.close()
            os.replace(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)


def cache_folder() -> Path:
    from lad_kernels import pretrained

    return pretrained.cache() / "states"


@cache
def version(folder: Path) -> str:
    """Twelve digits of a checksum of weights and tokenizer."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("tokenizer.json")]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def cache_path(folder: Path, temperature: float, asked: Prompts) -> Path:
    size = f"{asked.completions}x{asked.length}"
    return cache_folder() / f"{folder.name}-{version(folder)}-prompts-{asked.digest}-{size}-T{temperature:g}.pt"


def cached(folder: Path, temperature: float, asked: Prompts) -> Sampled:
    """`sample`, once."""
    path = cache_path(folder, temperature, asked)
    if not path.exists():
        write(path, sample(folder, temperature, asked)._asdict())
    return Sampled(**torch.load(path, weights_only=True))


@cache
def head_of(folder: Path) -> Tensor:  # [V, D] float32
    """The head's weight, or the embedding's where they are tied."""
    from safetensors import safe_open

    for wanted in ("lm_head.weight", "model.embed_tokens.weight"):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                if wanted in file.keys():  # noqa: SIM118
                    return file.get_tensor(wanted).float()
    raise ValueError(f"{folder} has neither lm_head.weight nor model.embed_tokens.weight in a safetensors file")


# --------------------------------------------------------------------------------------------------------- packing


def pack_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Q8_0: int8 [V, D / BLOCK, BLOCK] and float16 scales [V, D / BLOCK] of weight [V, D]."""
    if weight.shape[1] % BLOCK:
        raise ValueError(f"weight: expected a hidden size that {BLOCK} divides, got {weight.shape[1]}")
    blocks = weight.unflatten(1, (-1, BLOCK))  # [V, D / BLOCK, BLOCK]
    scales = (blocks.abs().amax(-1) / 127).half()  # [V, D / BLOCK]
    codes = (blocks / scales.float().clamp(min=1e-30)[..., None]).round().clamp(-127, 127)
    return codes.to(torch.int8), scales


def unpack_rows(codes: Tensor, scales: Tensor) -> Tensor:  # [V, D] float32
    return (codes.float() * scales.float()[..., None]).flatten(1)


def pack(out: Path, name: str, temperatures: tuple[float, ...] = TEMPERATURES) -> dict[str, object]:
    """Write OUT/states.pt of at most MAX_BYTES; returns what it says about itself."""
    folder, asked = policy(name)
    weight = head_of(folder)  # [V, D]
    codes, scales = pack_rows(weight)
    error = (unpack_rows(codes, scales) - weight).norm() / weight.norm()
    about = {"policy": title(name, folder), "version": version(folder), "error of the head": error.item()}
    record: dict[str, object] = {"about": about, "codes": codes, "scales": scales}
    for t in temperatures:
        s = cached(folder, t, asked)
        record[f"T={t:g}"] = s._replace(hidden=s.hidden.bfloat16(), targets=s.targets.int())._asdict()
    tensors = [codes, scales, *(x for t in temperatures for x in record[f"T={t:g}"].values())]  # type: ignore[attr-defined]
    if (size := sum(x.nbytes for x in tensors)) > MAX_BYTES:
        raise ValueError(f"{size / 2**20:.0f} MiB: expected at most {MAX_BYTES >> 20}; its head is too large to carry")
    write(out / "states.pt", record)
    return about | {"MiB": size / 2**20}


# --------------------------------------------------------------------------------------------------------- loading


def policy(name: str) -> tuple[Path, Prompts]:
    """A policy's folder, and what it is asked: `trained` is the folder that LAD_KERNELS_POLICY names."""
    if name == "trained":
        folder = Path(os.environ[POLICY])
        return folder, prompts_of(folder)
    from lad_kernels import pretrained

    if name == "untrained":
        return Path(pretrained.model_folder("smollm2")), prompts_of(Path(os.environ[POLICY]))
    return Path(pretrained.model_folder(name)), prompts_of()


def title(name: str, folder: Path) -> str:
    """What a table calls a policy: a trained one by its folder and version."""
    from lad_kernels import pretrained

    known = pretrained.KNOWN.get("smollm2" if name == "untrained" else name)
    return known.title if known else f"{folder.name} ({version(folder)})"


def packed_file() -> Path | None:
    """The packed file to use before any model: that of LAD_KERNELS_STATES, else what carry.sh left."""
    path = Path(os.environ.get(PACKED) or CARRIED) / "states.pt"
    return path if os.environ.get(PACKED) or path.exists() else None


@cache
def unpacked(path: Path) -> tuple[str, Tensor, dict[str, dict[str, Tensor]]]:
    """(policy, weight [V, D] float32, states by temperature) of a packed file."""
    record = torch.load(path, weights_only=True)
    return record["about"]["policy"], unpack_rows(record["codes"], record["scales"]), record


@cache
def load(name: str, sampled: float, scored: float) -> States:
    """States of a policy (`smollm2`, `trained`, ...) at a sampling temperature, for a loss at `scored` (that, or 1)."""
    if name == "smollm2" and (path := packed_file()):
        name, weight, record = unpacked(path)
        if f"T={sampled:g}" not in record:
            raise LookupError(f"{path} has no states sampled at {sampled:g}")
        s = Sampled(**record[f"T={sampled:g}"])
    else:
        folder, asked = policy(name)
        name, weight, s = title(name, folder), head_of(folder), cached(folder, sampled, asked)
    old = s.old_logprobs[[sampled, 1.0].index(scored)]  # [N]
    return States(name, s.hidden.float() / scored, weight, s.targets.long(), old)


def missing(name: str) -> str | None:
    """Why a policy's states cannot be had here; None if they can."""
    if name in ("trained", "untrained") and not os.environ.get(POLICY):
        return f"no folder of a trained policy is given (--policy, {POLICY})"
    if name == "smollm2" and (path := packed_file()):
        return None if path.exists() else f"{path} does not exist"
    try:
        policy(name)
    except Exception as error:  # Refused names the package; a checkout may lack the module
        return f"states of {name}: {error}"
    return None


def show(name: str) -> None:
    folder, asked = policy(name)
    for t in TEMPERATURES:
        s = cached(folder, t, asked)
        z = [h @ head_of(folder).T / t for h in s.hidden.split(256)]  # [256, V] each
        entropy = torch.cat([torch.distributions.Categorical(logits=x).entropy() for x in z])  # [N]
        ended = (s.lengths < asked.length).float().mean()
        print(
            f"T={t:g}: {len(s.targets)} tokens, mean entropy {entropy.mean():.3g} nats, {ended:.0%} ended by themselves"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("show", "pack"))
    parser.add_argument("out", type=Path, nargs="?", default=CARRIED)
    parser.add_argument("--policy", type=Path, help="a folder of transformers; default SmolLM2-135M-Instruct")
    args = parser.parse_args()
    if args.policy:
        os.environ[POLICY] = str(args.policy)
    name = "trained" if args.policy else "smollm2"
    if args.step == "pack":
        print(pack(args.out, name))
    else:
        show(name)


if __name__ == "__main__":
    main()
