"""The folder that Hugging Face's `kernels` library loads, in a process without the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from integration import hub_kernel
from lad_kernels import linear_cross_entropy, linear_lad_loss, linear_logprobs

SCRIPT = """
import sys
sys.modules["lad_kernels"] = None  # as if it were not installed
from pathlib import Path
import interpreter
import torch
from kernels import get_local_kernel
interpreter.install()
from results import results, same
given, truth = torch.load("given.pt")
first, second = (get_local_kernel(Path(name), backend="cpu") for name in ("first", "second"))
assert first.__name__ != second.__name__ and first.linear_lad_loss is not second.linear_lad_loss
for kernel in (first, second, first):
    for impl in ("torch", "triton"):
        same(results(kernel, given, impl), truth[impl])
    assert "linear_logprobs" in dir(getattr(torch.ops, kernel.__name__))
assert not [name for name in sys.modules if name.startswith("lad_kernels.")]
print("loaded", first.__name__, second.__name__)
"""
RESULTS = '''
import torch

def results(package, given, impl):
    """Losses, log-probs, entropy and gradients of three public functions."""
    h, w = given["hidden"].clone().requires_grad_(), given["weight"].clone().requires_grad_()
    old, rewards, y = given["old"], given["rewards"], given["targets"]
    lad = package.linear_lad_loss(h, w, y, old, rewards=rewards, group_size=2, loss_mask=given["mask"], impl=impl)
    scores = package.linear_logprobs(h, w, y, return_entropy=True, impl=impl)
    supervised = package.linear_cross_entropy(h, w, y, label_smoothing=0.1, impl=impl)
    (lad.loss + scores.entropy.mean() + supervised).backward()
    return [lad.loss, lad.logprobs, scores.logprobs, scores.entropy, supervised, h.grad, w.grad]

def same(ours, theirs):
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x.detach(), y.detach())
'''


def test_two_versions_in_a_process_without_the_package(tmp_path, monkeypatch):
    pytest.importorskip("kernels", reason="no kernels library (pip install kernels); lost: loading what it would load")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gen = torch.Generator().manual_seed(0)
    given = {
        "hidden": torch.randn(2, 5, 16, generator=gen),
        "weight": torch.randn(150, 16, generator=gen),
        "targets": torch.randint(150, (2, 5), generator=gen),
        "old": -5 * torch.rand(2, 5, generator=gen),
        "rewards": torch.tensor([1.0, 0.0]),
        "mask": torch.rand(2, 5, generator=gen) > 0.3,
    }
    (tmp_path / "results.py").write_text(RESULTS)
    monkeypatch.syspath_prepend(tmp_path)
    from results import results  # type: ignore[import-not-found]

    class Installed:
        linear_lad_loss, linear_logprobs = staticmethod(linear_lad_loss), staticmethod(linear_logprobs)
        linear_cross_entropy = staticmethod(linear_cross_entropy)

    truth = {impl: [x.detach() for x in results(Installed, given, impl)] for impl in ("torch", "triton")}
    torch.save((given, truth), tmp_path / "given.pt")
    hub_kernel.write(tmp_path / "first")
    other = tmp_path / "copy" / "lad_kernels"
    shutil.copytree(hub_kernel.PACKAGE, other, ignore=shutil.ignore_patterns("__pycache__"))
    (other / "loss.py").write_text((other / "loss.py").read_text() + "\n# another version\n")
    monkeypatch.setattr(hub_kernel, "PACKAGE", other)
    hub_kernel.write(tmp_path / "second")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.startswith("loaded lad_kernels_cpu_")


def test_every_backend_has_the_same_sources_and_a_name_of_its_own(tmp_path):
    hub_kernel.write(tmp_path)
    variants = sorted((tmp_path / "build").iterdir())
    assert [variant.name for variant in variants] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    trees = [{p.relative_to(v): p.read_text() for p in v.rglob("*.py")} for v in variants]
    assert trees[0] == trees[1] == trees[2]
    assert {Path(p) for p in ("head/kernels/forward.py", "objective/policy.py", "reference.py")} <= set(trees[0])
    assert not {Path(p) for p in ("cli.py", "doctor.py", "frameworks/trl.py")} & set(trees[0])
    names = [json.loads((v / "metadata.json").read_text())["id"] for v in variants]
    assert len(set(names)) == 3 and all(name.isidentifier() for name in names)


def test_an_import_that_would_stay_absolute_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_kernel, "sources", lambda: {"__init__.py": "import lad_kernels.head\n"})
    with pytest.raises(ValueError, match=r"__init__\.py: expected `from lad_kernels"):
        hub_kernel.write(tmp_path)
