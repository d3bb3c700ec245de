"""Problems with verifiable rewards from reasoning-gym, and a tokenizer small enough to build in process.

A `Task` wraps one reasoning-gym dataset: training and held-out problems from different seeds (a held-out problem never
occurs in training, in any order of its numbers), prompts, warm-start solutions and rewards. Rewards are the dataset's
own `score_answer`; an answer is right when it scores 1. Some scorers hand the text to sympy's parser, which evaluates
it, so countdown answers reach the scorer only when they consist of digits, brackets and single operators.

The tokenizer knows printable ASCII and every pair of digits, so that numbers below 100 are one token.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field
from typing import Any

import reasoning_gym
from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Entry = dict[str, Any]  # reasoning-gym: question, answer, metadata

# Countdown with many right answers per problem: four small numbers, addition and subtraction, every order counts.
DEFAULT_OPTIONS = {
    "countdown": {
        "min_numbers": 4,
        "max_numbers": 4,
        "min_value": 1,
        "max_value": 6,
        "min_target": 1,
        "max_target": 20,
        "operators": ("+", "-"),
    }
}
RIGHT = 1.0 - 1e-6  # scores from here on count as right
_ARITHMETIC = re.compile(r"[\d+\-*/() ]{1,64}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and per pair of digits; decoding is plain concatenation."""
    words = ["<pad>", "<eos>", "<unk>", "\n", "\t", *map(chr, range(32, 127)), *(f"{n:02d}" for n in range(100))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,2}|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


@dataclass
class Task:
    """One reasoning-gym dataset, split into training and held-out problems.

    Attributes:
        name: a reasoning-gym dataset name.
        train_size, held_out_size: problems generated; training ones that also occur in the held-out set are dropped.
        seed: the training problems use it, the held-out ones `seed + 1_000_003`.
        options: dataset options; None takes `DEFAULT_OPTIONS`.
    """

    name: str = "countdown"
    train_size: int = 3000
    held_out_size: int = 200
    seed: int = 0
    options: dict[str, Any] | None = None
    train: list[Entry] = field(init=False, repr=False)
    longest: int = field(init=False)  # characters of the longest training answer
    held_out: list[Entry] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        options = DEFAULT_OPTIONS.get(self.name, {}) if self.options is None else self.options
        self._dataset = reasoning_gym.create_dataset(self.name, seed=self.seed, size=self.train_size, **options)
        held_out = reasoning_gym.create_dataset(
            self.name, seed=self.seed + 1_000_003, size=self.held_out_size, **options
        )
        self._scores: dict[tuple[str, str], float] = {}
        self.held_out = [held_out[i] for i in range(self.held_out_size)]
        known = {self.key(entry) for entry in self.held_out}
        generated = (self._dataset[i] for i in range(self.train_size))
        self.train = [entry for entry in generated if self.key(entry) not in known]
        if not self.train:
            raise ValueError(f"task {self.name!r}: every training problem also occurs in the held-out set")
        self.longest = max(len(normalize(e["answer"]) if self.name == "countdown" else e["answer"]) for e in self.train)

    def key(self, entry: Entry) -> str:
        """Identity of a problem: the order of countdown's numbers does not matter."""
        if self.name == "countdown":
            return json.dumps([sorted(entry["metadata"]["numbers"]), entry["metadata"]["target"]])
        return entry["question"]

    def prompt(self, entry: Entry) -> str:
        """Prompt for a model trained from scratch; short for countdown, so that a small model sees few tokens."""
        if self.name == "countdown":
            return f"{' '.join(map(str, entry['metadata']['numbers']))}={entry['metadata']['target']}:"
        return entry["question"] + "\n"

    def chat_prompt(self, entry: Entry, tokenizer: PreTrainedTokenizerBase) -> str:
        """Prompt for a pretrained chat model, in its own template."""
        messages = [
            {"role": "system", "content": SYSTEM_PROMPTS["default"]},
            {"role": "user", "content": entry["question"]},
        ]
        if tokenizer.chat_template is None:
            return "\n\n".join(message["content"] for message in messages) + "\n\n"
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def solution(self, entry: Entry, rng: random.Random) -> str:
        """A right answer to imitate; for countdown one of the orders of the expression's terms, drawn at random."""
        if self.name != "countdown":
            return entry["answer"]
        expression = normalize(entry["metadata"]["expression"])
        if "(" in expression:
            return expression
        terms = re.findall(r"[+-]?[^+-]+", expression)
        signed = [term if term[0] in "+-" else "+" + term for term in terms]
        rng.shuffle(signed)
        first = next(i for i, term in enumerate(signed) if term[0] == "+")  # a positive term leads
        return "".join([signed.pop(first)[1:], *signed])

    def score(self, entry: Entry, text: str) -> float:
        """The dataset's own score of an answer, cached; whatever it cannot digest scores 0."""
        answer = normalize(text) if self.name == "countdown" else text.strip()
        cache_key = (entry["question"], answer)
        if cache_key not in self._scores:
            self._scores[cache_key] = self._score(entry, answer)
        return self._scores[cache_key]

    def _score(self, entry: Entry, answer: str) -> float:
        if self.name == "countdown" and (not _ARITHMETIC.fullmatch(answer) or "**" in answer or "//" in answer):
            return 0.0
        try:
            return float(self._dataset.score_answer(answer, entry))
        except Exception:  # 106 scorers, any text: a scorer that chokes on it has not found it right
            return 0.0


def normalize(text: str) -> str:
    """Answers that differ in white space only are the same answer."""
    return "".join(text.split())


def tagged_answer(text: str) -> str:
    """The part of a chat model's completion inside the last answer tag; empty when there is none."""
    return extract_answer(text) or ""
