"""Scores a model's text safely: what may reach a scorer, and the process in which it runs.

Several scorers of reasoning-gym evaluate the text (`eval`, sympy's `parse_expr`), others can be made to compute without
end. So three conditions hold: an answer is no longer than the data set's own answers make plausible; for the scorers
that evaluate, it consists only of the characters and names of an answer (`admits`); and it is scored in a `Worker`, a
process of its own that is killed when it takes too long. An answer that fails a condition scores 0. SECURITY.md says
what this protects from and what it does not.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CPU_SECONDS = 5.0  # per answer; the slowest right one takes 0.4
WALL_SECONDS = 60.0  # per answer: only for scorers that wait instead of computing, even on a heavily loaded machine
BATCH_SECONDS = 120.0  # CPU seconds per batch
START_SECONDS = 300.0  # wall clock until the worker has imported reasoning-gym
_PROGRAM = str(Path(__file__).with_name("scoring_worker.py"))

# The data sets whose scorers were read and are tested with hostile text in tests/programs/test_scoring.py. Others are
# refused: a scorer that was not read may evaluate its input.
KNOWN = frozenset(
    """
    ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation
    binary_matrix bitwise_arithmetic boxnet caesar_cipher calendar_arithmetic chain_sum circuit_logic codeio
    coin_flip color_cube_rotation complex_arithmetic count_bits count_primes countdown course_schedule cryptarithm
    decimal_arithmetic decimal_chain_sum dice emoji_mystery family_relationships figlet_font
    fraction_simplification futoshiki game_of_life game_of_life_halting gcd graph_color group_anagrams gsm_symbolic
    intermediate_integration isomorphic_strings jugs kakurasu knight_swap knights_knaves largest_island lcm
    leg_counting letter_counting letter_jumble list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku
    modulo_grid n_queens needle_haystack number_filtering number_format number_sequence number_sorting
    palindrome_generation palindrome_partitioning path_star polynomial_equations polynomial_multiplication
    pool_matrix power_function prime_factorization products propositional_logic puzzle24 quantum_lock ransom_note
    rearc rectangle_count rotate_matrix rotten_oranges rubiks_cube rush_hour self_reference sentence_reordering
    shortest_path simple_equations simple_geometry simple_integration sokoban spell_backward spiral_matrix
    string_insertion string_manipulation string_splitting string_synthesis sudoku survo syllogism time_intervals
    tower_of_hanoi tsumego word_ladder word_sequence_reversal word_sorting zebra_puzzles
    """.split()  # noqa: SIM905
)
REFUSED = {"composite": "it scores by other data sets; name one of them"}

_FUNCTIONS = "Abs|Rational|exp|ln|log|sqrt|a?(?:sin|cos|tan)h?|sec|csc|cot"
_NAME = re.compile(f"{_FUNCTIONS}|pi|[A-MPRT-Za-z]|C[0-9]")  # N, O, Q and S are functions of sympy
_TOKEN = re.compile(r"[0-9.]+|\w+|\*\*|[\s\S]")
_NUMBER = re.compile(r"[0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15}")
# Exponents above 99, and powers of a number in an exponent; a computed one runs into the CPU limit.
_TOWER = re.compile(r"\*\*[-+(]*(?:[0-9]{3}|[0-9.]+\*\*)")


def _algebra(text: str, own: str) -> bool:
    """Sums, products, small powers and elementary functions; `Integral` only where the own answer has it."""
    symbols = {*"+-*/(), ", "**", *re.findall(r"[A-Za-z]+", own)}
    fine = all(t in symbols or _NAME.fullmatch(t) or _NUMBER.fullmatch(t) for t in _TOKEN.findall(text))
    return fine and not _TOWER.search(text.replace(" ", ""))


def _characters(allowed: str) -> Callable[[str, str], bool]:
    pattern = re.compile(f"[{allowed}]*")
    return lambda text, own: pattern.fullmatch(text) is not None


def _arithmetic(text: str, own: str) -> bool:
    """Digits, brackets and single operators."""
    return re.fullmatch(r"[0-9+\-*/() ]+", text) is not None and "**" not in text and "//" not in text


# Filters for the scorers that evaluate text, and for two that accept NaN as right.
_FILTERS: dict[str, Callable[[str, str], bool]] = {
    "binary_matrix": _characters(r"0-9\-\[\], \n"),
    "complex_arithmetic": _characters(r"0-9.+\-*()ijIJeE "),
    "countdown": _arithmetic,
    "intermediate_integration": _algebra,
    "n_queens": _characters(r"Q_'\"\[\], \n"),
    "number_sorting": _characters(r"0-9.+\-eE'\"\[\], \n"),
    "polynomial_multiplication": _algebra,
    "puzzle24": _arithmetic,
    "simple_integration": _algebra,
    "spiral_matrix": _characters(r"0-9\-\[\], \n"),
    "string_insertion": _characters(r"A-E'\"\[\], \n"),
}
# What passes these filters is cheap to score, so they run without the worker where there is none.
_BOUNDED = {"binary_matrix", "countdown", "n_queens", "puzzle24", "spiral_matrix", "string_insertion"}


def admits(name: str, text: str, own: str) -> bool:
    """Whether data set `name` may score `text`, where its own answer is `own`."""
    accepts = _FILTERS.get(name)
    return accepts is None or accepts(text, own)


def check(name: str) -> None:
    """Refuse a data set whose scorer is not known to be safe, before any of its code runs.

    Raises:
        ValueError: it is not in `KNOWN`.
    """
    if name in REFUSED:
        raise ValueError(f"task: expected a data set that scores by itself, got {name!r}: {REFUSED[name]}")
    if name not in KNOWN:
        raise ValueError(
            f"task: expected a data set of reasoning-gym whose scorer is known, got {name!r}; read its `score_answer`, "
            "then add it to KNOWN in `integration/scoring.py`, with a filter if it evaluates text"
        )


def needs_worker(name: str, compares: bool) -> bool:
    """Whether answers are scored in the worker; `compares`: the scorer is reasoning-gym's comparison of two strings.

    Raises:
        ValueError: the data set needs a worker and the platform has no process limits.
    """
    if compares:
        return False
    if importlib.util.find_spec("resource") is not None:
        return True
    if name in _BOUNDED:
        return False
    raise ValueError(
        "task: expected a data set that can be scored without process limits, since this platform has none, got "
        f"{name!r}; run on Linux or macOS, or choose one of {', '.join(sorted(_BOUNDED))}, or one whose answers are "
        "compared as strings, such as gcd"
    )


REASONS = {
    "batch": f"after {BATCH_SECONDS:g} CPU seconds for the whole batch",
    "cpu": f"after {CPU_SECONDS:g} CPU seconds",
    "died": "because the scoring process was killed, twice",
    "forbidden": "at an attempt to leave the scoring process",
    "wall": f"after {WALL_SECONDS:g} seconds without computing",
}


class Outcome(NamedTuple):
    """A score, the CPU seconds it took, and why it was stopped: a key of `REASONS`."""

    score: float
    seconds: float
    stopped: str | None = None


class Worker:
    """A process that scores answers, started with the first one and restarted when it has ended.

    It may be shared by threads. A forked child starts one of its own. It ends with the process that started it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._owner = 0  # the process that may talk to it
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.close)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def score(self, specification: bytes, entry: dict[str, Any], text: str) -> Outcome:
        """The score of `text` by the data set of `specification`, a pickled (name, keyword arguments).

        Raises:
            RuntimeError: the worker does not start, or cannot build the data set.
        """
        request = pickle.dumps((specification, entry, text, CPU_SECONDS))
        with self._lock:
            for _ in range(2):
                kind, value, seconds = self._ask(request)
                if kind in ("died", "wall"):
                    self.close()
                if kind != "died":  # a process killed from outside says nothing about the answer
                    break
        if kind == "unbuildable":
            raise RuntimeError(f"scoring: the worker cannot build the data set {specification!r}")
        if kind == "score":
            return Outcome(value, seconds)
        return Outcome(0.0, 0.0 if kind == "forbidden" else CPU_SECONDS, kind)

    def close(self) -> None:
        """End the process; the next answer starts another."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        with contextlib.suppress(OSError):
            process.stdin.close()
        _kill(process)
        process.stdout.close()
        process.wait()

    def _forget(self) -> None:
        """After a fork: the process belongs to the parent, and another thread of it may have held the lock."""
        self._process, self._lock = None, threading.Lock()

    def _ask(self, request: bytes) -> tuple[str, float, float]:
        """(kind, score, CPU seconds): one of the worker's kinds, or "wall"."""
        from integration.scoring_worker import KINDS, REPLY  # not at the top: needs a platform with limits

        if self._process is None:
            self._start()
        late, reply = threading.Event(), b""
        with _deadline(self._process, WALL_SECONDS, late), contextlib.suppress(OSError):
            self._process.stdin.write(request)
            self._process.stdin.flush()
            reply = self._process.stdout.read(REPLY.size)
        if late.is_set():
            return "wall", 0.0, 0.0
        if len(reply) < REPLY.size:
            return "died", 0.0, 0.0
        kind, value, seconds = REPLY.unpack(reply)
        return KINDS[kind] if kind < len(KINDS) else "died", value, seconds

    def _start(self) -> None:
        # Nothing can be created in the removed directory that the worker is left in.
        with tempfile.TemporaryDirectory(prefix="scoring-", ignore_cleanup_errors=True) as folder:
            environment = {
                "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p),
                "PYTHONHASHSEED": "0",  # a score is a function of the answer
                **dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR"), folder),
                **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
                **{name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ},
            }
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-B", _PROGRAM],  # files next to it have names of packages; no .pyc files
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=folder,
                env=environment,
                start_new_session=True,  # Ctrl-C is the trainer's
            )
            self._owner = os.getpid()
            with _deadline(self._process, START_SECONDS, threading.Event()):
                ready = self._process.stdout.read(1)
        if ready != b"\n":
            self.close()
            raise RuntimeError("scoring: the worker did not start; its error is printed above")


def _kill(process: subprocess.Popen) -> None:
    """End both processes; until it is waited for, the first one's id is not reused."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _deadline(process: subprocess.Popen, seconds: float, late: threading.Event):
    """Kill the process after `seconds`, even if it blocks on its pipes."""

    def expire() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


worker = Worker()  # one for all tasks of a process
