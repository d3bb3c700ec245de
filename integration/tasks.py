"""Problems with verifiable rewards from reasoning-gym, and a tokenizer small enough to build in process.

Rewards are the dataset's own `score_answer`; an answer is right when it scores 1. A model's text is not trusted:
scorers that compare two strings are called here, all others by `integration/scoring.py`, which gives text that it does
not admit, or that takes too long, a score of 0.
"""

from __future__ import annotations

import json
import pickle
import random
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import reasoning_gym
from jinja2 import TemplateError
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.utils import SYSTEM_PROMPTS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from integration import scoring
from lad_kernels.preflight import Refused

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
REMEMBERED = 1 << 16  # scores of a task


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and per pair of digits; decoding is plain concatenation."""
    entries = ["<pad>", "<eos>", "<unk>", "\n", "\t", *map(chr, range(32, 127)), *(f"{n:02d}" for n in range(100))]
    tokenizer = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,2}|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


@dataclass
class Task:
    """One reasoning-gym dataset, split into training and held-out problems.

    Raises:
        ValueError: reasoning-gym has no such dataset, its scorer is not known to be safe, or this platform cannot
            contain it.
    """

    name: str = "countdown"
    train_size: int = 3000  # problems generated; those that also occur in the held-out set are dropped
    held_out_size: int = 200  # problems generated
    seed: int = 0  # of the training problems; the held-out ones use `seed + 1_000_003`
    options: dict[str, Any] | None = None  # of the dataset; none takes `DEFAULT_OPTIONS`
    train: list[Entry] = field(init=False, repr=False)
    longest: int = field(init=False)  # characters of the longest training answer
    held_out: list[Entry] = field(init=False, repr=False)
    stopped: Counter[str] = field(init=False, default_factory=Counter)  # scorings that were stopped, by reason

    def __post_init__(self) -> None:
        scoring.check(self.name)
        options = DEFAULT_OPTIONS.get(self.name, {}) if self.options is None else self.options
        own = {"seed": self.seed, "size": self.train_size, **options}
        self._dataset = reasoning_gym.create_dataset(self.name, **own)
        compares = type(self._dataset).score_answer is ProceduralDataset.score_answer
        self._contained = scoring.needs_worker(self.name, compares)
        self._specification = pickle.dumps((self.name, own))
        self._scores: dict[tuple[str, str], float] = {}
        self.held_out = list(
            reasoning_gym.create_dataset(self.name, seed=self.seed + 1_000_003, size=self.held_out_size, **options)
        )
        known = {self.key(entry) for entry in self.held_out}
        self.train = [entry for entry in self._dataset if self.key(entry) not in known]
        if not self.train:
            raise ValueError(f"task {self.name!r}: every training problem also occurs in the held-out set")
        clean = normalize if self.name == "countdown" else str
        self.longest = max(len(clean(e["answer"] or "")) for e in self.train)
        # Other right answers may be longer than the dataset's own, and some datasets have none of their own.
        self._limit = 1024 + 4 * max(len(e["answer"] or "") for e in (*self.train, *self.held_out))

    def key(self, entry: Entry) -> str:
        """Identity of a problem: the order of countdown's numbers does not matter."""
        if self.name == "countdown":
            return json.dumps([sorted(entry["metadata"]["numbers"]), entry["metadata"]["target"]])
        return entry["question"]

    def prompt(self, entry: Entry) -> str:
        """Prompt for a model trained from scratch; short for countdown, so that a small model reads few tokens."""
        if self.name == "countdown":
            return f"{' '.join(map(str, entry['metadata']['numbers']))}={entry['metadata']['target']}:"
        return entry["question"] + "\n"

    def chat_prompt(
        self, entry: Entry, tokenizer: PreTrainedTokenizerBase, system: str = SYSTEM_PROMPTS["default"]
    ) -> str | list[dict[str, str]]:
        """Prompt for a pretrained model: messages where the tokenizer has a chat template, text where it has none.

        Where the template has no system message, its text is put before the question.
        """
        question = entry["question"]
        if tokenizer.chat_template is None:
            return f"{system}\n\n{question}\n\n"
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        try:
            tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError:  # Gemma 1 and 2, early Mistral
            return [{"role": "user", "content": f"{system}\n\n{question}"}]
        return messages

    def solution(self, entry: Entry, rng: random.Random) -> str:
        """A right answer to imitate; for countdown one of the orders of the expression's terms, drawn at random."""
        if entry["answer"] is None:
            raise ValueError(
                f"task: expected a data set with solutions to imitate, got {self.name!r}; use a model that "
                "answers without a warm start"
            )
        if self.name != "countdown":
            return entry["answer"]
        expression = normalize(entry["metadata"]["expression"])
        if "(" in expression:
            return expression
        signed = [term if term[0] in "+-" else "+" + term for term in re.findall(r"[+-]?[^+-]+", expression)]
        rng.shuffle(signed)
        first = next(i for i, term in enumerate(signed) if term[0] == "+")  # a positive term leads
        return "".join([signed.pop(first)[1:], *signed])

    def score(self, entry: Entry, text: str) -> float:
        """The dataset's own score of an answer; 0 if the scorer raises. See `scores`."""
        return self.scores([entry], [text])[0]

    def scores(self, entries: Sequence[Entry], texts: Sequence[str]) -> list[float]:
        """The dataset's own score of each answer, cached.

        Limits are CPU seconds, so that scores do not depend on the load of the machine. Answers whose scoring was
        stopped score 0, are counted in `stopped`, and a RuntimeWarning says so.
        """
        stopped, left, values = Counter(), scoring.BATCH_SECONDS, []
        for entry, text in zip(entries, texts, strict=True):
            answer = normalize(text) if self.name == "countdown" else text.strip()
            key = (entry["question"], answer)
            if key in self._scores:
                values.append(self._scores[key])
                continue
            if len(answer) > self._limit or not scoring.admits(self.name, answer, entry["answer"] or ""):
                values.append(0.0)
                continue
            outcome = self._score(entry, answer) if left > 0 else scoring.Outcome(0.0, 0.0, "batch")
            left -= outcome.seconds
            values.append(outcome.score)
            if outcome.stopped:
                stopped[outcome.stopped] += 1
            if outcome.stopped in (None, "cpu", "forbidden"):  # caused by the answer itself
                if len(self._scores) >= REMEMBERED:
                    self._scores.clear()
                self._scores[key] = outcome.score
        if stopped:
            self.stopped += stopped
            reasons = ", ".join(f"{count} {scoring.REASONS[reason]}" for reason, count in sorted(stopped.items()))
            warnings.warn(
                f"task {self.name!r}: {stopped.total()} of {len(values)} answers score 0 because scoring was stopped: "
                f"{reasons}; {self.stopped.total()} since the start",
                RuntimeWarning,
                stacklevel=2,
            )
        return values

    def _score(self, entry: Entry, answer: str) -> scoring.Outcome:
        if self._contained:
            return scoring.worker.score(self._specification, entry, answer)
        try:
            return scoring.Outcome(float(self._dataset.score_answer(answer, entry)), 0.0)
        except Exception:  # the text is arbitrary; one that makes the scorer raise is not right
            return scoring.Outcome(0.0, 0.0)


def build_task(config: Any, seed: int = 0) -> Task:
    """The task that a configuration names by `task`, `train_size`, `held_out_size` and `task_options`.

    Raises:
        Refused: the data set has no such options, or no problems of them.
    """
    given = config.task_options
    try:
        return Task(config.task, config.train_size, config.held_out_size, seed, given)
    except (AssertionError, TypeError, ValueError) as error:
        if given is None:
            raise Refused(
                f"task: expected problems to train on, got {error}; take another or a larger --train-size"
            ) from error
        raise Refused(
            f"task_options: expected options of {config.task!r}, got {given} ({error}); see reasoning-gym's own "
            f"documentation of this data set"
        ) from error


def encode_prompt(prompt: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids by the tokenizer's own rules: text gets its special tokens, messages those of the chat template alone.

    Raises:
        ValueError: the tokenizer ends every text with its end-of-sequence token, so that a prompt has no continuation.
    """
    if not isinstance(prompt, str):
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer(prompt).input_ids
    if ids and ids[-1] == tokenizer.eos_token_id:
        raise ValueError(
            f"tokenizer: expected prompts that can be continued, got one that ends with {tokenizer.eos_token!r}; "
            f"set add_eos_token to false in its tokenizer_config.json"
        )
    return ids


def normalize(text: str) -> str:
    """Answers that differ in white space only are the same answer."""
    return "".join(text.split())


def tagged_answer(text: str) -> str:
    """The part of a chat model's completion inside the last answer tag; empty when there is none.

    As `reasoning_gym.utils.extract_answer`, but in linear time whatever the number of tags left open.
    """
    closed = (part.partition("<answer>") for part in reversed(text.split("</answer>")[:-1]))
    return next((answer.strip() for _, opening, answer in closed if opening), "")
