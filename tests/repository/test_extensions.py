"""A new divergence touches few files, and the files that CONTRIBUTING names."""

from __future__ import annotations

from extensions import ROOT, files_naming

from lad_kernels.objective.config import DIVERGENCES

EXAMPLE = DIVERGENCES[5]  # one that no test, program or page takes as its example
TOUCHED = {
    "lad_kernels/objective/config.py",  # the key
    "lad_kernels/objective/divergences.py",
    "lad_kernels/objective/kernels/divergences.py",
    "lad_kernels/reference_objective.py",
    "tests/support/divergence_facts.py",
}


def test_a_divergence_is_named_in_five_files_of_code_and_at_most_two_of_prose():
    """CONTRIBUTING says which; a list of names elsewhere derives from DIVERGENCES."""
    found = files_naming(EXAMPLE, ROOT)
    assert {name for name in found if not name.endswith(".md")} == TOUCHED
    assert len(found) <= 7, found


def test_a_list_of_names_elsewhere_is_found(tmp_path):
    planted = tmp_path / "benchmarks" / "more.py"
    planted.parent.mkdir()
    planted.write_text(f'NAMES = ("js", "{EXAMPLE}")')
    assert files_naming(EXAMPLE, tmp_path) == {"benchmarks/more.py"}
