"""Every snippet of README and docs/ runs as it stands, in a namespace of its own; commands, names and links exist."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
from dataclasses import fields

import pytest
import torch
import torch.distributed as dist
from extensions import FRAMEWORKS
from pages import PAGES, ROOT, Snippet, section, snippets, snippets_of

pytest.importorskip("transformers", reason="needs the train extra: transformers; lost: the snippets of all pages")
pytest.importorskip("jsonargparse", reason="needs the cli extra: jsonargparse; lost: the snippets of all pages")

import lad_kernels
from lad_kernels import GRPOConfig, LADConfig, cli, doctor, linear_grpo_loss, linear_lad_loss, linear_policy_loss
from lad_kernels.frameworks.transformers import attach_fused_head

CODE = snippets("python")
NEAR = 5e-6  # relative error in float32; 7e-7 was measured


def near(x: torch.Tensor, truth: torch.Tensor) -> bool:
    return bool((x - truth).norm() <= NEAR * truth.norm()) and bool(truth.any())


def check_losses(names: dict) -> None:
    """Micro-batches with the global normalizer add up to the gradient of the one batch."""
    hidden, weight = (names[n].detach().requires_grad_() for n in ("hidden", "weight"))
    given = {"rewards": names["rewards"], "group_size": 8, "loss_mask": names["mask"], "impl": "reference"}
    linear_lad_loss(hidden, weight, names["targets"], names["old_logprobs"], **given).loss.backward()
    assert near(names["hidden"].grad, hidden.grad)
    assert near(names["weight"].grad, weight.grad)


def by_formula(names: dict, **options) -> None:
    """The snippet's objective on stored logits gives its gradients."""
    leaves = [names[n].detach().requires_grad_() for n in ("hidden", "weight")]
    options |= {"loss_mask": names.get("mask"), "cu_seqlens": names.get("cu_seqlens"), "impl": "reference"}
    objective = next(names[n] for n in ("ppo", "dpo", "sapo", "objective") if n in names)
    linear_policy_loss(*leaves, names["targets"], objective, **options).loss.backward()
    for leaf, name in zip(leaves, ("hidden", "weight")):
        assert near(names[name].grad, leaf.grad), name


def check_new(names: dict) -> None:
    assert names["objective"].scale.grad
    by_formula(names)


def check_cross_entropy(names: dict) -> None:
    """Once with the z-loss and once, in two parts, without."""
    hidden, weight = (names[n].detach().requires_grad_() for n in ("hidden", "weight"))
    z = (hidden @ weight.T).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(z, names["targets"].flatten())
    squares = z.logsumexp(-1)[names["targets"].flatten() != -100].square().mean()
    (2 * loss + 1e-4 * squares).backward()
    assert near(names["hidden"].grad, hidden.grad)
    assert near(names["weight"].grad, weight.grad)


def check_sparsity(names: dict) -> None:
    assert names["profile"].tokens == names["completion"].sum() == 4 * 24  # completions alone
    assert 0 < names["profile"].kept_share <= 1


def check_transformers(names: dict) -> None:
    assert names["out"].result.logprobs.shape == (2, 15)
    ids, model = names["ids"], copy.deepcopy(names["model"])
    model.zero_grad()
    logits = model(input_ids=ids).logits[:, :-1]  # [B, T, V]
    logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).mean().backward()
    assert near(names["model"].lm_head.weight.grad, model.lm_head.weight.grad)


def check_trl(names: dict) -> None:
    trainer, weight = names["trainer"], names["model"].lm_head.weight
    assert trainer.state.global_step == 2
    assert trainer.optimizer.state[weight]["exp_avg"].any()


def check_fsdp2(names: dict) -> None:
    """Against the same weights in a model that nothing wraps."""
    sharded = dict(names["model"].named_parameters())
    model = names["AutoModelForCausalLM"].from_config(names["model"].config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(sharded[name].to_local())  # one rank has all
    attach_fused_head(model)
    model(input_ids=names["ids"], fused_head=names["loss"]).result.backward()
    for name, p in model.named_parameters():
        assert near(sharded[name].grad.to_local(), p.grad), name


def check_vocabulary(names: dict) -> None:
    hidden, rows = (names[n].detach().requires_grad_() for n in ("hidden", "rows"))
    linear_lad_loss(
        hidden, rows, names["targets"], names["old_logprobs"], advantages=names["advantages"], impl="reference"
    ).loss.backward()
    assert near(names["hidden"].grad, hidden.grad)
    assert near(names["rows"].grad, rows.grad)


def check_readme(names: dict) -> None:
    assert callable(names["grpo_step"])  # test_readme.py calls it


def check_compiled(names: dict) -> None:
    """The gradients are those of the call as it is."""
    found = [p.grad for module in (names["body"], names["lm_head"]) for p in module.parameters()]
    hidden = names["body"](names["states"])
    given = (hidden, names["lm_head"].weight, names["targets"], names["old_logprobs"])
    loss = linear_lad_loss(*given, rewards=names["rewards"], group_size=4).loss
    truth = torch.autograd.grad(loss, [p for module in (names["body"], names["lm_head"]) for p in module.parameters()])
    assert all(near(x, y) for x, y in zip(found, truth, strict=True))


def check_checkpoint(names: dict) -> None:
    weight = names["lm_head"].weight
    truth = torch.autograd.grad(names["score"](names["states"]).mean(), weight)[0]
    assert near(weight.grad, truth)


# What each snippet has to have done, page by page in the order of its snippets. Diffs on the pages of frameworks that
# have a stub in the tests are checked beside it, in tests/frameworks.
CHECKS = {
    "README.md": [check_readme, check_readme],
    "docs/losses.md": [check_losses],
    "docs/own_losses.md": [by_formula, by_formula, functools.partial(by_formula, return_entropy=True), check_new],
    "docs/cross_entropy.md": [check_cross_entropy],
    "docs/compile.md": [check_compiled, check_checkpoint],
    "docs/sparsity.md": [check_sparsity],
    "docs/frameworks/transformers.md": [check_transformers],
    "docs/frameworks/trl.md": [check_trl],
    "docs/frameworks/distributed.md": [check_fsdp2, check_vocabulary],
}


def test_every_snippet_has_a_check():
    found = {snippet.page: len(snippets_of(snippet.page, "python")) for snippet in CODE}
    assert {page: len(checks) for page, checks in CHECKS.items()} == found


def test_every_framework_has_a_diff():
    """What changes in the user's script or settings; its own parts of the user's are left as they are."""
    for name in FRAMEWORKS:
        changes = snippets_of(f"docs/frameworks/{name}.md", "diff")
        assert changes, name
        for change in changes:
            assert {line[:2].strip() for line in change.source.splitlines()} <= {"", "+", "-"}, str(change)
            assert any(line.startswith("+") for line in change.source.splitlines()), str(change)


def packages_of(source: str) -> set[str]:
    """Top-level packages that a snippet imports."""
    nodes = list(ast.walk(ast.parse(source)))
    absolute = [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    absolute += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    return {name.split(".")[0] for name in absolute}


@pytest.mark.parametrize("snippet", CODE, ids=str)
def test_snippet_runs_as_it_stands(snippet: Snippet, tmp_path, monkeypatch):
    needed = packages_of(snippet.source)
    needed |= {name for name in FRAMEWORKS if f"lad_kernels.frameworks.{name}" in snippet.source}
    for package in needed:
        pytest.importorskip(package, reason=f"{package} is not installed; lost: the snippet at {snippet}")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    try:
        names = snippet.run()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    CHECKS[snippet.page][snippets_of(snippet.page, "python").index(snippet)](names)


def test_a_name_that_nobody_defined_is_caught():
    with pytest.raises(NameError, match="hidden"):
        Snippet("docs/losses.md", 1, "python", "loss = hidden.sum()\n").run()


def commands(source: str) -> list[list[str]]:
    """The commands of a shell block, as words."""
    lines = source.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def extras() -> set[str]:
    (call,) = [
        n for n in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if getattr(n, "arg", "") == "extras_require"
    ]
    return {key.value for key in call.value.keys}


def flags(command: str) -> set[str]:
    """Long flags that a command of `lad-kernels` takes."""
    if command == "bench":
        return {"gpu", *re.findall(r'"--([\w-]+)"', (ROOT / "benchmarks" / "conftest.py").read_text())}
    if command == "train":
        train_config = pytest.importorskip("integration.train_config", reason="needs the train extra")
    kind = {
        "doctor": lambda: doctor.Asked,
        "profile": lambda: cli.ProfileConfig,
        "train": lambda: train_config.TrainConfig,
    }
    return {f.name.replace("_", "-") for f in fields(kind[command]())} | {
        "config",
        "print-config",
        "resume",
        "overwrite",
    }


def wrong(words: list[str]) -> str | None:
    """What is wrong with a command of a page; None if nothing is."""
    program, rest = words[0], words[1:]
    if program == "pip":
        named = set(re.findall(r"\.\[([\w,]+)\]", " ".join(words)))
        return f"extras {named - extras()}" if named - extras() else None
    if program == "make":
        done = subprocess.run(["make", "-n", rest[0]], cwd=ROOT, capture_output=True)
        return done.stderr.decode() or None if done.returncode else None
    if program == "lad-kernels":
        unknown = {w[2:] for w in rest if w.startswith("--")} - flags(rest[0]) if rest[0] in cli.COMMANDS else rest[0]
        return f"{unknown}" if unknown else None
    if program in ("python", "accelerate"):
        module = rest[rest.index("-m") + 1]
        ours = module.split(".")[0] in ("lad_kernels", "integration", "benchmarks", "docs", "pytest")
        return None if not ours or importlib.util.find_spec(module) else f"no module {module}"
    if program.startswith("--"):
        return None  # flags of another program; names of ours are checked below
    return None if (ROOT / program).exists() else f"no program {program}"


@pytest.mark.parametrize("snippet", snippets("bash"), ids=str)
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed; lost: whether its targets exist")
def test_commands_exist(snippet: Snippet):
    assert [problem for words in commands(snippet.source) if (problem := wrong(words))] == []


GHOSTS = (
    "pip install '.[trx]'",
    "make tset",
    "lad-kernels profile --modle x",
    "lad-kernels prof",
    "python -m integration.x",
    "benchmarks/cpu.sh",
)


@pytest.mark.parametrize("line", GHOSTS)
def test_commands_that_do_not_exist_are_caught(line):
    assert wrong(shlex.split(line))


def missing_name(dotted: str) -> bool:
    """Whether `lad_kernels.a.b` is neither a module, one that needs an absent framework included, nor in one."""
    parts = dotted.split(".")
    for depth in range(len(parts), 0, -1):
        name = ".".join(parts[:depth])
        try:
            thing = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name or (error.name or "").startswith("lad_kernels"):
                continue
            return depth != len(parts)
        except ImportError:
            return depth != len(parts)
        for part in parts[depth:]:
            if not hasattr(thing, part):
                return True
            thing = getattr(thing, part)
        return False
    return True


def missing_modules(text: str) -> list[str]:
    """Modules of this repository that `python -m` is said to run and that do not exist."""
    named = re.findall(r"python3? -m\s+((?:lad_kernels|integration|benchmarks|docs)(?:\.\w+)*)", text)
    return [
        name
        for name in named
        if not (ROOT / f"{name.replace('.', '/')}.py").exists()
        and not (ROOT / name.replace(".", "/") / "__main__.py").exists()
    ]


def test_modules_in_prose_exist():
    assert {str(p.relative_to(ROOT)): missing_modules(p.read_text()) for p in PAGES} == {
        str(p.relative_to(ROOT)): [] for p in PAGES
    }
    assert missing_modules("`python -m\nbenchmarks.ghost`") == ["benchmarks.ghost"]


def test_names_of_the_package_in_prose_exist():
    named = {
        n for page in PAGES for n in re.findall(r"(?<![\w/.])lad_kernels(?:\.[a-zA-Z]\w*)+(?![\w/])", page.read_text())
    }
    assert len(named) > 10
    assert sorted(n for n in named if missing_name(n)) == []
    assert missing_name("lad_kernels.frameworks.trl_loss")
    assert missing_name("lad_kernels.linear_lad_los")


def anchor(heading: str) -> str:
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def broken_links(text: str, folder) -> list[str]:
    found = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, name = target.partition("#")
        page = folder / path
        headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE) if name and page.exists() else []
        if not page.exists() or (name and name not in map(anchor, headings)):
            found.append(target)
    return found


def test_links_lead_somewhere():
    assert {str(p.relative_to(ROOT)): broken_links(p.read_text(), p.parent) for p in PAGES} == {
        str(p.relative_to(ROOT)): [] for p in PAGES
    }
    assert broken_links("[a](ghost.md) [b](losses.md#ghost)", ROOT / "docs") == ["ghost.md", "losses.md#ghost"]


def first_column(text: str) -> set[str]:
    """Names in backticks in the first column of the tables of a text."""
    return {name for row in re.findall(r"^\|(.*?)\|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}


def test_metrics_are_the_ones_that_calls_return():
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=g).requires_grad_() for n in (12, 30))  # [N, D], [V, D]
    targets, old = torch.randint(0, 30, (12,), generator=g), torch.full((12,), -3.4)  # [N], [N]
    given = {"advantages": torch.randn(12, generator=g), "ref_logprobs": old, "return_entropy": True}
    every = set()
    for call, kind in ((linear_lad_loss, LADConfig), (linear_grpo_loss, GRPOConfig)):
        every |= call(
            hidden, weight, targets, old, config=kind(kl_coef=0.1, log_ratio_clamp=5.0), **given
        ).metrics.keys()
    assert first_column(section("docs/losses.md", "## Metrics")) == every


def test_tables_of_losses_have_every_choice():
    from lad_kernels.objective import config

    page = (ROOT / "docs" / "losses.md").read_text()
    assert first_column(section("docs/losses.md", "## LAD")) - {"divergence"} == set(config.DIVERGENCES)
    for name in (*config.LEVELS, *config.AGGREGATIONS, *config.ADVANTAGE_SCALES, *config.TAILS):
        assert f"`{name}`" in page, name
    others = [(ROOT / "docs" / f"{name}.md").read_text() for name in ("sparsity", "own_losses")]
    named = set(re.findall(r"\w+", page + "".join(others)))
    for kind in (LADConfig, GRPOConfig):
        told = {f.name for f in fields(kind) if not f.name.startswith(("sapo_", "vespo_"))}
        assert told <= named, told - named
    records = {"LossOutput", "LinearLogprobs", "SparsityProfile", "CrossEntropyStats"}
    assert set(lad_kernels.__all__) - records <= named


def test_the_families_are_listed():
    from families import FAMILIES

    page = (ROOT / "docs" / "frameworks" / "transformers.md").read_text()
    text = re.search(r"<summary>The families</summary>\n\n(.*?)\n\n</details>", page, re.DOTALL).group(1)
    assert text.replace("\n", " ").split(", ") == FAMILIES
    assert f"{len(FAMILIES)} families" in page
    assert f"{len(FAMILIES)} transformers families" in PAGES[0].read_text()
