"""A reader gets from the public function to the matrix product by names alone: each call is found, and leads on."""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "lad_kernels"
MOST_CALLS = 8
WALK = [  # (module, function or method); what is called leads to the next
    ("loss", "linear_lad_loss"),
    ("loss", "_linear_loss"),
    ("step", "Step.run"),
    ("head/plan", "forward_for_backward"),
    ("head/head", "Head.forward"),
    ("head/kernels/forward", "forward"),
    ("head/kernels/forward", "_partials"),
    ("head/kernels/forward", "_partials_kernel"),
    ("head/kernels/tile", "logit_tile"),
]
LAUNCH = "tile_table.SAME_BITS"  # compiler options of a launch, which no kernel takes as an argument


def find(tree: ast.Module, name: str) -> ast.FunctionDef:
    """A function of a module, or `Class.method`."""
    body: list[ast.stmt] = tree.body
    *owner, last = name.split(".")
    for part in owner:
        (cls,) = [node for node in body if isinstance(node, ast.ClassDef) and node.name == part]
        body = cls.body
    (function,) = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == last]
    return function


def called(call: ast.Call) -> tuple[str, ast.expr | None]:
    """(name, what it is looked up on) of a call; `kernel[grid](...)` is a call of the kernel."""
    callee = call.func.value if isinstance(call.func, ast.Subscript) else call.func
    if isinstance(callee, ast.Attribute):
        return callee.attr, callee.value
    return (callee.id if isinstance(callee, ast.Name) else ""), None


def is_known(owner: ast.expr | None, name: str, function: ast.FunctionDef, tree: ast.Module) -> bool:
    """Whether a reader, or an editor, knows what `owner.name` is: imported, defined, constructed, or annotated."""
    bound = {
        alias.asname or alias.name
        for node in (*ast.walk(function), *tree.body)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    bound |= {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    if owner is None:
        return name in bound
    if isinstance(owner, ast.Call):  # Class(...).method
        return called(owner)[0] in bound
    arguments = {a.arg: a.annotation for a in (*function.args.args, *function.args.kwonlyargs)}
    if isinstance(owner, ast.Name) and owner.id in arguments:
        annotation = arguments[owner.id]
        return annotation is not None and ast.unparse(annotation) in bound
    return isinstance(owner, ast.Name) and owner.id in bound


def problems(walk: list[tuple[str, str]], sources: dict[str, str]) -> list[str]:
    """What stops the walk: a call that is not there, or leads nowhere, and arguments without names."""
    trees = {module: ast.parse(source) for module, source in sources.items()}
    found = []
    for (module, name), (_, following) in pairwise(walk):
        function, last = find(trees[module], name), following.split(".")[-1]
        calls = [c for c in ast.walk(function) if isinstance(c, ast.Call) and called(c)[0] == last]
        if not calls:
            found.append(f"{module}.{name} does not call {last}")
        for call in calls:
            if not is_known(called(call)[1], last, function, trees[module]):
                found.append(f"{module}.{name}: nobody knows what {ast.unparse(call.func)} is")
            if any(k.arg is None and ast.unparse(k.value) != LAUNCH for k in call.keywords):
                found.append(f"{module}.{name} calls {last} with **")
    for module, name in walk:
        for argument in (*(f := find(trees[module], name)).args.args, *f.args.kwonlyargs):
            if argument.annotation is not None and ast.unparse(argument.annotation).split("[")[0] in ("Any", "dict"):
                found.append(f"{module}.{name}: {argument.arg} is {ast.unparse(argument.annotation)}")
    return found


def sources() -> dict[str, str]:
    return {module: (PACKAGE / f"{module}.py").read_text() for module, _ in WALK}


def unpacked(source: str) -> list[str]:
    """What calls turn into keyword arguments that nobody can read there: locals(), a record, a new dictionary."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    values = [k.value for call in calls for k in call.keywords if k.arg is None]
    return [
        ast.unparse(value)
        for value in values
        if isinstance(value, (ast.Dict, ast.DictComp, ast.BinOp))
        or (isinstance(value, ast.Call) and called(value)[0] in ("locals", "vars", "_asdict", "asdict"))
    ]


def test_from_the_public_function_to_the_product():
    assert len(WALK) - 1 <= MOST_CALLS
    assert problems(WALK, sources()) == []


@pytest.mark.parametrize(
    ("module", "old", "new", "words"),
    [
        ("loss", "return _linear_loss(given, inputs, config,", "return _linear_loss(**locals(), x=(", "with **"),
        (
            "head/plan",
            "part: Head, needs: Needs, sparsity: Sparsity, *, want",
            "part: Any, needs, sparsity, *, want",
            "",
        ),
        ("head/head", "return forward(", "return path.forward(", "nobody knows what path.forward is"),
        ("step", "forward_for_backward(", "self.anything(", "does not call forward_for_backward"),
    ],
)
def test_the_walk_can_fail(module, old, new, words):
    changed = sources()
    assert old in changed[module]
    changed[module] = changed[module].replace(old, new)
    if "x=(" in new:  # closes the bracket that the change opened
        changed[module] = changed[module].replace("return_entropy))\n", "return_entropy)))\n")
    assert any(words in line for line in problems(WALK, changed)), problems(WALK, changed)


def test_no_call_hides_its_arguments():
    """But flags, which fill whichever dataclass they are given, and adapters, which pass on what a framework gave."""
    modules = [path for path in PACKAGE.rglob("*.py") if path.name != "flags.py" and path.parent.name != "frameworks"]
    assert {str(path.relative_to(PACKAGE)): names for path in modules if (names := unpacked(path.read_text()))} == {}


@pytest.mark.parametrize(
    "argument",
    [
        "**locals()",
        "**inputs._asdict()",
        "**(head | {'bias': bias})",
        "**{k: v for k, v in x.items() if k != 'rewards'}",
    ],
)
def test_hidden_arguments_can_be_found(argument):
    assert unpacked(f"loss(logprobs, {argument}, config=config)")
