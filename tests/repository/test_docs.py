"""Pages under docs/ agree with the code: plots with closed forms, tables with what is computed, names with the API."""

from __future__ import annotations

import html
import inspect
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from divergence_facts import COEFFICIENT

pytest.importorskip("matplotlib", reason="the plots need the train extra: matplotlib; lost: all checks of docs/")
pytest.importorskip("transformers", reason="the runs need the train extra: transformers; lost: all checks of docs/")
pytest.importorskip("rich", reason="the tables need the train extra: rich; lost: all checks of docs/")

from matplotlib.figure import Figure
from pages import PAGES as PAGES_OF_THE_SITE
from pages import ROOT

import lad_kernels
from benchmarks.studies import diversity
from docs.tools import figures, head_share
from lad_kernels import GRPOConfig, LADConfig

DOCS = figures.DOCS
PAGES = {name: (DOCS / name).read_text() for name in figures.PAGES}
RESULTS = (DOCS / "results.md").read_text()
NEAR = 1e-12  # relative error of float64 coefficients; 2e-15 was measured


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-ratios and targets [M] of the plotted range, off x = 1, where closed forms cancel."""
    values = torch.linspace(-4, 4, 17, dtype=torch.float64)
    d, u = torch.cartesian_prod(values, values + 0.25).unbind(1)
    return d, u


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found - truth).abs() / truth.abs()).max().item()


@pytest.mark.parametrize("name", figures.DIVERGENCES)
def test_plotted_coefficients_are_the_closed_forms(name):
    d, u = grid()
    assert relative(figures.coefficients(LADConfig(name, eta=1.0), d, u), COEFFICIENT[name](d, u)) < NEAR
    wrong = COEFFICIENT["hd" if name == "js" else "js"]
    assert relative(figures.coefficients(LADConfig(name, eta=1.0), d, u), wrong(d, u)) > 0.1


def test_plotted_grpo_stops_at_the_clip():
    d, a = grid()
    r = d.exp()
    clipped = ((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8))
    found = figures.coefficients(GRPOConfig(), d, a)
    assert clipped.any()
    assert (found[clipped] == 0).all()
    assert relative(found[~clipped], (-a * r)[~clipped]) < NEAR


@pytest.mark.parametrize(("level", "power", "total"), [("token", 1, 1), ("sequence", 1, 1), ("sequence_sum", 0, 1)])
def test_plotted_levels(level, power, total):
    """-c of a token times their number: at drift x the sum sees L x, the others x."""
    lengths, drift, u = [1, 10, 700], 0.005, torch.tensor(4.0, dtype=torch.float64)
    found = figures.by_length(level, lengths, drift, 4.0)
    for length, value in zip(lengths, found):
        seen = torch.tensor(drift * (length if level == "sequence_sum" else 1), dtype=torch.float64)
        truth = -COEFFICIENT["js"](seen, u) * (length if level == "sequence_sum" else 1)
        assert relative(value, truth) < 1e-11


def test_large_and_small_eta_of_js():
    """The two limits that the page states."""
    a = torch.tensor([-1.5, 0.5, 1.5], dtype=torch.float64)
    large = -figures.coefficients(LADConfig(eta=1e4), torch.zeros(3), a)
    assert relative(large, a / 4e4) < 1e-3
    small = -figures.coefficients(LADConfig(eta=1e-2), torch.zeros(3), a)
    assert small[0].item() == pytest.approx(-0.3466, abs=1e-4)
    assert small[2].item() == pytest.approx(75, rel=0.01)


def test_plots_are_there_small_and_drawn_by_this_code():
    named = {m for text in PAGES.values() for m in re.findall(r"\]\(([\w-]+\.png)\)", text)}
    assert named == set(figures.PLOTS)
    for name, (plot, size) in figures.PLOTS.items():
        path = DOCS / name
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert path.stat().st_size < 150_000
        figure = Figure(figsize=size)
        plot(figure)
        lines = [line for axes in figure.axes for line in axes.lines]
        assert len(lines) > 3
        assert all(torch.isfinite(torch.as_tensor(line.get_ydata(), dtype=torch.float64)).all() for line in lines)


@pytest.mark.parametrize("name", figures.PAGES)
def test_tables_are_what_the_code_computes(name):
    assert figures.fill(PAGES[name], figures.TABLES) == PAGES[name], "run python -m docs.tools.figures"


def test_stale_tables_are_found():
    page = PAGES["when_it_helps.md"]
    stale = page.replace("27.6%", "27.7%")
    assert stale != page
    assert figures.fill(stale, figures.TABLES) == page
    used = {m for text in PAGES.values() for m in re.findall(r"<!-- table: ([\w-]+) -->", text)}
    assert used == set(figures.TABLES) | set(figures.MEASURED)


def test_the_table_of_runs_is_that_of_their_results():
    rows = diversity.load().tables[diversity.TABLE]
    assert len(rows) == 3 * len(diversity.RUNS)
    assert "\n".join(diversity.table(rows)) in (DOCS / "diversity.md").read_text()


def test_measured_bandit_table_can_be_had_again():
    """A quarter of the steps comes within 0.004 of the written distance (measured); tv would be 0.15 away."""
    row = re.search(r"^\| js \| None \|(.*)\|$", PAGES["divergences.md"], re.MULTILINE)[1].split("|")
    written = dict(zip(figures.ETAS, map(float, row)))
    found = figures.bandit_distances({"js": LADConfig(eta=1.0)}, steps=1000)["js"]
    assert found == pytest.approx(written[1.0], abs=5e-3)


PUBLISHED = {  # parameters in all, as the models' files count them
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Llama-3-8B": 8_030_261_248,
    "Qwen2.5-32B": 32_763_876_352,
    "Llama-3-70B": 70_553_706_496,
}


@pytest.mark.parametrize("shape", head_share.SHAPES, ids=lambda s: s.name)
def test_model_shapes_have_the_published_number_of_weights(shape):
    assert shape.weights == pytest.approx(PUBLISHED[shape.name], rel=3e-4)  # norms and biases are left out
    assert replace(shape, intermediate_size=shape.intermediate_size * 21 // 20).weights != pytest.approx(
        PUBLISHED[shape.name], rel=3e-3
    )


def test_model_shapes_count_the_matrix_products_of_transformers():
    transformers = pytest.importorskip("transformers", reason="needs the train extra; lost: an outside count")
    shape = head_share.SHAPES[0]
    config = transformers.Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
        intermediate_size=shape.intermediate_size,
    )
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert products == shape.blocks + shape.head
    assert shape.share(0) == shape.head / products


def test_quoted_measurements_are_those_of_the_results():
    quoted = ["3,044", ".465 +- .052", ".449 +- .039", ".765", ".776", ".673", "0.91", "0.39", "1.14", "1.19", "1.03"]
    for number in quoted:
        assert number in RESULTS, number
        assert any(number in page for page in PAGES.values()), number
    assert abs(head_share.EAGER_COPIES - 2.56) < 0.01
    assert "2.56 such copies" in PAGES["when_it_helps.md"]


def test_the_site_has_every_page_name_argument_and_word(tmp_path):
    """What `make docs` runs, strictly: Sphinx imports the modules, so a docstring cannot be behind its page."""
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package, reason=f"needs the docs extra: {package}; lost: links of the site, API reference")
    printed = subprocess.check_output(["make", "-n", "docs"], cwd=ROOT, text=True)
    command = shlex.split(re.search(r"-m (sphinx .*)", printed)[1])
    assert {"-n", "-W", "build/site"} <= set(command)
    command[-1] = str(tmp_path)
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for path in PAGES_OF_THE_SITE:
        assert (tmp_path / path.relative_to(ROOT).with_suffix(".html")).exists(), path
    assert (tmp_path / "index.html").read_text() == (tmp_path / "README.html").read_text()
    assert 'role="search"' in (tmp_path / "index.html").read_text()
    api = (tmp_path / "docs" / "api.html").read_text()
    frameworks = {path.stem for path in PAGES_OF_THE_SITE if path.parent.name == "frameworks"}
    assert frameworks <= set(re.findall(r'id="module-lad_kernels\.frameworks\.(\w+)"', api))
    page = html.unescape(re.sub("<[^>]+>", " ", api))
    words = set(re.findall(r"\w+", page))
    for name in lad_kernels.__all__:
        thing = getattr(lad_kernels, name)
        assert set(re.findall(r"\w+", inspect.getdoc(thing))) - words <= {"Args", "Attributes"}, name
        assert set(inspect.signature(thing).parameters) <= words, name
