"""How a policy is asked and how its answers are read: the same for both trainers."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from integration.tasks import RIGHT, Entry, Task, tagged_answer

DIRECT = "Reply with the answer only."  # the system message where no tag is read
READ_AS = {"chat": "tag", "plain": "whole", "few_shot": "first_line"}  # how answers are read by default
FIRST_STEPS = 3  # of a run; rewards that are all equal in them are reported

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Form:
    """A form of prompt and the answer that it asks for."""

    # chat: the tokenizer's chat template, with reasoning-gym's system message; plain: the problem alone; few_shot:
    # `shots` training problems with their answers, a line each, then the problem's line.
    prompt: str
    shots: int
    answer: str  # what of a completion is scored: tag (the last <answer> tag's content), first_line or whole

    def ask(self, task: Task, entry: Entry, tokenizer: PreTrainedTokenizerBase) -> str | list[dict[str, str]]:
        """The prompt: messages for a chat template, else text."""
        if self.prompt == "chat":
            return task.chat_prompt(entry, tokenizer, *([] if self.answer == "tag" else [DIRECT]))
        if self.prompt == "plain":
            return task.prompt(entry)
        key = task.key(entry)
        solved = [e for e in task.train[: self.shots + 1] if task.key(e) != key][: self.shots]
        lines = [f"{one_line(task, e)} {task.solution(e, random.Random(0))}" for e in solved]
        return "\n".join([*lines, one_line(task, entry)])

    def read(self, text: str) -> str:
        """The answer in a completion; empty where there is none."""
        if self.answer == "tag":
            return tagged_answer(text)
        return text.strip().partition("\n")[0].strip() if self.answer == "first_line" else text


def form_of(config: Any, pretrained: bool) -> Form:
    """The form that a configuration names, or the default of a pretrained model or the small decoder."""
    prompt = config.prompt or ("chat" if pretrained else "plain")
    return Form(prompt, config.shots, config.answer or READ_AS[prompt])


def one_line(task: Task, entry: Entry) -> str:
    return " ".join(task.prompt(entry).split())


class EqualRewards:
    """Warns once if no completion of a run's first steps differs in its reward from the others: nothing is learnt."""

    def __init__(self, done: int = 0) -> None:
        self.left = FIRST_STEPS if done == 0 else 0
        self.reward: float | None = None

    def see(self, rewards: Sequence[float], texts: Sequence[str]) -> None:
        """Take the rewards of a step, and its completions as they were sampled."""
        if not self.left:
            return
        first = rewards[0] if self.reward is None else self.reward
        if first >= RIGHT or any(reward != first for reward in rewards):
            self.left = 0
            return
        self.left, self.reward = self.left - 1, first
        if not self.left:
            shown = "".join(f"\n  {text[:200]!r}" for text in texts[:3])
            logger.warning(
                f"every completion of the first {FIRST_STEPS} steps has reward {first:g}: nothing can be learnt from "
                f"them; try another --prompt, --answer, --task_options or a longer completion. Three of them:{shown}"
            )
