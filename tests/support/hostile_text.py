"""Answers that are code or cost unbounded time, and the tasks that score them."""

from __future__ import annotations

import functools
from pathlib import Path

from integration.tasks import Task


@functools.cache
def task(name: str) -> Task:
    return Task(name, train_size=2, held_out_size=1)


def evaluator() -> tuple[bytes, dict]:
    """A data set whose scorer evaluates anything, to reach the worker past the filters."""
    return task("string_insertion")._specification, task("string_insertion").train[0]


def escapes(file: Path) -> list[str]:
    """Code that leaves a file behind."""
    call = f"system('touch {file}')"
    return [
        f"__import__('os').{call}",
        f"open('{file}','w')",
        f"[c for c in ().__class__.__base__.__subclasses__() if c.__name__=='_wrap_close'][0]"
        f".__init__.__globals__['{call[:6]}']('touch {file}')",
        f"(lambda: __import__('pathlib').Path('{file}').touch())()",
        f"__import__('subprocess').run(['touch','{file}'])",
        f"__import__('os').mkdir('{file}')",
        f'S(\'open("{file}", "w")\')',
        f"{{'x': [open('{file}','w')]}}",
    ]


BOMBS = [
    "9**9**9",
    "((((9**99)**99)**99)**99)**99",
    "10**10**9",
    "9" * 10**7,
    "9" * 4000,
    "1e999999999",
    "'a'*10**10",
    "[0]*10**10",
    "F99999999",
    "∧".join(f"a{i}" for i in range(200)),
    "sum(iter(int,1))",
    "while True: pass",
    "factorial(factorial(99))",
    "(" * 900 + ")" * 900,
    "[" * 1000 + "]" * 1000,
    '{"a":' * 300 + "1" + "}" * 300,
    "-" * 1000 + "1",
    "<answer>" * 100,
    " \t" * 500 + "x",
    "a" * 600 + "!" * 400,
    "\\frac{" + "1" * 500,
    "nan",
    "NaN",
    "inf",
    "-Infinity",
    "nan+nanj",
    "[NaN, NaN, NaN]",
    "1\x002",
    "\ud800\udfff",
    "",
    "exit()",
    "raise SystemExit",
]
