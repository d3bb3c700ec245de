"""The repository's rules, checked by reading the source; each rule is shown to be able to fail."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
from pathlib import Path

import pytest
from extensions import FRAMEWORKS, MODULES, SHARED, framework_of

import lad_kernels
from lad_kernels import head

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lad_kernels"
FILE_LINES, FUNCTION_LINES, KERNEL_LINES, KERNEL_PARAMETERS = 400, 60, 150, 30

PUBLIC = set(lad_kernels.__all__)
HEAD = {f"head.{name}" for name in head.__all__}  # what others may use of it
# Which modules of the package each part may import. A longer prefix wins.
MAY_IMPORT = {
    "autocast": set(),
    "operators": {"autocast"},
    "outputs": set(),
    "checks": set(),
    "packing": set(),
    "reference": {"outputs", "objective.config", "reference_objective"},
    "reference_objective": {"outputs", "objective.config"},
    "testing": {"reference"},
    "head": {"head", "autocast", "checks", "operators", "outputs", "packing"},
    "head.kernels": {"head.kernels", "head.records", "head.flops"},
    "objective": {"objective", "autocast", "checks", "operators", "outputs", "packing"},
    "step": {*HEAD, "autocast", "checks", "operators"},
    "step_operator": {*HEAD, "checks", "operators", "step"},
    "policy_step": {*HEAD, "head.flops", "step", "objective", "autocast", "checks", "outputs"},
    "compiled_loss": {*HEAD, "step", "step_operator", "policy_step", "objective", "operators", "outputs"},
    "loss": {*HEAD, "compiled_loss", "policy_step", "step", "objective", "checks", "outputs"},
    "own_objective": {"step"},
    "compiled_policy_loss": {
        *HEAD,
        "own_objective",
        "step",
        "autocast",
        "checks",
        "operators",
        "outputs",
        "packing",
    },
    "policy_loss": {
        *HEAD,
        "head.flops",
        "compiled_policy_loss",
        "own_objective",
        "step",
        "objective",
        "autocast",
        "checks",
        "outputs",
        "packing",
    },
    "cross_entropy": {
        *HEAD,
        "head.flops",
        "step",
        "step_operator",
        "objective",
        "autocast",
        "checks",
        "operators",
        "outputs",
        "packing",
    },
    "frameworks": {"frameworks", "objective", "outputs", *PUBLIC, "head.HeadArguments", "head.token_outputs"},
    "preflight": set(),
    "flags": {"preflight"},
    "pretrained": {"preflight"},
    "doctor": {"checks", "head.cost", "head.dispatch", "head.measured", "pretrained", *PUBLIC},
    "cli": PUBLIC,
    "": {*HEAD, "objective", "loss", "own_objective", "policy_loss", "cross_entropy", "outputs"},
}
# What is imported where it is used, and the module that may (empty: any).
MAY_IMPORT_INSIDE_FUNCTIONS = {
    "reference": "",
    "frameworks.transformers": "head.profile",
    "frameworks.verl": "doctor",
    "doctor": "cli",
    "flags": "cli",
    "preflight": "cli",
    "pretrained": "cli",
}
TRITON_LIVES_IN = ("head.kernels", "objective.kernels")


def module_name(path: Path, package: Path = PACKAGE) -> str:
    name = ".".join(path.relative_to(package).with_suffix("").parts)
    return re.sub(r"\.?__init__$", "", name)


def imports(source: str) -> list[tuple[str, bool]]:
    """(module, inside a function) of every import, absolute names."""
    tree, found = ast.parse(source), []
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(a.name, id(node) in inside) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" if node.module == "lad_kernels" else node.module for a in node.names]
            names = [n + f".{a.name}" if n in PACKAGES else n for n, a in zip(names, node.names)]
            found += [(n, id(node) in inside) for n in names]
    return found


PACKAGES = {f"lad_kernels.{p}" for p in ("head", "objective", "head.kernels", "objective.kernels", "frameworks")}


def belongs(module: str, part: str) -> bool:
    return part == "" or module == part or module.startswith(part + ".")


def import_violations(name: str, source: str) -> list[str]:
    part = max((p for p in MAY_IMPORT if belongs(name, p)), key=len)
    bad = []
    for target, inside in imports(source):
        if target == "triton" or target.startswith("triton."):
            if not any(belongs(name, home) for home in TRITON_LIVES_IN):
                bad.append(f"{name} imports triton")
        elif target in ("integration", "benchmarks", "tests"):
            bad.append(f"{name} imports outward: {target}")
        elif target.startswith("lad_kernels"):
            inner = target.removeprefix("lad_kernels").lstrip(".")
            fine = any(belongs(inner, p) for p in MAY_IMPORT[part] if p) or inner == ""
            if not fine and not (inside and MAY_IMPORT_INSIDE_FUNCTIONS.get(inner) in ("", name)):
                bad.append(f"{name} imports {inner}")
    return bad


def past_the_door(name: str, source: str, door: str = "objective") -> list[str]:
    """Imports of a part's inner modules, where only what its __init__ exports may be used."""
    if belongs(name, door) or name in ("reference", "reference_objective"):  # the specification needs the records alone
        return []
    exported = importlib.import_module(f"lad_kernels.{door}").__all__
    inner = [t.removeprefix(f"lad_kernels.{door}.") for t, _ in imports(source) if t.startswith(f"lad_kernels.{door}.")]
    return [f"{name} imports {door}.{target}" for target in inner if target not in exported]


def test_the_objective_is_entered_by_its_door():
    assert [v for name, source in sources(PACKAGE) for v in past_the_door(name, source)] == []
    assert past_the_door("step", "from lad_kernels.objective.policy import policy_terms")
    assert past_the_door("step", "from lad_kernels.objective import policy")
    assert not past_the_door("step", "from lad_kernels.objective import Objective")


def is_kernel(node: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(d) for d in node.decorator_list)


def size_violations(name: str, source: str) -> list[str]:
    bad, lines = [], source.count("\n")
    if lines > FILE_LINES:
        bad.append(f"{name}: {lines} lines")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        doc = ast.get_docstring(node)
        length = node.end_lineno - node.body[0].lineno + 1 - (doc.count("\n") + 1 if doc else 0)
        arguments = node.args
        count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
        if length > (KERNEL_LINES if is_kernel(node) else FUNCTION_LINES):
            bad.append(f"{name}.{node.name}: {length} lines")
        if is_kernel(node) and count > KERNEL_PARAMETERS:
            bad.append(f"{name}.{node.name}: {count} parameters")
    return bad


def sources(folder: Path) -> list[tuple[str, str]]:
    return [(module_name(p, folder), p.read_text()) for p in sorted(folder.rglob("*.py"))]


def test_import_direction():
    assert [v for name, source in sources(PACKAGE) for v in import_violations(name, source)] == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("head.logprobs", "from lad_kernels.objective.config import LADConfig"),
        ("objective.policy", "from lad_kernels.head import Head"),
        ("reference", "from lad_kernels.head.logprobs import linear_logprobs"),
        ("head.dispatch", "import triton"),
        ("loss", "def f():\n    import triton.language as tl"),
        ("objective.policy", "from lad_kernels import reference"),
        ("loss", "import benchmarks"),
        ("head.kernels.dense", "from lad_kernels.head import pytorch"),
        ("step", "from lad_kernels.head.plan import plan_backward"),
    ],
)
def test_import_direction_can_fail(name, source):
    assert import_violations(name, source)


# What the programs around the package may import, wherever the import stands. A longer prefix wins.
PROGRAMS_MAY_IMPORT = {
    "benchmarks": {"benchmarks.states", "benchmarks.harness", "benchmarks.report", "lad_kernels"},  # the pytest files
    "benchmarks.report": {"benchmarks.harness"},
    "benchmarks.plot": {"benchmarks.harness"},
    "benchmarks.harness": {"benchmarks.harness", "benchmarks.states", "lad_kernels"},
    "benchmarks.states": {"lad_kernels.pretrained"},
    "benchmarks.gpu": {"benchmarks.gpu", "benchmarks.harness", "lad_kernels", "tests.support.interpreter"},
    "benchmarks.gpu.session": {"benchmarks.gpu.plan"},  # outlives the experiments: imports no library, touches no GPU
    "benchmarks.gpu.plan": set(),
    "benchmarks.gpu.verdicts": set(),  # a plugin of pytest
    "benchmarks.studies": {
        "benchmarks.harness",
        "benchmarks.report",
        "integration.diversity",
        "integration.report",
        "lad_kernels",
    },
    "integration": {"integration", "lad_kernels"},
}


def repository() -> dict[str, str]:
    """{module: source}; tests go by their last name, as conftest.py puts their folders on the path."""
    found = {name.rpartition(".")[2]: source for name, source in sources(ROOT / "tests")}
    for top in ("benchmarks", "integration", "lad_kernels"):
        found |= {f"{top}.{name}".rstrip("."): source for name, source in sources(ROOT / top)}
    return found


def is_deferred(node: ast.AST) -> bool:
    """Whether what stands in `node` runs later than the module, or never."""
    return isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))


def imported(source: str) -> list[tuple[str, bool]]:
    """(dotted name, whether deferred: in a function or for type checkers alone) of everything that is imported."""
    tree, found = ast.parse(source), []
    deferred = {id(n) for block in ast.walk(tree) if is_deferred(block) for n in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found += [(prefix + name.name, id(node) in deferred) for name in node.names]
    return found


def program_violations(name: str, source: str) -> list[str]:
    part = max((p for p in PROGRAMS_MAY_IMPORT if belongs(name, p)), key=len)
    ours = [t for t, _ in imported(source) if t.split(".")[0] in ("benchmarks", "integration", "lad_kernels", "tests")]
    return [f"{name} imports {t}" for t in ours if not any(belongs(t, p) for p in PROGRAMS_MAY_IMPORT[part])]


def adapter_violations(name: str, source: str) -> list[str]:
    """An adapter imports nothing of another framework's; what several share imports nothing of any."""
    return [f"{name} imports {t}" for t, _ in imported(source) if framework_of(t) not in (None, framework_of(name))]


def circle(modules: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle, if any. Only the package may defer an import that closes one."""
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, source in modules.items():
        for target, deferred in imported(source):
            target = target.removeprefix("tests.support.")
            while target and target not in modules:
                target = target.rpartition(".")[0]
            if target not in ("", name) and not (deferred and belongs(name, "lad_kernels")):
                graph[name].add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_programs_and_adapters_import_in_one_direction():
    modules = repository()
    programs = {n: s for n, s in modules.items() if any(belongs(n, p) for p in PROGRAMS_MAY_IMPORT)}
    adapters = {n: s for n, s in modules.items() if belongs(n, "lad_kernels.frameworks")}
    assert [v for n, s in programs.items() for v in program_violations(n, s)] == []
    assert [v for n, s in adapters.items() for v in adapter_violations(n, s)] == []
    assert {framework_of(n) for n in adapters} == {None, *FRAMEWORKS}
    assert {"trl", "verl"} < set(FRAMEWORKS)
    assert set(SHARED) <= MODULES
    assert all(any(belongs(n, p) for n in programs) for p in PROGRAMS_MAY_IMPORT)


def test_no_modules_import_each_other_in_a_circle():
    assert circle(repository()) == []


@pytest.mark.parametrize("part", PROGRAMS_MAY_IMPORT)
@pytest.mark.parametrize("form", ["import {}", "from {} import x", "def f():\n    from {0} import x"])
def test_directions_of_programs_can_fail(part, form):
    other = "integration.bandit" if belongs(part, "benchmarks") else "benchmarks.report"
    for target in [other, "tests.support.cases"] + ["benchmarks.gpu.run"] * (part != "benchmarks.gpu"):
        assert program_violations(f"{part}.planted", form.format(target))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("trl", "from lad_kernels.frameworks.verl import LADLoss"),
        ("planted", "from lad_kernels.frameworks import verl"),
        ("planted_options", "from lad_kernels.frameworks import trl_options"),
        ("verl_megatron", "def f():\n    import lad_kernels.frameworks.trl_options"),
        ("head_call", "from lad_kernels.frameworks.planted import LADLoss"),
        ("trl", "from lad_kernels.frameworks.trloptions import x"),
    ],
)
def test_directions_of_adapters_can_fail(name, source):
    assert adapter_violations(f"lad_kernels.frameworks.{name}", source)


def test_an_adapter_may_have_several_files():
    assert framework_of("lad_kernels.frameworks.verl_megatron.x") == "verl"
    assert adapter_violations("lad_kernels.frameworks.trl", "from lad_kernels.frameworks.trl_options import x") == []
    assert adapter_violations("lad_kernels.frameworks.planted", "from lad_kernels.frameworks.options import x") == []


@pytest.mark.parametrize("top", ["benchmarks", "integration", "lad_kernels"])
@pytest.mark.parametrize(
    "back", ["from {0}.a import x", "def f():\n    from {0} import a", "if TYPE_CHECKING:\n    import {0}.a"]
)
def test_circles_can_fail(top, back):
    there = {f"{top}.a": f"from {top} import b", f"{top}.b": f"from {top}.c import x"}
    allowed = top == "lad_kernels" and not back.startswith("from")
    assert (circle({**there, f"{top}.c": back.format(top)}) == []) == allowed
    assert circle({**there, f"{top}.c": "import math"}) == []


def test_sizes():
    """Printed with -s: the five largest files, so that growth is seen before the limit is met."""
    largest = sorted(((s.count("\n"), n) for n, s in sources(PACKAGE)), reverse=True)[:5]
    print("\n" + "\n".join(f"  {lines:4d} {name}" for lines, name in largest))
    folders = [PACKAGE, ROOT / "integration", ROOT / "benchmarks", ROOT / "docs", ROOT / "tests"]
    assert [v for f in folders for n, s in sources(f) for v in size_violations(n, s)] == []


def test_sizes_can_fail():
    assert size_violations("m", "x = 1\n" * (FILE_LINES + 1))
    assert size_violations("m", "def f():\n" + "    x = 1\n" * (FUNCTION_LINES + 1))
    many = ", ".join(f"a{i}" for i in range(KERNEL_PARAMETERS + 1))
    assert size_violations("m", f"@triton.jit\ndef k({many}):\n    pass\n")


def test_formatting_is_rarely_left_to_the_author():
    kept_by = {top: (ROOT / top).rglob("*.py") for top in ("lad_kernels", "integration", "benchmarks", "docs", "tests")}
    count = {top: sum(len(re.findall(r"# fmt: skip$", p.read_text(), re.M)) for p in of) for top, of in kept_by.items()}
    assert count["lad_kernels"] <= 10 and sum(count.values()) <= 60, count


def prose() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]


def missing_paths(text: str) -> list[str]:
    """Paths in backticks that look like files of this repository and do not exist."""
    found = re.findall(
        r"`((?:lad_kernels|benchmarks|tests|integration|docs)/[\w./-]*|[\w-]+\.(?:md|py|txt|toml))`", text
    )
    bases = (
        ROOT,
        PACKAGE,
        ROOT / "tests",
        ROOT / "integration",
        ROOT / "benchmarks",
        PACKAGE / "objective",
        PACKAGE / "head",
    )
    return [p for p in found if not any((base / p).exists() for base in bases) and not p.startswith("runs/")]


def test_every_path_named_in_prose_exists():
    assert prose()
    assert {p.name: missing_paths(p.read_text()) for p in prose() if missing_paths(p.read_text())} == {}


def test_missing_paths_can_fail():
    assert missing_paths("see `lad_kernels/ghost.py` and `ghost.md`") == ["lad_kernels/ghost.py", "ghost.md"]


def test_no_machine_paths_and_no_unfinished_work():
    words = re.compile(r"(^|[\s\"'(=])/(work|root|home|opt)/|\b(TODO|FIXME|XXX)\b")
    files = [p for ext in ("py", "md", "sh", "toml", "txt") for p in ROOT.rglob(f"*.{ext}") if ".venv" not in p.parts]
    files = [p for p in files if p != Path(__file__).resolve() and "runs" not in p.parts and "egg-info" not in str(p)]
    assert [f"{p.name}: {m.group()}" for p in files for m in words.finditer(p.read_text())] == []
