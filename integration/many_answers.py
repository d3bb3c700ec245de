"""A task with many right answers, whose measures are sums over all of them and need no sampling: `docs/diversity.md`.

All prompts begin with the same lines and many completions are equal, so a batch is run as one tree of tokens in which
a common beginning occurs once: 256 completions of 8 prompts are some 350 tokens, under an attention mask that lets a
token see its own ancestors. The last hidden states are those of separate sequences.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from integration.policy import fast_bf16
from lad_kernels import linear_logprobs

SOLVED = (
    "A number larger than 40 but smaller than 52: 47\n"
    "A number larger than 65 but smaller than 83: 70\n"
    "A number larger than 21 but smaller than 29: 24\n"
)
BOUNDS = [(low, low + gap) for gap in (9, 14, 21) for low in range(13, 78, 3)]  # 66 problems
HELD_OUT = 10
Answer = tuple[int, ...]  # token ids, up to and with the newline


class Problem(NamedTuple):
    """A prompt and everything that answers it."""

    bounds: tuple[int, int]
    prompt: list[int]  # token ids
    right: list[Answer]


class Split(NamedTuple):
    """Problems to train on, and those that no update sees."""

    train: list[Problem]
    held_out: list[Problem]
    newline: int  # token id that ends an answer


def make_problems(tokenizer: PreTrainedTokenizerBase) -> Split:
    """All problems, in an order that no seed changes.

    Raises:
        ValueError: the tokenizer joins the end of a prompt with an answer, or a newline is not one token.
    """
    problems, newline = [], tokenizer("\n", add_special_tokens=False).input_ids
    for low, high in BOUNDS:
        text = f"{SOLVED}A number larger than {low} but smaller than {high}: "
        prompt, right = tokenizer(text).input_ids, []
        for number in range(low + 1, high):
            whole = tokenizer(f"{text}{number}\n").input_ids
            if whole[: len(prompt)] != prompt or whole[-1:] != newline:
                raise ValueError(
                    f"model: expected a tokenizer that splits a prompt from its answer and an answer from its newline, "
                    f"got {tokenizer.convert_ids_to_tokens(whole[-5:])}; take another model"
                )
            right.append(tuple(whole[len(prompt) :]))
        problems.append(Problem((low, high), prompt, right))
    random.Random(0).shuffle(problems)
    return Split(problems[HELD_OUT:], problems[:HELD_OUT], newline[0])


class TokenTree:
    """Sequences that share their beginnings: one node a token, numbered in the order of insertion."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, int], int] = {}  # (the node before, token) -> node

    def __len__(self) -> int:
        return len(self._nodes)

    def add(self, tokens: list[int] | Answer, node: int = -1) -> int:
        """The node at which `tokens`, continued from `node` (-1: the beginning), end."""
        for token in tokens:
            node = self._nodes.setdefault((node, token), len(self))
        return node

    def inputs(self, device: torch.device, first: int = 0) -> dict[str, Tensor]:
        """Arguments of the model for the nodes from `first` on; the nodes before are in its cache."""
        tokens = [token for _, token in self._nodes]
        sees = torch.eye(len(self), dtype=torch.bool)  # [K, K]
        for (parent, _), node in self._nodes.items():
            if parent >= 0:
                sees[node] |= sees[parent]
        return {
            "input_ids": torch.tensor([tokens[first:]], device=device),  # [1, K - first]
            "position_ids": (sees[None, first:].sum(-1) - 1).to(device),  # [1, K - first], ancestors of each
            "attention_mask": sees[None, None, first:].to(device),  # [1, 1, K - first, K]
        }


class Paths(NamedTuple):
    """R answers in a tree: for each of up to T tokens the node before it."""

    tree: TokenTree
    node: Tensor  # [R, T]
    token: Tensor  # [R, T]
    mask: Tensor  # [R, T] bool


def paths_of(problems: list[Problem], answers: list[list[Answer]], device: torch.device) -> Paths:
    """`answers[i]` continue the prompt of `problems[i]`."""
    tree, rows = TokenTree(), []
    ends = [tree.add(problem.prompt) for problem in problems]
    width = max(len(answer) for group in answers for answer in group)  # T
    for end, group in zip(ends, answers, strict=True):
        for answer in group:
            nodes = [end]
            for token in answer[:-1]:
                nodes.append(tree.add([token], nodes[-1]))
            padding = [0] * (width - len(answer))
            rows.append((nodes + padding, [*answer, *padding], [True] * len(answer) + [False] * len(padding)))
    return Paths(tree, *(torch.tensor(column, device=device) for column in zip(*rows)))


def hidden_states(model: PreTrainedModel, inputs: dict[str, Tensor], **cache: Any) -> Tensor:  # [K, D] float32
    """Last hidden states of the nodes of a tree, which the head multiplies."""
    kind = inputs["input_ids"].device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" or fast_bf16()):
        return model.base_model(**inputs, use_cache=bool(cache), **cache).last_hidden_state[0].float()


class Scores(NamedTuple):
    """Of every token of every answer, 0 where the mask is False; differentiable."""

    logprobs: Tensor  # [R, T]
    entropy: Tensor | None  # [R, T], of the distribution the token was drawn from, nats


def score(model: PreTrainedModel, paths: Paths, return_entropy: bool = False) -> Scores:
    """Equal answers have equal log-probs, so the head runs once for each distinct pair of a node and its token."""
    pairs = torch.stack([paths.node, paths.token], -1).where(paths.mask[..., None], -1)  # [R, T, 2]
    distinct, index = pairs.flatten(0, 1).unique(dim=0, return_inverse=True)  # [S, 2], [R * T]
    nodes, tokens = distinct[:, 0].clamp(min=0), distinct[:, 1].clamp(min=0)  # [S], [S]
    index = index.view_as(paths.node)  # [R, T]
    hidden = hidden_states(model, paths.tree.inputs(nodes.device))[nodes]  # [S, D]
    weight = model.get_output_embeddings().weight  # [V, D]
    out = linear_logprobs(hidden, weight, tokens, return_entropy=return_entropy)  # [S]
    entropy = torch.where(paths.mask, out.entropy[index], 0.0) if return_entropy else None
    return Scores(torch.where(paths.mask, out.logprobs[index], 0.0), entropy)


@torch.no_grad()
def right_probabilities(model: PreTrainedModel, problems: list[Problem]) -> list[Tensor]:
    """The probability of each right answer, one tensor a problem."""
    answers = [problem.right for problem in problems]
    logprobs = score(model, paths_of(problems, answers, model.device)).logprobs  # [R, T]
    return list(logprobs.double().sum(-1).exp().cpu().split([len(right) for right in answers]))


def measures(right: list[Tensor], start: list[Tensor]) -> dict[str, float]:
    """Means over problems, from the probabilities of the right answers; `start`: those before training.

    Keys: accuracy; pass@8; distinct: right answers expected to occur in 64 draws; entropy: over right answers, given
    that the answer is right, in nats; tv_to_start: total variation to the start's distribution over right answers.
    """
    rows = []
    for p, before in zip(right, start, strict=True):
        accuracy = p.sum()
        share, share_before = p / accuracy, before / before.sum()
        row = {
            "accuracy": accuracy,
            "pass@8": 1 - (1 - accuracy).clamp(min=0) ** 8,
            "distinct": (1 - (1 - p) ** 64).sum(),
            "entropy": torch.special.entr(share).sum(),
            "tv_to_start": 0.5 * (share - share_before).abs().sum(),
        }
        rows.append(row)
    return {name: torch.stack([row[name] for row in rows]).mean().item() for name in rows[0]}


@torch.no_grad()
def sample(
    model: PreTrainedModel, problems: list[Problem], group_size: int, newline: int, generator: torch.Generator
) -> list[list[Answer]]:
    """`group_size` answers a problem at temperature 1, up to a newline or the length of the longest right answer."""
    weight = model.get_output_embeddings().weight.float()  # [V, D]
    eos = model.generation_config.eos_token_id
    ends = {newline, *(eos if isinstance(eos, list) else [eos])}
    longest = max(len(answer) for problem in problems for answer in problem.right)
    tree, cache, done = TokenTree(), DynamicCache(config=model.config), 0
    at = [node for problem in problems for node in [tree.add(problem.prompt)] * group_size]  # [B] node of each draw
    answers: list[list[int]] = [[] for _ in at]
    unfinished = list(range(len(at)))
    for _ in range(longest):
        hidden = hidden_states(model, tree.inputs(model.device, done), past_key_values=cache)  # [K - done, D]
        waiting = Counter(at[draw] for draw in unfinished)
        nodes = sorted(waiting)
        logprobs = (hidden[torch.tensor(nodes) - done] @ weight.T).log_softmax(-1).cpu()  # [W, V]
        done = len(tree)
        drawn = {
            node: torch.multinomial(row.exp(), waiting[node], replacement=True, generator=generator).tolist()
            for node, row in zip(nodes, logprobs)
        }
        for draw in unfinished:
            answers[draw].append(drawn[at[draw]].pop())
        unfinished = [draw for draw in unfinished if answers[draw][-1] not in ends]
        if not unfinished:
            break
        for draw in unfinished:
            at[draw] = tree.add(answers[draw][-1:], at[draw])
    return [[tuple(x) for x in answers[i : i + group_size]] for i in range(0, len(at), group_size)]
