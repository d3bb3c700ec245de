"""Options, inputs and the collection of results of `pytest benchmarks/`."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report, states
from benchmarks.harness import gate, machine
from benchmarks.harness.data import EVERYWHERE, MADE, REAL, Batch, fit, make_batches, missing
from benchmarks.harness.eager import EAGER
from benchmarks.harness.measure import Rounds, describe, peak_bytes_cuda, peaks_cpu, ratio, runs_on_cpu, summary
from benchmarks.harness.provider import Provider
from benchmarks.harness.providers import all_providers, split_available
from benchmarks.harness.results import RESULTS, Results
from benchmarks.harness.shapes import REAL_TOKENS, SETS, Shape

ROUNDS = {"tiny": 2, "sweep": 3, "small": 5, "full": 2, "gpu": 20}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lad_kernels benchmarks")
    group.addoption("--bench-set", default=None, choices=sorted(SETS), help="which shapes; default small, or gpu")
    group.addoption("--one-thread", action="store_true", help="CPU: one thread, its CPU time; for a busy machine")
    group.addoption("--policy", metavar="FOLDER", help="a trained policy, for the data of that name")
    group.addoption("--save", action="store_true", help="write benchmarks/results/<machine>/ and RESULTS.md")


def pytest_configure(config: pytest.Config) -> None:
    if folder := config.getoption("--policy"):
        os.environ[states.POLICY] = str(Path(folder).resolve())  # processes that measure memory read it too


def chosen_set(config: pytest.Config) -> str:
    return config.getoption("--bench-set") or ("gpu" if torch.cuda.is_available() else "small")


KINDS = {"test_memory": (MADE[0], *EVERYWHERE[len(MADE) :]), "test_sparse": (*MADE, *REAL)}  # others: EVERYWHERE


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Made data at every shape of the set, states of a policy at one number of tokens."""
    if "data" not in metafunc.fixturenames:
        return
    chosen, cases = chosen_set(metafunc.config), []
    for data in KINDS.get(metafunc.function.__name__, EVERYWHERE):
        if "trained" in data and not metafunc.config.getoption("--policy"):
            continue
        shapes = SETS[chosen] if data in MADE else (REAL_TOKENS[chosen],) if chosen in REAL_TOKENS else ()
        cases += [(shape, data) for shape in shapes]
    why = {data: missing(data) for _, data in cases}
    marks = {data: [pytest.mark.skip(reason=f"{x}; lost: its rows")] if x else [] for data, x in why.items()}
    if "shape" in metafunc.fixturenames:
        values = [pytest.param((s, d), d, marks=marks[d], id=f"{s.name}-{d}") for s, d in cases]
        metafunc.parametrize(("shape", "data"), values, indirect=["shape"], scope="session")
    else:
        values = [pytest.param(d, marks=marks[d], id=d) for d in dict.fromkeys(d for _, d in cases)]
        metafunc.parametrize("data", values, scope="session")


@pytest.fixture(scope="session")
def shape(request: pytest.FixtureRequest) -> Shape:
    return fit(*request.param)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    machine.flush_subnormals()  # before other threads start, which inherit it
    torch.set_num_threads(1 if pytestconfig.getoption("--one-thread") else machine.cores())
    return "cuda" if torch.cuda.is_available() else "cpu"


class Bench:
    """One session: its inputs, its gate, its rows."""

    def __init__(self, set_name: str, device: str, one_thread: bool, command: str):
        self.set_name, self.device, self.dtype = set_name, device, DTYPE[device]
        self.clock = time.process_time if one_thread else time.perf_counter
        notes = ["One thread; times are its CPU time, because other jobs ran on the machine."] if one_thread else []
        if device == "cpu":
            notes.append(machine.FLUSHED if machine.flush_subnormals() else machine.NOT_FLUSHED)
        self.results = Results({**machine.describe(device, command), "notes": notes})
        self._batches: tuple[object, list[Batch]] = (None, [])
        self._verdicts: dict[tuple[str, str, str], gate.Verdict | str] = {}
        self._peaks: dict[tuple[Shape, str], dict[str, dict[str, int | str]]] = {}

    def batches(self, shape: Shape, data: str) -> list[Batch]:
        """The last batch asked for is kept: tests of one shape and data set follow each other."""
        if self._batches[0] != (shape, data):
            self._batches = (None, [])
            self._batches = ((shape, data), make_batches(shape, data, self.dtype, self.device))
        return self._batches[1]

    def verdict(self, provider: Provider, data: str) -> gate.Verdict | str:
        """The gate's verdict, or why a peer could not run it; raises for a wrong provider of ours."""
        key = (provider.name, provider.job, data)
        if key not in self._verdicts:
            try:
                self._verdicts[key] = gate.check(provider, gate.gate_batch(data, self.dtype, self.device))
            except Exception as error:  # a peer that fails on the small input is reported, not timed
                if provider.ours:
                    raise
                self._verdicts[key] = describe(error)
        return self._verdicts[key]

    def providers(
        self, job: str, shape: Shape, data: str, names: tuple[str, ...] = ()
    ) -> tuple[list[Provider], dict[Provider, gate.Verdict]]:
        """Providers (all, or those of `names`) that can run and passed the gate (ours) or were measured by it."""
        batch = self.batches(shape, data)[0]
        wanted = [p for p in all_providers(job) if not names or p.name in names]
        available, missing = split_available(wanted, batch)
        self.results.missing |= missing
        if self.device == "cpu":
            available = [p for p in available if runs_on_cpu(p, self.set_name, shape)]
        verdicts = {p: self.verdict(p, data) for p in available}
        self.results.missing |= {p.name: v for p, v in verdicts.items() if isinstance(v, str)}
        good = {p: v for p, v in verdicts.items() if not isinstance(v, str)}
        return list(good), good

    def peaks(self, shape: Shape, data: str) -> dict[str, dict[str, int | str]]:
        """{job: {provider: peak bytes beyond the inputs, or why it failed}}, measured once per shape and policy.

        Of made data those of flat, where a tail is dense.
        """
        key = (shape, data if data in REAL else MADE[0])
        if key not in self._peaks:
            self._peaks[key] = peaks_cpu(self.set_name, *key) if self.device == "cpu" else self._on_cuda(*key)
        return self._peaks[key]

    def _on_cuda(self, shape: Shape, data: str) -> dict[str, dict[str, int | str]]:
        batch, found = self.batches(shape, data)[0], {}
        for provider in split_available(all_providers(), batch)[0]:
            try:
                found.setdefault(provider.job, {})[provider.name] = peak_bytes_cuda(provider, batch)
            except Exception as error:  # a peer's failure, out of memory among them, is a result
                if provider.ours:
                    raise
                found.setdefault(provider.job, {})[provider.name] = describe(error)
        return found

    def add_speed(self, rounds: Rounds, job: str, shape: Shape, data: str, verdicts: dict) -> None:
        self.results.missing |= rounds.failed
        baseline = next((s for p, s in rounds.samples.items() if p.name == EAGER), None)
        for provider, samples in rounds.samples.items():
            self.results.add(
                "speed", job=job, shape=str(shape), data=data, dtype=str(self.dtype).removeprefix("torch."),
                provider=provider.name, ours=provider.ours, note=provider.note, rounds=len(samples),
                **summary(samples), vs_eager=ratio(samples, baseline) if baseline else None,
                errors=verdicts[provider].errors, outside=verdicts[provider].failed,
            )  # fmt: skip


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config, device: str):
    command = shlex.join(["pytest", *map(str, pytestconfig.invocation_params.args)])
    session = Bench(chosen_set(pytestconfig), device, pytestconfig.getoption("--one-thread"), command)
    yield session
    pytestconfig.stash[REPORT] = report.render([session.results])


@pytest.fixture(autouse=True)
def save(bench: Bench, pytestconfig: pytest.Config):
    """With --save, results are on disk after every test."""
    yield
    if pytestconfig.getoption("--save"):
        bench.results.save(RESULTS / machine.folder(bench.device) / f"{bench.set_name}.json")
        report.write()


REPORT: pytest.StashKey[str] = pytest.StashKey()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if REPORT in config.stash:
        terminalreporter.write_line(config.stash[REPORT])


@pytest.fixture
def rounds(bench: Bench) -> int:
    return int(os.environ.get("LAD_KERNELS_BENCH_ROUNDS", ROUNDS[bench.set_name]))
