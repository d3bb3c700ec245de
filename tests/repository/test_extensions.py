"""A new divergence, GPU architecture or adapter touches few files: those that CONTRIBUTING names."""

from __future__ import annotations

import re

import pytest
from extensions import FRAMEWORKS, ROOT, files_naming

from lad_kernels.head.cost import SPEEDS
from lad_kernels.objective.config import DIVERGENCES

# One that no test, program or page takes as its example, and that this file does not name either; so is ARCHITECTURE.
DIVERGENCE = DIVERGENCES[5]
DIVERGENCE_FILES = {
    "lad_kernels/objective/config.py",  # the key
    "lad_kernels/objective/divergences.py",
    "lad_kernels/objective/kernels/divergences.py",
    "lad_kernels/reference_objective.py",
    "tests/support/divergence_facts.py",
}
ARCHITECTURE = list(dict.fromkeys(architecture for architecture, _ in SPEEDS))[2]
ARCHITECTURE_FILES = {
    "lad_kernels/head/kernels/tile_table.py",
    "lad_kernels/head/cost.py",
    "benchmarks/harness/aot.py",
}
ADAPTERS = [name for name in FRAMEWORKS if name not in ("trl", "verl")]  # tested with the framework itself: more files


def adapter_files(name: str) -> set[str]:
    return {
        f"lad_kernels/frameworks/{name}.py",
        f"tests/frameworks/test_{name}.py",
        f"docs/frameworks/{name}.md",
        "README.md",
    }


def word(name: str) -> str:
    return rf"\b{name}\b"


def adapter(name: str) -> str:
    """As the module or the framework spells it, in longer names too."""
    return name.replace("_", "[-_]")


def test_a_divergence_is_named_in_five_files_of_code_and_at_most_two_of_prose():
    """A list of names elsewhere derives from DIVERGENCES."""
    found = files_naming(word(DIVERGENCE), ROOT)
    assert {name for name in found if not name.endswith(".md")} == DIVERGENCE_FILES
    assert len(found) <= 7, found


def test_an_architecture_is_named_in_three_files_of_code():
    """What is compiled for it derives from aot.TARGETS."""
    found = files_naming(word(ARCHITECTURE), ROOT)
    assert {name for name in found if not name.endswith(".md")} == ARCHITECTURE_FILES


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_named_in_four_files(name):
    """Whatever lists adapters looks into the folders."""
    assert files_naming(adapter(name), ROOT) == adapter_files(name)


def test_there_are_adapters_to_count():
    assert len(ADAPTERS) >= 3


@pytest.mark.parametrize("pattern", [word(DIVERGENCE), word(ARCHITECTURE), *map(adapter, ADAPTERS)])
@pytest.mark.parametrize(
    "path", ["benchmarks/more.py", "tests/support/more.py", "docs/more.md", "setup.py", "Makefile"]
)
def test_a_name_elsewhere_is_found(path, pattern, tmp_path):
    planted, name = tmp_path / path, pattern.replace(r"\b", "").replace("[-_]", "_")
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(f'NAMES = ("planted", "{name}")')
    planted.with_name("other.py").write_text('NAMES = ("planted",)')
    assert files_naming(pattern, tmp_path) == {path}


def test_spellings():
    assert all(re.search(adapter("new_rl"), text) for text in ("import new_rl", "new-rl's loss", "new_rl_lad_loss"))
    assert not re.search(word("js"), "json")
