"""Predictions and published figures next to measured ones: entries are about rows that exist, and misses are marked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.gpu import head_shapes
from benchmarks.gpu.plan import PLAN
from benchmarks.harness import expected, sparse, terminal
from benchmarks.harness.provider import JOBS
from benchmarks.harness.providers import all_providers
from benchmarks.harness.results import RESULTS, Results
from benchmarks.harness.shapes import GPU, Shape
from lad_kernels.head import dispatch, memory

BENCHMARKS = Path(expected.__file__).parents[1]
ENTRIES = expected.load(RESULTS)
SHAPES = {str(s): s for s in (*GPU, *head_shapes.SHAPES, sparse.SHAPES["gpu"])}
H100 = "NVIDIA H100 80GB HBM3, 132 multiprocessors, 79 GiB, CUDA 13.0"
H200 = "NVIDIA H200, 132 multiprocessors, 140 GiB, CUDA 13.0"
CPU = "AMD EPYC, 2 cores"


def entry(quantity: str = "of_three_products", predicted: float | None = 1.0, **changed) -> dict:
    return {
        "experiment": "one_pass",
        "table": "one pass",
        "match": {"shape": "s", "path": "one_pass", "rows": 32},
        "quantity": quantity,
        "predicted": predicted,
        "source": "a model",
        "published": [{"value": 0.9, "what": "a peer", "device": "H100", "source": "https://peer"}],
        **changed,
    }


def results(device: str = H100, **measured) -> Results:
    found = Results({"device": device, "versions": {"torch": "2"}, "commit": "abc", "command": "gpu.sh"})
    found.add("one pass", shape="s", path="two_pass", rows="", **dict.fromkeys(measured, 77.0))
    found.add("one pass", shape="s", path="one_pass", rows=32, **measured)
    return found


def test_there_are_entries():
    assert len(ENTRIES) > 50
    assert {e.get("device") for e in ENTRIES} == {None, "H100", "H200"}


@pytest.mark.parametrize("wanted", ENTRIES, ids=lambda e: f"{expected.what(e)}, {e['quantity']}, {e.get('device')}")
def test_an_experiment_can_produce_the_row(wanted):
    """As far as the source tells: tables and their fields, shapes, providers, jobs."""
    assert expected.problems(wanted) == []
    match = wanted["match"]
    text = match.get("shape") or match.get("what", "")
    assert " N=" not in text or any(text.endswith(shape) for shape in SHAPES)
    assert match.get("data", "flat") in ("flat", "peaked") or match["job"] == "products"
    assert match.get("path", "routed") in (*dispatch.PATHS, "as chosen")
    assert match.get("case", "off-policy") in sparse.CASES
    if match.get("job", "products") != "products":
        assert match["job"] in JOBS
        assert match["provider"] in {p.name for p in all_providers(match["job"])}


def test_no_two_entries_ask_for_the_same():
    asked = [json.dumps([e["table"], e["match"], e["quantity"], e.get("device")]) for e in ENTRIES]
    assert len(set(asked)) == len(asked)


def test_every_figure_has_a_source_that_a_reader_can_open():
    for e in ENTRIES:
        assert len(e["source"].split()) >= 3
        assert all(p["source"].startswith("https://github.com/") for p in e["published"])
        assert "shared" not in e["source"]


def test_experiments_write_these_tables():
    names = {e.name for e in PLAN}
    sources = "".join(p.read_text() for p in BENCHMARKS.rglob("*.py") if p.name != "expected.py")
    for name, table in expected.TABLES.items():
        assert table.experiment in names
        assert f'"{name}"' in sources
        for field in (*table.keys, *table.quantities):
            assert f'"{field}"' in sources or f" {field}=" in sources or f"({field}=" in sources, f"{name}: {field}"


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"table": "two pass"}, "no experiment writes"),
        ({"experiment": "routed"}, "is written by one_pass"),
        ({"match": {"shape": "s", "path": "one_pass"}}, "a row is identified by"),
        ({"match": {"shape": "s", "path": "one_pass", "rows": 32, "data": "flat"}}, "a row is identified by"),
        ({"quantity": "time_ratio"}, "has no time_ratio"),
        ({"quantity": "ms"}, "belong to a card"),
        ({"predicted": "1"}, "not a positive number"),
        ({"predicted": 0}, "not a positive number"),
        ({"predicted": None, "published": []}, "nothing is expected"),
        ({"source": ""}, "source is empty"),
        ({"published": [{"value": 1.0, "what": "a peer", "device": "H100", "source": ""}]}, "published"),
        ({"published": [{"value": 1.0, "what": "a peer", "source": "https://peer"}]}, "published"),
        ({"note": "x"}, "fields"),
    ],
)
def test_impossible_entries_are_found(changed, problem):
    assert expected.problems(entry()) == []
    assert any(problem in found for found in expected.problems(entry(**changed)))


def test_memory_is_what_the_cost_model_says():
    """Entries that name peak_bytes follow it, to the share that is marked."""
    seen = 0
    for e in ENTRIES:
        if "peak_bytes" not in e["source"] or e["quantity"] != "beyond_gradients_mib":
            continue
        m = e["match"]
        shape: Shape = SHAPES[m["shape"]]
        work = memory.Work(shape.tokens, shape.hidden_size, shape.vocab_size, 2, "sm_90")
        path = m.get("path", "two_pass" if m.get("job") == "ce" else "as chosen")
        if path == "as chosen":
            path = "routed" if m["data"] == "peaked" else "one_pass"
        size, with_dw = memory.peak_bytes(work, path, int(0.052 * work.tokens * work.blocks))
        size += with_dw * 4 * work.vocab_size * work.hidden_size
        assert e["predicted"] == pytest.approx(size / 2**20, rel=expected.OFF), expected.what(e)
        seen += 1
    assert seen > 10


@pytest.mark.parametrize(("measured", "off", "marked"), [(1.0, 0, False), (1.2, 0.2, True), (0.8, -0.2, True)])
def test_a_miss_is_marked(measured, off, marked):
    found = expected.compare([entry()], [results(of_three_products=measured)])
    assert [(r.off, r.marked) for r in found.rows] == [(pytest.approx(off), marked)]
    assert (found.missing, found.elsewhere) == (0, 0)


def test_the_share_that_is_marked():
    runs = [results(of_three_products=1.14), results(of_three_products=1.16)]
    assert [expected.compare([entry()], [run]).rows[0].marked for run in runs] == [False, True]


@pytest.mark.parametrize("absent", (None, [], "refused", float("nan"), True))
def test_what_is_no_number_is_not_measured(absent):
    found = expected.compare([entry()], [results(of_three_products=absent)])
    assert (found.rows, found.missing) == ([], 1)


def test_zero_is_measured():
    assert expected.compare([entry()], [results(of_three_products=0.0)]).rows[0].off == -1


def test_another_card_and_no_gpu():
    at_home = entry("ms", 30.0, device="H100")
    times = [29.0, 30.0, 300.0]  # quartiles: the median counts
    assert expected.compare([at_home], [results(H100, ms=times)]).rows[0].off == 0
    for device, elsewhere in ((H200, 1), (H100.replace("H100", "GH100"), 1), (CPU, 1)):
        found = expected.compare([at_home], [results(device, ms=times)])
        assert (found.rows, found.missing, found.elsewhere) == ([], 0, elsewhere)
    assert len(expected.compare([entry()], [results(H200, of_three_products=1.0)]).rows) == 1
    assert expected.compare([entry()], [results(CPU, of_three_products=1.0)]).rows == []


def test_the_beginning_of_a_text():
    wanted = entry(
        "gb_per_s", 4000, experiment="ceilings", table="ceilings", match={"what": "copy of *"}, device="H100"
    )
    run = results()
    run.add("ceilings", what="bf16 product 8192^3", tflops=700.0, gb_per_s=None)
    run.add("ceilings", what="copy of 4096 MiB", tflops=None, gb_per_s=3000.0)
    assert expected.problems(wanted) == []
    assert expected.compare([wanted], [run]).rows[0].off == -0.25


def test_order_and_counts():
    entries = [
        entry("of_three_products", 1.0),
        entry("kept_share", None),
        entry("flops_of_ndv", 6),
        entry("beyond_gradients_mib", 100.0),
        entry("ms", 30.0, device="H200"),
        entry("tflops", 700.0, device="H100"),
    ]
    run = results(of_three_products=1.01, kept_share=0.05, flops_of_ndv=2.0, beyond_gradients_mib=120.0, ms=30.0)
    found = expected.compare(entries, [run])
    assert [row.entry["quantity"] for row in found.rows] == [
        "flops_of_ndv",
        "beyond_gradients_mib",
        "of_three_products",
        "kept_share",
    ]
    assert found.counts() == "Off by more than 15 %: 2 of 4 compared; not measured: 1; of another card: 1."


def save(folder: Path, names: dict[str, float], device: str = H100) -> None:
    for name, measured in names.items():
        results(device, of_three_products=measured).save(folder / name)


def test_the_newest_file_counts(tmp_path):
    names = {"A-20261201-090000.json": 3.0, "B-20261130-235959.json": 2.0, "results.json": 1.0, "z-2.json": 1.5}
    save(tmp_path, names)
    files = sorted(tmp_path.glob("*.json"), key=expected.age)
    assert [f.name for f in files] == ["results.json", "z-2.json", "B-20261130-235959.json", "A-20261201-090000.json"]
    found = expected.compare([entry()], [Results.load(f) for f in files])
    assert found.rows[0].measured == 3


def section(text: str) -> list[list[str]]:
    """The rows of the table under the heading."""
    after = text.split("### Measured beside predicted and published\n")[1].split("\n### ")[0]
    return [[c.strip() for c in line.strip("|").split("|")] for line in after.splitlines() if line.startswith("|")]


def test_report_puts_them_side_by_side(tmp_path):
    entries = [entry(), entry("kept_share", None), entry("flops_of_ndv", 6.125)]
    results(of_three_products=1.2, kept_share=0.5).save(tmp_path / "nvidia-h100" / "A-20261201-090000.json")
    save(tmp_path, {"box/small.json": 5.0}, CPU)
    (tmp_path / expected.NAME).write_text(json.dumps(entries))
    text = report.document(tmp_path)
    assert text == report.document(tmp_path)
    header, _, *rows = section(text)
    assert header[:6] == ["experiment", "what", "quantity", "measured", "predicted", "off by"]
    peer = "0.9: [a peer](https://peer), H100"
    assert rows == [
        ["one_pass", "s, one_pass, rows 32", "of_three_products", "1.2", "1", "+20 % **off**", peer],
        ["one_pass", "s, one_pass, rows 32", "kept_share", "0.5", "", "", peer],
    ]
    assert "not measured: 1;" in text
    assert text.count("### Measured beside") == 1, "a CPU has no such section"
    measured, unmeasured = text.split("**not measured**", 1)
    assert "6.12" not in measured, "what is only predicted stands among the predictions"
    assert "6.12" in unmeasured
    assert "1. a model" in unmeasured


def test_report_without_expectations(tmp_path):
    save(tmp_path, {"nvidia-h100/A.json": 1.2})
    text = report.document(tmp_path)
    assert "Measured beside" not in text
    assert "GPUs, predicted" not in text


def test_short_names_the_misses():
    entries = [entry(predicted=1.0 + i / 100, match={"shape": "s", "path": "one_pass", "rows": i}) for i in range(30)]
    run = results()
    for i in range(30):
        run.add("one pass", shape="s", path="one_pass", rows=i, of_three_products=(1 + i / 100) * (1 if i < 2 else 1.3))
    lines = terminal.short(run, entries).splitlines()
    assert "Off by more than 15 %: 28 of 30 compared; not measured: 0; of another card: 0." in lines
    marked = [line for line in lines if line.startswith("+30 %")]
    assert len(marked) == 20
    assert marked[0].startswith("+30 % one_pass, s, one_pass, rows ")
    assert marked[0].endswith("; published 0.9 (a peer, H100)")
    run.machine["device"] = CPU
    assert "Off by" not in terminal.short(run, entries)


def test_every_entry_can_be_met():
    """A planted row for each entry, at what is predicted: nothing is missing and nothing is off, on either card."""
    for device, card in ((H100, "H100"), (H200, "H200")):
        run = Results({"device": device})
        for e in ENTRIES:
            number = e["predicted"] or e["published"][0]["value"]
            row = {k: v.replace("*", "4096 MiB") if isinstance(v, str) else v for k, v in e["match"].items()}
            if e.get("device", card) == card:
                run.add(e["table"], **row, **{e["quantity"]: [0.0, number, 2.0 * number]})
        found = expected.compare(ENTRIES, [run])
        assert found.missing == 0
        assert found.elsewhere == sum(e.get("device", card) != card for e in ENTRIES)
        assert not any(row.marked for row in found.rows)
