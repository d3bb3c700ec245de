"""What the doctor finds, and what it finds wrong."""

from __future__ import annotations

import dataclasses
import io
import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich", reason="it needs the train extra: rich; lost: all tests of lad-kernels")
pytest.importorskip("packaging", reason="it needs the train extra: packaging; lost: all tests of lad-kernels")
pytest.importorskip("jsonargparse", reason="it needs the train extra: jsonargparse; lost: all tests of lad-kernels")

from rich.console import Console

from lad_kernels import doctor
from lad_kernels.head import cost, measured
from lad_kernels.head.head import Head
from lad_kernels.head.records import LogitTransform

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without CUDA; lost: one error message")


def report(monkeypatch, **asked) -> tuple[int, str]:
    """Exit status and text of the doctor; tests run with TRITON_INTERPRET=1 where there is no GPU, users do not."""
    monkeypatch.setenv("TRITON_INTERPRET", asked.pop("interpret", "0"))
    out = io.StringIO()
    status = doctor.main(doctor.Asked(**asked), Console(file=out, width=1000))
    return status, out.getvalue()


ASSUMED, MEASURE = cost.SPEEDS["cpu", 4], measured.measure


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    """The doctor measures what is assumed, at once."""
    monkeypatch.setattr(doctor.measured, "measure", lambda: ASSUMED)


def versions(monkeypatch, **found: str | None) -> None:
    """Pretend that these versions are installed, or that a package is not."""
    known = doctor.metadata.version

    def version(name: str) -> str:
        given = found.get(name.replace("-", "_"), known)
        if given is None:
            raise doctor.metadata.PackageNotFoundError(name)
        return known(name) if given is known else given

    monkeypatch.setattr(doctor.metadata, "version", version)


def ranges(monkeypatch, *lines: str) -> None:
    """Pretend that lad_kernels' metadata holds these requirements, with extras train and trl."""
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: list(lines))
    extras = type("Metadata", (), {"get_all": lambda self, key: ["train", "trl"]})
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: extras())


def test_doctor_names_device_versions_paths_and_switches(monkeypatch):
    monkeypatch.setenv("LAD_KERNELS_VALIDATE", "1")
    monkeypatch.setenv("LAD_KERNELS_ATOMICS", "true")
    status, text = report(monkeypatch, device="cpu", dtype="float32", hidden_size=64, vocab_size=999)
    assert status == 0, text
    assert doctor.metadata.version("torch") in text  # 2.11.0 where torch.__version__ is 2.11.0+cu130
    assert "D=64, V=999, torch.float32" in text
    assert "checked on accelerators too" in text
    assert "no effect: expected 1 or 0, got 'true'" in text
    assert "the kernels need a CUDA or ROCm device" in text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_doctor_promises_one_pass_only_where_the_head_has_it(monkeypatch, device, dtype):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    calls = doctor.paths(doctor.Asked(), torch.device(device), dtype)
    head = Head(torch.empty(0, 8, dtype=dtype), None, None, None, LogitTransform(1.0, None, 1.0), device == "cuda")
    given = {}
    monkeypatch.setattr(doctor.dispatch, "why", lambda *shape, **options: given.update(options))
    assert len(calls) == 3 * len(doctor.SHAPES)
    doctor.paths(doctor.Asked(), torch.device(device), dtype)
    assert given["one_pass"] == head.has_one_pass(False)


@pytest.mark.parametrize(("hip", "kind"), [(None, "compute capability 9.0"), ("7.0", "gfx942")])
def test_doctor_describes_accelerators(monkeypatch, hip, kind):
    """CUDA builds of torch fill gcnArchName with the device's name."""
    found = {"name": "A Device", "major": 9, "minor": 0, "total_memory": 141 << 30}
    found["gcnArchName"] = "gfx942" if hip else "A Device"
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(**found))
    rows = dict(doctor.machine(torch.device("cuda"), None))
    assert rows["cuda:0"] == f"A Device, {kind}, 141 GiB"
    assert rows["Triton kernels"] == "usable"


@NO_CUDA
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"impl": "triton"}, "impl='triton' was asked for, but the input is on cpu"),
        ({"device": "cuda"}, "a small LAD loss on cuda fails"),
        ({"require": ("nonsense",)}, "nonsense: expected one of torch"),
    ],
)
def test_doctor_fails_on_what_was_asked_for(monkeypatch, asked, words):
    status, text = report(monkeypatch, **asked)
    assert status == 1
    assert words in text


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("1.15.0", "outside the supported range"), ("1.13.2", "outside the supported range"), ("1.16.0", "ok")],
)
def test_doctor_knows_supported_versions(monkeypatch, version, verdict):
    ranges(monkeypatch, "torch>=2.11", "trl!=1.15.0,>=1.14; extra == 'trl'", "rich>=13; extra == 'train'")
    versions(monkeypatch, trl=version)
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: None)
    found = {part.name: part for part in doctor.packages()}
    assert found["trl"].verdict == verdict
    assert found["trl"].extra == "trl"
    assert found["torch"].required
    assert not found["trl"].required
    assert report(monkeypatch, device="cpu")[0] == 0  # nobody asked for TRL
    assert report(monkeypatch, device="cpu", require=("trl",))[0] == (verdict != "ok")


def test_doctor_says_which_extra_brings_a_missing_package(monkeypatch):
    ranges(monkeypatch, "torch>=2.11", "trl!=1.15.0,>=1.14; extra == 'trl'")
    versions(monkeypatch, trl=None)
    status, text = report(monkeypatch, device="cpu")
    assert status == 0
    assert "missing: pip install 'lad_kernels[trl]'" in text
    status, text = report(monkeypatch, device="cpu", require=("trl",))
    assert status == 1
    assert "broken trl missing: pip install 'lad_kernels[trl]'" in text


def test_doctor_fails_on_an_old_torch_and_on_a_package_that_does_not_import(monkeypatch):
    ranges(monkeypatch, "torch>=99")
    assert report(monkeypatch, device="cpu")[0] == 1
    ranges(monkeypatch, "torch>=2.11")

    def broken(name: str) -> None:
        raise OSError("libcudart.so not found")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    status, text = report(monkeypatch, device="cpu", require=("rich",))
    assert status == 1
    assert "rich cannot be imported: OSError: libcudart.so not found" in text


def test_doctor_asks_whether_verl_finds_the_plugin(monkeypatch):
    from lad_kernels.frameworks import verl

    ranges(monkeypatch, "torch>=2.11")
    versions(monkeypatch, verl="0.9.1")
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: None)
    for line, expected in (("verl 0.9.1: all of it are registered", 0), ("verl 0.9.1: NOT registered", 1)):
        monkeypatch.setattr(verl, "status", lambda line=line: line)
        assert report(monkeypatch, device="cpu", require=("verl",))[0] == expected
        assert report(monkeypatch, device="cpu")[0] == 0


def test_doctor_without_metadata_says_so(monkeypatch):
    def missing(name: str) -> None:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", missing)
    status, text = report(monkeypatch, device="cpu")
    assert status == 0
    assert "supported ranges are unknown" in text


def test_self_check_measures_and_can_fail(monkeypatch):
    assert 0 < doctor.self_check(torch.device("cpu"), "torch") <= doctor.SELF_CHECK / 10
    right = doctor.linear_lad_loss

    def wrong(*given, impl, **options):
        out = right(*given, impl=impl, **options)
        return out if impl == "reference" else out._replace(loss=out.loss * 1.0001)

    monkeypatch.setattr(doctor, "linear_lad_loss", wrong)
    status, text = report(monkeypatch, device="cpu")
    assert status == 1
    assert "self-check: expected an error of at most 1e-05" in text


@pytest.mark.parametrize("name", ["bytes", "element", "routed_efficiency", "block"])
@pytest.mark.parametrize(("factor", "told"), [(1.19, False), (1 / 1.19, False), (1.25, True), (1 / 1.25, True)])
def test_doctor_says_what_to_set_where_a_speed_is_off_by_more_than_a_fifth(monkeypatch, name, factor, told):
    found = dataclasses.replace(ASSUMED, **{name: factor * getattr(ASSUMED, name)})
    monkeypatch.setattr(doctor.measured, "measure", lambda: found)
    status, text = report(monkeypatch, device="cpu")
    assert status == 0
    assert "routed, ms a block" in text
    assert (f"off by more than a fifth: {name};" in text) == told
    assert ("LAD_KERNELS_CPU_SPEEDS=" in text) == told
    if told:  # the line that is printed, set, ends the advice
        monkeypatch.setenv(cost.CPU_SPEEDS, text.split("LAD_KERNELS_CPU_SPEEDS=")[1].split()[0])
        assert measured.compare(found, cost.cpu_speeds(ASSUMED))[1] is None


def test_a_cpu_that_is_faster_at_everything_has_nothing_to_set(monkeypatch):
    """Only ratios decide."""
    double = cost.Speeds(
        2 * ASSUMED.flops, 2 * ASSUMED.bytes, ASSUMED.element / 2, ASSUMED.routed_efficiency, ASSUMED.block / 2
    )
    assert measured.compare(double, ASSUMED)[1] is None
    monkeypatch.setattr(doctor.measured, "measure", lambda: double)
    assert "off by more" not in report(monkeypatch, device="cpu")[1]


def test_a_busy_machine_gives_no_absurd_speed():
    """Many tokens in less time than few, which another process had delayed."""
    took, now, calls = itertools.cycle((1.0, 1.0, 1.0, 1.0, 0.5, 1.0)), 0.0, 0  # of product to many, and hidden

    def clock() -> float:
        nonlocal now, calls
        if calls > 7 and calls % 2 == 0:  # the deadline, six untimed rounds, then starts and ends
            now += next(took)
        calls += 1
        return now

    found = MEASURE(seconds=0.0, clock=clock)
    assert 0.1 < found.routed_efficiency < 10
    assert found.block > 0


def test_speeds_are_measured():
    """Any CPU copies at 0.1 to 1,000 GB/s, and no product of gathered tokens is ten times a large one's rate."""
    found = MEASURE(seconds=0.0)
    assert 1e8 < found.flops < 1e15
    assert 1e8 < found.bytes < 1e12
    assert 1e-12 < found.element < 1e-6
    assert 0 < found.routed_efficiency < 10
    assert 0 < found.block < 1


@pytest.mark.parametrize(
    ("flags", "precision", "said"),
    [("avx512f amx_bf16", "none", "half the time"), ("avx512f amx_bf16", "bf16", "AMX"), ("avx512f", "none", "no AMX")],
)
def test_units_of_a_cpu_that_lie_idle_are_named(flags, precision, said, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}")
    monkeypatch.setattr(doctor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", SimpleNamespace(fp32_precision=precision))
    found = dict(doctor.machine(torch.device("cpu"), None))["bfloat16 units"]
    assert found.startswith("no AMX" if said == "no AMX" else "AMX")
    assert said in found
    assert ("fp32_precision" in found) == (said == "half the time")
    assert "bfloat16 units" not in dict(doctor.machine(torch.device("cuda"), None))
