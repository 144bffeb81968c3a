"""Reports of language models: lower perplexity is better, and metrics are not mixed."""

import csv
import json

import pytest
from fixtures import records as made

from tq_lightning.cli import main
from tq_lightning.report import figures
from tq_lightning.report.findings import findings, title
from tq_lightning.report.stats import compare, gaps
from tq_lightning.report.tables import accuracy as build


def language_models(**more):
    return [made.perplexities(r) for r in made.pair(model="lm", **more)]


def test_lower_perplexity_is_reported_as_better():
    better = [
        made.perplexities(made.run("floor", s, "lm", offset=4.0, model_ste="identity"))
        for s in (0, 1, 2)
    ]
    found = made.compare(*language_models(), *better)
    assert found.metric.key == "ppl" and len(found.by_metric) == 1
    group = next(g for g in found.by_quantizer if len(g.arms) > 1)
    arm = next(arm for _, arm in group.arms if not arm.nested)
    cost = gaps(arm, [2], "val")[2]
    assert cost.mean > 10
    assert compare(arm, arm, [2], "val", "truncate", "quantize")[2].unit == "in perplexity"
    assert gaps(next(a for _, a in group.arms if a.nested), [2], "val")[2].mean == 0
    said = {f.question: f for f in findings(found)}
    lost = said["What does truncation cost? (perplexity)"]
    assert "round loses up to" in lost.answer and "in perplexity" in lost.answer
    ste = next(f for q, f in said.items() if "straight-through" in q and "(perplexity)" in q)
    assert "Perplexity is higher in 4 of 4 comparisons" in ste.answer  # scaled is worse here
    text = " ".join([title(found), lost.answer, ste.answer, *lost.lines, *ste.lines])
    assert "%" not in text.replace("95 %", "") and "points" not in text and "top-1" not in text
    table = build.headline(found)
    assert "2 bits" in table.columns and table.title == "Perplexity by width"
    assert any("50.0% of the parameters are embedding tables" in n for n in build.arms(found).notes)


def test_figures_have_a_logarithmic_axis_and_a_pareto_front_of_low_values():
    more = [made.perplexities(r) for r in made.pair(model="larger_lm", offset=3.0)]
    drawn, _ = figures.draw(made.compare(*language_models(), *more))
    names = {figure.name: figure for figure in drawn}
    curves = next(f for name, f in names.items() if name.startswith("qt_gap_"))
    axes = curves.canvas.subfigs[1].axes[0]
    assert axes.get_yscale() == "log" and axes.get_ylabel().startswith("perplexity\n")
    front = next(f for name, f in names.items() if name.startswith("pareto_"))
    first, last = (float(front.title.split(" at ")[i].split()[0]) for i in (1, 2))
    assert first > last  # more bytes, lower perplexity
    assert all(name.endswith("_ppl") for name in names)
    assert not any("top-1" in f.caption or "top-1" in f.alt for f in drawn)
    ends = [f for f in drawn if f.section == "Training curves"]
    assert ends and not any("%" in f.title + f.alt for f in ends)


@pytest.mark.slow
def test_report_of_both_metrics_never_mixes_them(tmp_path, make, capsys):
    runs = make.write(tmp_path / "runs", *make.pair(), *language_models())
    out = tmp_path / "out"
    assert main(["report", str(runs), "--out", str(out)]) == 0
    assert "QT gap (perplexity)" in (out / "index.html").read_text()
    names = set(json.loads((out / "report.json").read_text())["files"])
    assert {"tables/qt_gap.md", "tables/qt_gap_ppl.md", "tables/headline_ppl.md"} <= names
    both = [n for n in names if n.startswith("figures/qt_gap_") and n.endswith(".svg")]
    assert len(both) == 2
    with open(out / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {bool(r["val_acc1"]) != bool(r["val_ppl"]) for r in rows} == {True}
    only = make.write(tmp_path / "accuracy", *make.pair())
    assert main(["report", str(only), "--out", str(tmp_path / "one")]) == 0
    assert "perplexity" not in (tmp_path / "one" / "index.html").read_text().lower()
    capsys.readouterr()
