"""The command line: flags and YAML, and what each command runs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="it needs the train extra: rich; lost: all tests of lad-kernels")
pytest.importorskip("packaging", reason="it needs the train extra: packaging; lost: all tests of lad-kernels")
pytest.importorskip("jsonargparse", reason="it needs the train extra: jsonargparse; lost: all tests of lad-kernels")

from lad_kernels import cli, doctor
from lad_kernels.flags import parse_flags

ROOT = Path(__file__).resolve().parents[2]


def test_help_and_doctor_start_without_heavy_imports():
    code = (
        "import sys; from lad_kernels import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'transformers' not in sys.modules\n"
        "assert cli.main(['doctor', '--device', 'cpu', '--tokens', '77']) == 0\n"
        "assert 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train | bench | profile | doctor" in done.stdout
    assert "N=77" in done.stdout
    assert "healthy" in done.stdout


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
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    for command in ("bench", "train"):
        with pytest.raises(SystemExit, match=f"{command}: expected a checkout .* got an installed package"):
            cli.main([command])
    assert not calls


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "lad_kernels.doctor")
    monkeypatch.delattr("lad_kernels.doctor")
    with pytest.raises(SystemExit, match=r"lad-kernels doctor needs rich\.console: pip install 'lad_kernels\[cli\]'"):
        cli.main(["doctor"])
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "lad_kernels.flags")
    with pytest.raises(SystemExit, match=r"profile needs jsonargparse: pip install 'lad_kernels\[train\]'"):
        cli.main(["profile"])


@pytest.fixture
def small_programs(tmp_path, monkeypatch):
    """A folder to run in, where the train extra is installed."""
    pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: tests of train, profile")
    pytest.importorskip("reasoning_gym", reason="needs the train extra: reasoning-gym; lost: tests of train, profile")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_takes_yaml_and_flags(small_programs, capfd):
    (small_programs / "run.yaml").write_text(
        "algorithm: grpo\nsteps: 3\nwarm_steps: 2\nprompts_per_step: 2\ngroup_size: 4\ntrain_size: 30\n"
        "held_out_size: 4\nhidden-size: 32\nlayers: 1\n"
    )
    (small_programs / "integration").mkdir()  # the user's own folder of that name
    (small_programs / "integration" / "__init__.py").write_text("raise RuntimeError('not yours')\n")
    assert cli.main(["train", "--config", "run.yaml", "--steps", "1", "--out", "here"]) == 0
    lines = (small_programs / "here" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert '"algorithm": "grpo"' in lines[0]
    assert "checkpoint" in capfd.readouterr().out


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
    from integration import trainer

    with pytest.raises(SystemExit) as stopped:
        trainer.main(["--config", yaml(small_programs, text)])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_printed_config_is_a_config(small_programs, capsys):
    from integration.trainer import TrainConfig, parse_config

    with pytest.raises(SystemExit) as stopped:
        parse_config(["--steps", "3", "--print-config"])
    assert stopped.value.code in (0, None)
    path = yaml(small_programs, capsys.readouterr().out)
    assert parse_config(["--config", path]) == TrainConfig(steps=3)


def test_profile_of_prompts_and_of_given_ids(small_programs, capsys):
    from integration.policy import build_policy
    from lad_kernels import profile_sparsity

    policy = build_policy(None, "cpu", pretrained=False, hidden_size=32, layers=1)
    policy.model.save_pretrained("model")
    policy.tokenizer.save_pretrained("model")
    (small_programs / "prompts.txt").write_text("1 + 1 =\n\n12 * 3 =\n")
    sizes = ["--completions", "3", "--max-new-tokens", "5", "--device", "cpu"]
    assert cli.main(["profile", "--model", "model", "--prompts", "prompts.txt", "--out", "own.png", *sizes]) == 0
    assert "of (token, block) pairs" in capsys.readouterr().out
    assert (small_programs / "own.png").stat().st_size > 5000

    ids = torch.randint(3, 100, (4, 9), generator=torch.Generator().manual_seed(0))  # [B, T + 1]
    torch.save(ids, "ids.pt")
    given = ["--model", "model", "--ids", "ids.pt", "--tail-mass", "0.05", "--device", "cpu"]
    assert cli.main(["profile", *given]) == 0
    assert (small_programs / "sparsity.png").exists()
    assert str(profile_sparsity(policy.model, input_ids=ids, tail_mass=0.05)) in capsys.readouterr().out


def test_profile_samples_up_to_the_first_end(small_programs, monkeypatch):
    """Prompt and padding are no targets, nor is what follows an end of sequence."""
    from integration.policy import build_policy

    policy = build_policy(None, "cpu", pretrained=False, hidden_size=32, layers=1)
    end, tokenizer = policy.tokenizer.eos_token_id, policy.tokenizer
    tokenizer.padding_side = "left"
    (small_programs / "prompts.txt").write_text("1\n1 + 1 =\n")
    policy.model.generation_config.eos_token_id = [end, 7]

    def generate(*, input_ids, num_return_sequences, **_):
        new = torch.tensor([[9, 7, 7], [9, 9, end]])  # [2, 3]
        return torch.cat([input_ids.repeat_interleave(num_return_sequences, 0), new], 1)

    monkeypatch.setattr(policy.model, "generate", generate)
    asked = cli.ProfileConfig(model="model", prompts=small_programs / "prompts.txt", completions=1)
    tokens = cli._own_samples(policy.model, tokenizer, asked)
    assert tokens.loss_mask[:, -3:].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert not tokens.loss_mask[:, :-3].any()
    assert tokens.loss_mask.shape[1] == tokens.input_ids.shape[1] - 1
    assert (tokens.attention_mask == 0).sum() == (tokens.input_ids[0] == tokenizer.pad_token_id).sum() + 1
