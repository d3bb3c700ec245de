"""What is installed, what works on this machine, and which path through the head a shape takes, and why.

Supported versions and extras are those of the installed package's own metadata, so nothing here repeats `setup.py`.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lad_kernels import checks, linear_lad_loss, pretrained
from lad_kernels.head import cost, dispatch, measured

PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "transformers",
    "gguf",
    "accelerate",
    "trl",
    "peft",
    "deepspeed",
    "verl",
    "liger-kernel",
    "flash-attn",
    "datasets",
    "reasoning-gym",
    "rich",
    "matplotlib",
)
CPUINFO = Path("/proc/cpuinfo")
SWITCHES = {
    "LAD_KERNELS_ATOMICS": "the routed backward adds dH by atomics: less traffic, not reproducible bit for bit",
    "LAD_KERNELS_VALIDATE": "tensor values are checked on accelerators too, at a host sync each",
    "TRITON_INTERPRET": "Triton kernels run in its interpreter: correct, thousands of times slower",
}
SHAPES = {"Qwen2.5-0.5B": (896, 151_936), "Llama-3-8B": (4096, 128_256)}  # D, V
SELF_CHECK = 1e-5  # relative float32 error allowed; 8e-7 was measured on a CPU


@dataclass(frozen=True)
class Asked:
    """What the user wants to know; None and empty mean the defaults for this machine.

    Attributes:
        device: cuda if there is one, else cpu
        dtype: bfloat16 on an accelerator, else float32
        impl: as the public functions take it
        tokens: N
        hidden_size: D; none takes those of two common models
        vocab_size: V; likewise
        require: packages that have to work
    """

    device: str | None = None
    dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = None
    impl: Literal["auto", "triton", "torch", "reference"] = "auto"
    tokens: int = 16_384
    hidden_size: int | None = None
    vocab_size: int | None = None
    require: tuple[str, ...] = ()


class Installed(NamedTuple):
    """A package and its installed version."""

    name: str
    version: str | None  # None: not installed
    supported: str  # version range; empty: any, or unknown
    extra: str  # pip extra that brings it; empty: none does
    required: bool  # by lad_kernels itself

    @property
    def fits(self) -> bool:
        return self.version is not None and SpecifierSet(self.supported).contains(self.version, prereleases=True)

    @property
    def verdict(self) -> str:
        if self.fits:
            return "ok" if self.supported else "installed, no range stated"
        if self.version is not None:
            return "outside the supported range"
        return f"missing: pip install 'lad_kernels[{self.extra}]'" if self.extra else "missing"


def requirements() -> dict[str, tuple[str, str | None]]:
    """Package -> (version range, first extra that brings it; empty: ours, None: not on this platform)."""
    try:
        lines = metadata.requires("lad_kernels") or []
        extras = metadata.metadata("lad_kernels").get_all("Provides-Extra")
    except metadata.PackageNotFoundError:
        return {}
    ranges: dict[str, tuple[str, str | None]] = {}
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        bring = (extra for extra in ("", *extras) if marker is None or marker.evaluate({"extra": extra}))
        ranges.setdefault(requirement.name, (str(requirement.specifier), next(bring, None)))
    return ranges


def packages() -> list[Installed]:
    """The packages of PACKAGES on this machine."""
    needed, installed = requirements(), []
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
        supported, extra = needed.get(name, ("", None))
        installed.append(Installed(name, version, supported, extra or "", extra == ""))
    return installed


def driver() -> str | None:
    """NVIDIA's kernel driver, as it describes itself."""
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0].removeprefix("NVRM version:").strip() if path.exists() else None


def bfloat16_units() -> str:
    """Whether this CPU multiplies bfloat16, and what makes products of widened bfloat16 inputs use that."""
    if not (CPUINFO.exists() and "amx_bf16" in CPUINFO.read_text()):
        return "no AMX"
    if torch.backends.mkldnn.matmul.fp32_precision == "bf16":  # type: ignore[attr-defined]
        return "AMX"
    return 'AMX; bfloat16 inputs take half the time under torch.backends.mkldnn.matmul.fp32_precision = "bf16"'


def machine(device: torch.device, triton: str | None) -> list[tuple[str, str]]:
    """(what, value) of interpreter, devices, driver, Triton, known models and switches."""
    build = "CPU only"
    if torch.version.cuda or torch.version.hip:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    elif driver():
        build = "CPU only, although a driver is here: install a CUDA build of torch"
    rows = [
        ("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("torch build", build),
        ("NVIDIA driver", driver() or "none"),
    ]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        kind = gpu.gcnArchName if torch.version.hip else f"compute capability {gpu.major}.{gpu.minor}"
        rows.append((f"cuda:{i}", f"{gpu.name}, {kind}, {gpu.total_memory / 2**30:.0f} GiB"))
    rows.append(("device used here", f"{device}, {torch.get_num_threads()} CPU threads"))
    rows += [("bfloat16 units", bfloat16_units())] if device.type == "cpu" else []
    rows.append(("Triton kernels", "usable" if triton is None else f"not used: {triton}"))
    rows += [(f"model {name}", f"{model.title}: {pretrained.state(name)}") for name, model in pretrained.KNOWN.items()]
    for name, meaning in SWITCHES.items():
        value = os.environ.get(name, "0")
        state = meaning if value == "1" else "off" if value == "0" else f"no effect: expected 1 or 0, got {value!r}"
        rows.append((name, state))
    return rows


def paths(asked: Asked, device: torch.device, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """(shape, call, path and why) of the default shapes, or of the one asked for."""
    shapes = SHAPES
    if asked.hidden_size or asked.vocab_size:
        shapes = {"yours": (asked.hidden_size or 4096, asked.vocab_size or 151_936)}
    triton = checks.use_triton(asked.impl, device, dtype)
    one_pass = dtype != torch.float16 if triton else dtype.itemsize > 2  # as the head decides for itself
    why = functools.partial(dispatch.why, asked.tokens, dtype=dtype, device=device, impl=asked.impl)
    rows = []
    for name, (d, v) in shapes.items():
        rows += [
            (name, "scoring, no gradient", why(hidden_size=d, vocab_size=v, grad=False)),
            (name, "linear_logprobs", why(hidden_size=d, vocab_size=v, tail=0.0)),
            (name, "linear_lad_loss, token level", why(hidden_size=d, vocab_size=v, one_pass=one_pass)),
        ]
    return rows


def self_check(device: torch.device, impl: str, dtype: torch.dtype = torch.float32) -> float:
    """Largest relative error of a small LAD loss and its gradients in `dtype` against the float64 specification.

    Packed sequences with a part of their tokens masked, and rewards of two groups.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator) / 4 for n in (48, 600))  # [N, D], [V, D]
    targets = torch.randint(600, (48,), generator=generator).to(device)  # [N]
    old = -3 - torch.rand(48, generator=generator)  # [N]
    mask = (torch.rand(48, generator=generator) < 0.8).to(device)  # [N]
    rewards = torch.tensor([0.0, 1, 0, 0, 1, 1, 0, 1])  # [B]
    cu_seqlens = torch.tensor([0, 3, 10, 11, 20, 25, 30, 40, 48], dtype=torch.int32, device=device)  # [B + 1]
    results = []
    for kind, precision in ((impl, dtype), ("reference", torch.float64)):
        h, w, o, r = (x.to(device, precision) for x in (hidden, weight, old, rewards))
        leaves = h.requires_grad_(), w.requires_grad_()
        loss = linear_lad_loss(
            *leaves, targets, o, rewards=r, group_size=4, loss_mask=mask, cu_seqlens=cu_seqlens, impl=kind
        ).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    return max(((ours - truth).norm() / truth.norm()).item() for ours, truth in zip(*results))


def import_problem(name: str) -> str | None:
    """Why a package cannot be used, None if it can; verl itself hides a plugin of its workers that fails to load."""
    try:
        importlib.import_module(name.replace("-", "_"))
    except Exception as error:  # whatever a broken installation raises is the answer
        return f"{name} cannot be imported: {type(error).__name__}: {error}"
    if name != "verl":
        return None
    from lad_kernels.frameworks import verl

    line = verl.status()
    return None if line.endswith("are registered") else line


def package_problems(installed: list[Installed], wanted: tuple[str, ...], triton_needed: bool) -> list[str]:
    """What is wrong with packages that have to work: ours and those in `wanted`."""
    problems = []
    for part in installed:
        ours = part.required and (part.name != "triton" or triton_needed or part.version is not None)
        if (ours or part.name in wanted) and not part.fits:
            problems.append(" ".join(filter(None, (part.name, part.version, part.verdict, part.supported))))
        elif part.name in wanted and (problem := import_problem(part.name)):
            problems.append(problem)
    known = [part.name for part in installed]
    return problems + [f"{name}: expected one of {', '.join(known)}" for name in wanted if name not in known]


def table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    out = Table(*columns, title=title, title_justify="left")
    for row in rows:
        out.add_row(*map(escape, row))
    return out


def main(asked: Asked, console: Console | None = None) -> int:
    """Print the report; 1 if something that has to work does not, else 0."""
    console = console or Console()
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, asked.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    unavailable = checks.triton_unavailable(device, dtype)
    installed = packages()
    problems = package_problems(installed, asked.require, device.type == "cuda" or asked.impl == "triton")
    console.print(table("Machine", ("what", "value"), machine(device, unavailable)))
    rows = [(p.name, p.version or "-", p.supported or "-", p.verdict) for p in installed]
    console.print(table("Packages", ("package", "installed", "supported", "verdict"), rows))
    if not requirements():
        console.print("lad_kernels is not installed here, so supported ranges are unknown: pip install -e .")
    if asked.impl == "triton" and unavailable:
        problems.append(f"impl='triton' was asked for, but {unavailable}")
    else:
        precision = str(dtype).removeprefix("torch.")
        console.print(f"[italic]Path of {asked.tokens:,} tokens, {precision}, on {device}[/]")
        for shape, call, reason in paths(asked, device, dtype):
            console.print(f"- [bold]{shape}, {call}[/]: {escape(reason)}", highlight=False)
        if device.type == "cpu":
            cpu_speeds(dtype, console)
        problems += check(device, asked.impl, console)
    for problem in problems:
        console.print(f"[red]broken[/] {escape(problem)}", highlight=False)
    console.print("healthy" if not problems else f"{len(problems)} to repair")
    return int(bool(problems))


def cpu_speeds(dtype: torch.dtype, console: Console) -> None:
    """Measure what the cost model assumes of this CPU, and say what to set where it is off."""
    assumed = cost.SPEEDS[cost.architecture(torch.device("cpu"), triton=False), dtype.itemsize]
    rows, advice = measured.compare(measured.measure(), assumed)
    title = f"Speeds by which a path is chosen, float32, {torch.get_num_threads()} threads"
    console.print(table(title, ("speed", "measured", "assumed"), rows))
    if advice:
        console.print(escape(advice), highlight=False)


def check(device: torch.device, impl: str, console: Console) -> list[str]:
    """Run the self-check and say what came of it; problems, if any."""
    try:
        error = self_check(device, impl)
    except Exception as reason:  # a device that is not there, a kernel that does not compile: that is the answer
        return [f"a small LAD loss on {device} fails: {type(reason).__name__}: {reason}"]
    console.print(f"A small LAD loss with its gradients on {device} is within {error:.1e} of the specification.")
    return [] if error <= SELF_CHECK else [f"self-check: expected an error of at most {SELF_CHECK:g}, got {error:.1e}"]
