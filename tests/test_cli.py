"""The command line: flags and YAML, what each command runs, and what the doctor finds wrong."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich", reason="it needs the train extra: rich; lost: all tests of lad-kernels")
pytest.importorskip("packaging", reason="it needs the train extra: packaging; lost: all tests of lad-kernels")
pytest.importorskip("jsonargparse", reason="it needs the train extra: jsonargparse; lost: all tests of lad-kernels")

from rich.console import Console

from integration import cli, doctor
from integration.flags import parse_flags
from lad_kernels.head.autograd import Head
from lad_kernels.head.logits import LogitTransform

ROOT = Path(__file__).resolve().parent.parent
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without CUDA; lost: one error message")


def report(monkeypatch, **asked) -> tuple[int, str]:
    """Exit status and text of the doctor; tests run with TRITON_INTERPRET=1 where there is no GPU, users do not."""
    monkeypatch.setenv("TRITON_INTERPRET", asked.pop("interpret", "0"))
    out = io.StringIO()
    status = doctor.main(doctor.Asked(**asked), Console(file=out, width=1000))
    return status, out.getvalue()


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


def test_help_and_doctor_start_without_heavy_imports():
    code = (
        "import sys; from integration import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules\n"
        "assert cli.main(['doctor', '--device', 'cpu', '--tokens', '77']) == 0\n"
        "assert 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train | bench | profile | doctor" in done.stdout
    assert "N=77" in done.stdout
    assert "healthy" in done.stdout


def test_doctor_names_device_versions_paths_and_switches(monkeypatch):
    monkeypatch.setenv("LAD_KERNELS_VALIDATE", "1")
    monkeypatch.setenv("LAD_KERNELS_ATOMICS", "true")
    status, text = report(monkeypatch, device="cpu", dtype="float32", hidden_size=64, vocab_size=999)
    assert status == 0, text
    assert torch.__version__ in text
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
    ranges(monkeypatch, "torch>=2.11")
    versions(monkeypatch, verl="0.9.1")
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: None)
    for line, expected in (("verl 0.9.1: all of it are registered", 0), ("verl 0.9.1: NOT registered", 1)):
        monkeypatch.setattr(doctor, "verl_plugin", lambda line=line: line)
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


def yaml(folder: Path, text: str) -> str:
    """Path of a YAML file."""
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def test_yaml_stands_for_flags_and_later_flags_win(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "main", lambda asked: asked)
    path = yaml(tmp_path, "tokens: 5\nhidden_size: 7\nvocab-size: 9\nrequire: [rich, trl]\ndtype: null\nimpl: torch\n")
    asked = cli.main(["doctor", "--config", path, "--tokens", "6", "--dtype", "float16"])
    assert asked == doctor.Asked(None, "float16", "torch", 6, 7, 9, ["rich", "trl"])
    asked = cli.main(["doctor", "--tokens=6", "--hidden-size=1", "--require", "peft", f"--config={path}"])
    assert asked == doctor.Asked(None, None, "torch", 5, 7, 9, ["rich", "trl"])
    assert cli.main(["doctor", "--require", "trl", "peft", "--hidden_size", "3"]).require == ["trl", "peft"]
    assert cli.main(["doctor"]) == doctor.Asked(require=[])


@dataclass(frozen=True)
class Options:
    save: bool = False
    quiet: bool = True
    sizes: tuple[int, ...] = ()
    name: str | None = "a name"
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate: expected at least 0, got {self.rate}")


def test_yaml_values_have_the_types_of_the_dataclass(tmp_path, capsys):
    path = yaml(tmp_path, "save: true\nquiet: false\nsizes: [3, -4]\nname: null\nrate: 1e-3\n")
    given = parse_flags(Options, ["--config", path], "program", "text")
    assert given == Options(True, False, (3, -4), None, 1e-3)
    defaults = {"sizes": (1,), "rate": 2.0}
    assert parse_flags(Options, ["--rate", "3"], "program", "text", defaults=defaults) == Options(sizes=(1,), rate=3.0)
    for text in ("save: 1", "sizes: [a]", "sizes: 3", "rate: null", "rate: [1]", "rate: -1"):
        with pytest.raises(SystemExit) as stopped:
            parse_flags(Options, ["--config", yaml(tmp_path, text)], "program", "text")
        assert stopped.value.code == 2
        assert text.split(":")[0] in capsys.readouterr().err.split("error:")[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a list", "Unexpected config"),
        ("optimizer: {lr: 1}", "'optimizer.lr' is not accepted"),
        ("no: 1", "Key must be a string"),
        ("hiden_size: 7", "'hiden_size' is not accepted"),
        ("tokens: 3\nsave: true", "'save' is not accepted"),
        ("tokens: many", 'key "tokens"'),
        ("tokens: 1.5", 'key "tokens"'),
        ("tokens: null", 'key "tokens"'),
        ("tokens: {n: 1}", 'key "tokens"'),
        ("dtype: int7", 'key "dtype"'),
        ("impl: fast", 'key "impl"'),
        ("require: rich", 'key "require"'),
        ("require: [rich, nonsense]", "nonsense"),
        ("tokens: [", "parsing config"),
        (None, "does not exist"),
    ],
)
def test_yaml_that_does_not_fit_the_flags_is_refused(tmp_path, monkeypatch, capsys, text, words):
    monkeypatch.setattr(doctor, "main", lambda asked: pytest.fail(f"accepted {text!r}: {asked}"))
    path = str(tmp_path / "ghost.yaml") if text is None else yaml(tmp_path, text)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--config", path])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["doctor", "--tokenz", "3"],
        ["doctor", "--tok", "3"],
        ["doctor", "3"],
        ["dance"],
        ["profile", "--tokens", "3"],
    ],
)
def test_what_is_not_understood_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_bench_runs_pytest_in_the_checkout(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(cli.subprocess, "call", lambda command, cwd: calls.append((command, cwd)) or 3)
    assert cli.main(["bench", "--one-thread", "-k", "speed"]) == 3
    assert calls.pop() == ([sys.executable, "-m", "pytest", "benchmarks", "--one-thread", "-k", "speed"], ROOT)
    assert cli.main(["bench", "--gpu", "--dry-run"]) == 3
    assert calls.pop() == (["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--dry-run"], ROOT)
    assert (ROOT / "benchmarks" / "gpu.sh").exists()
    monkeypatch.setattr(cli, "BENCHMARKS", tmp_path / "benchmarks")
    with pytest.raises(SystemExit, match="got an installed package, which has no benchmarks"):
        cli.main(["bench"])
    assert not calls


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "integration.doctor")
    monkeypatch.delattr("integration.doctor")
    with pytest.raises(SystemExit, match=r"lad-kernels doctor needs rich\.console: pip install 'lad_kernels\[cli\]'"):
        cli.main(["doctor"])
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "integration.flags")
    with pytest.raises(SystemExit, match=r"profile needs jsonargparse: pip install 'lad_kernels\[train\]'"):
        cli.main(["profile"])


@pytest.fixture
def small_programs(tmp_path, monkeypatch):
    """A folder to run in, where the train extra is installed."""
    pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: tests of train, profile")
    pytest.importorskip("reasoning_gym", reason="needs the train extra: reasoning-gym; lost: tests of train, profile")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_takes_yaml_and_flags(small_programs, capsys):
    (small_programs / "run.yaml").write_text(
        "algorithm: grpo\nsteps: 3\nwarm_steps: 2\nprompts_per_step: 2\ngroup_size: 4\ntrain_size: 30\n"
        "held_out_size: 4\nhidden-size: 32\nlayers: 1\n"
    )
    assert cli.main(["train", "--config", "run.yaml", "--steps", "1", "--out", "here"]) == 0
    lines = (small_programs / "here" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert '"algorithm": "grpo"' in lines[0]
    assert "checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz: 1", "'stepz' is not accepted"),
        ("steps: many", 'key "steps"'),
        ("steps: null", 'key "steps"'),
        ("algorithm: ppo", "expected 'lad' or 'grpo', got 'ppo'"),
    ],
)
def test_train_refuses_what_it_does_not_know(small_programs, capsys, text, words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--config", yaml(small_programs, text)])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--stepz", "1"])
    assert stopped.value.code == 2


def test_a_printed_config_is_a_config(small_programs, capsys):
    from integration.trainer import TrainConfig, parse_config

    with pytest.raises(SystemExit) as stopped:
        parse_config(["--steps", "3", "--print-config"])
    assert stopped.value.code in (0, None)
    path = yaml(small_programs, capsys.readouterr().out)
    assert parse_config(["--config", path]) == TrainConfig(steps=3)


def test_profile_of_the_small_policy_and_of_given_ids(small_programs, capsys):
    assert cli.main(["profile", "--warm-steps", "2", "--prompts", "2", "--out", "own.png"]) == 0
    assert "of (token, block) pairs" in capsys.readouterr().out
    assert (small_programs / "own.png").stat().st_size > 5000

    from integration.trainer import TrainConfig, load_policy
    from lad_kernels import profile_sparsity

    policy = load_policy(TrainConfig(hidden_size=32, layers=1))
    policy.model.save_pretrained("model")
    policy.tokenizer.save_pretrained("model")
    ids = torch.randint(3, 100, (4, 9), generator=torch.Generator().manual_seed(0))  # [B, T + 1]
    torch.save(ids, "ids.pt")
    given = ["--model", "model", "--ids", "ids.pt", "--tail-mass", "0.05", "--device", "cpu"]
    assert cli.main(["profile", *given]) == 0
    assert (small_programs / "sparsity.png").exists()
    assert str(profile_sparsity(policy.model, input_ids=ids, tail_mass=0.05)) in capsys.readouterr().out
