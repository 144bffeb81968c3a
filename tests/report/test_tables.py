"""Tables, their Markdown and LaTeX forms, the tidy table and the findings."""

import os
import sys

import pandas as pd
import pytest
from fixtures.records import compare

from tq_lightning.report import dataframe, findings, tables
from tq_lightning.report.findings import title
from tq_lightning.report.tables import accuracy
from tq_lightning.report.tables.render import Table, latex, markdown


def cells(table, **where):
    """Return the rows that match `where`, as dictionaries."""
    return [row for row in table.rows if all(row[key] == value for key, value in where.items())]


def test_markdown_and_latex_escape_special_characters():
    table = Table(
        "t",
        "A & B",
        "50 % of_it",
        [{"a|b": "x|y", "c_d": ("1.0 ± 0.2", 1.0)}, {"a|b": None, "c_d": 2.5}],
        notes=("a note",),
    )
    assert "| x\\|y | 1.0 ± 0.2 |" in markdown(table)
    assert "- a note" in markdown(table)
    made = latex(table)
    assert r"\caption{A \& B. 50 \% of\_it}" in made
    assert made.index(r"\end{table}") < made.index(
        "a note"
    )  # below the float, because notes may be longer than a page
    assert r"1.0 $\pm$ 0.2 \\" in made
    assert made.count(r"\begin") == made.count(r"\end") == 2
    long = latex(Table("t", "T", "", [{"a": "[x] 雪", "b": "é_%"}] * 41))
    assert "longtable" in long.splitlines()[0]
    assert long.count(r"\begin{longtable}") == long.count(r"\end{longtable}") == 1
    assert r"{[}x] ? & é\_\% \\" in long


def test_latex_fits_the_page():
    """Numbers are right-aligned, long words wrap, wide tables scale; a longtable is rotated."""
    row = {"a": "name", "b": "86.3 ± 0.4", "c": None, "d": "+1.20", "e": "a word, " * 40}
    made = latex(Table("t", "T", "", [row]))
    assert r"\begin{tabular}{lrlr>{\raggedright\arraybackslash}p{40em}}" in made
    assert made.index(r"\resizebox{\ifdim\width>\textwidth") < made.index(r"\begin{tabular}")
    assert r"\begin{landscape}" in latex(Table("t", "T", "", [row] * 41))
    for package in ("array", "booktabs", "graphicx"):
        assert package in made.splitlines()[0]


def test_qt_gap_table_has_the_three_rows_the_gaps_and_the_paper(make):
    found = compare(
        *make.pair(model="preresnet20_cifar", model_activations="clamp_round", test=True)
    )
    table = accuracy.qt_gap(found)
    rows = {row["row"]: row for row in cells(table)}
    assert rows["round, truncated (paper)"]["2 bits"] == 57.5
    assert rows["QT gap of floor"]["2 bits"] == ("0.0 ± 0.0", 0.0)
    assert abs(rows["QT gap of round"]["2 bits"][1] - 60) < 1e-6
    assert rows["floor, truncated"]["split"] == "test"
    assert {row["seeds"] for name, row in rows.items() if "paper" not in name} == {3}


def test_differences_have_the_three_rows_and_each_factor(make):
    found = compare(*make.pair(), *(make.run("floor", s, model_ste="identity") for s in (0, 1, 2)))
    table = accuracy.differences(found)
    (against,) = cells(
        table, factor="quantizer", a="floor, truncated", b="round, truncated", **{"width [bits]": 2}
    )
    assert against["conclusion"] == "a above b"
    assert against["how"] == "paired"
    assert len(cells(table, factor="ste", a="scaled", b="identity")) == 8


def test_tidy_table_has_one_row_per_run_source_and_width(tmp_path, make):
    found = compare(*make.pair(seeds=(0, 1), test=True))
    written = dataframe.write(found.arms, tmp_path)
    frame = pd.read_csv(tmp_path / "runs.csv")
    assert len(frame) == 4 * 2 * 8
    assert frame.groupby(["run", "source", "width"]).size().max() == 1
    picked = frame.query("model_quantizer == 'round' and width == 2 and seed == 0").set_index(
        "source"
    )
    assert abs(picked.val_acc1["quantize"] - picked.val_acc1["truncate"] - 60) < 1e-6
    assert picked.val_acc1["truncate"] - picked.test_acc1["truncate"] == 1
    if "runs.parquet" in written:
        pd.testing.assert_frame_equal(
            pd.read_parquet(tmp_path / "runs.parquet"), frame, check_dtype=False
        )


@pytest.mark.skipif(sys.platform != "linux", reason="file names are UTF-8 on this system")
def test_folder_whose_name_is_not_utf8_gets_every_table(tmp_path, make):
    folder = tmp_path / os.fsdecode(b"o\xff")
    folder.mkdir()
    written = dataframe.write(compare(*make.pair()).arms, folder)
    assert sorted(written) == sorted(path.name for path in folder.iterdir())


def finding(key, *records):
    """Return the finding on a key, or on the QT gap."""
    found = compare(*records)
    return findings.qt_gap(found) if key == "qt_gap" else findings.by_factor(found, f"model.{key}")


def test_ste_finding_follows_the_intervals(make):
    def arms(offset, seeds=(0, 1, 2)):
        return [
            make.run(
                "floor", seed, model_ste=ste, noise=0.01, offset=offset if ste == "scaled" else 0.0
            )
            for ste in ("identity", "scaled")
            for seed in seeds
        ]

    def answer(*records):
        return finding("ste", *records).answer

    assert answer(*arms(3.0)).startswith("It helps in 4 of 4 comparisons")
    below = "It does not help: accuracy is below the reference in 4 of 4"
    assert answer(*arms(-3.0)).startswith(below)
    none = (
        "No conclusion (no interval) with the scaled STE (reference: identity) and floor weights."
    )
    assert answer(*arms(3.0, seeds=(0,))) == none
    assert finding("ste", *make.pair()) is None


def test_non_uniform_codes_are_compared_with_a_learned_range(make):
    def arms(offset):
        offsets = {"learned": 0.0, "gaussian": offset}
        return [
            make.run("floor", seed, model_normalizer=name, noise=0.01, offset=offsets[name])
            for name in offsets
            for seed in (0, 1, 2)
        ]

    found = finding("normalizer", *arms(2.0))
    assert "open question 3" in found.question
    assert found.answer.startswith("Accuracy is above the reference in 4 of 4 comparisons")
    assert "the gaussian normalizer (reference: learned)" in found.answer
    below = finding("normalizer", *arms(-2.0)).answer
    assert below.startswith("Accuracy is below the reference in 4 of 4")


def test_collapsed_seed_is_named_and_excluded_from_findings(make):
    """Its mean stays in the tables, but not in findings, titles and the list of answers."""
    learned = [make.run("floor", s, model_ste=e) for e in ("identity", "scaled") for s in (0, 1, 2)]
    failed = make.run("floor", 2, model_ste="scaled")
    failed["widths"] = {w: {"quantize": 11.0, "truncate": 11.0} for w in failed["widths"]}
    failed["id"] = learned[-1]["id"]
    found = finding("ste", *learned[:-1], failed)
    assert found.answer.startswith("No conclusion (no interval) with the scaled STE")
    assert "4 comparisons with a collapsed seed (resnet20_cifar · cifar10) are not counted" in (
        found.answer
    )
    assert all("a seed collapsed" in line for line in found.lines)
    (group,) = compare(*learned[:-1], failed).by_factor["model.ste"]
    assert group.flags == ("Collapsed: scaled seed 2 stayed near chance (11.0 % on average).",)
    (table,) = [t for t in tables.build(compare(*learned[:-1], failed)) if t.name == "differences"]
    assert all("Collapsed: scaled seed 2" in row["flags"] for row in table.rows)
    (whole,) = compare(*learned).by_factor["model.ste"]
    assert whole.flags == ()


def test_arm_without_any_learning_has_no_collapsed_seed(make):
    records = [make.run("floor", s, noise=0.0, offset=-74.0) for s in (0, 1, 2)]
    (group,) = compare(*records).by_quantizer
    assert group.flags == ()


def test_activation_finding_has_one_sentence_per_quantizer(make):
    records = [
        make.run(
            q,
            s,
            model_activations=kind,
            offset=-20.0 if q == "round" and "trunc" in kind else 0.0,
            noise=0.05,
        )
        for q in ("floor", "round")
        for kind in ("clamp_round", "clamp_round_truncate")
        for s in (0, 1, 2)
    ]
    found = finding("activations_source", *records)
    kept, lost = found.answer.split(" They ")
    with_floor = "of 4 comparisons with clamp_round activations and floor weights"
    assert kept.startswith(f"No loss is shown in any {with_floor}; effects of up to")
    with_round = "4 of 4 comparisons with clamp_round activations and round weights"
    assert lost.startswith(f"lose accuracy in {with_round}, by up to 20")
    assert "Of 8 such intervals, about 0.4 are expected to exclude 0 by chance" in found.answer
    alone = finding("activations_source", *(r for r in records if r["seed"] == 0))
    assert alone.answer.startswith("No conclusion (no interval) with")
    assert finding("activations_source", *make.pair()) is None


def test_qt_gap_finding_states_the_largest_loss(make):
    found = finding("qt_gap", *make.pair())
    assert found.answer == "At trained widths, floor loses nothing; round loses up to 60.0 points."
    assert any("round: truncation costs most at 2 bits" in line for line in found.lines)


def test_cost_of_truncated_activations_is_not_attributed_to_weights(make):
    both = make.pair((0,), model_activations="clamp_round_truncate")
    both[1]["widths"]["2"]["truncate"] -= 7.0
    assert finding("qt_gap", *make.pair(), *both).answer == (
        "At trained widths, floor loses nothing; round loses up to 60.0 points; "
        "floor with activations truncated too loses up to 7.0 points; "
        "round with activations truncated too loses up to 60.0 points."
    )


def test_lines_of_a_finding_name_the_compared_arms(make):
    records = [
        make.run("floor", s, model_level=level)
        for level in ("endpoint", "left", "centre")
        for s in (0, 1)
    ]
    lines = finding("level", *records).lines
    assert len(set(lines)) == len(lines) == 8
    assert all(
        line.endswith("(validation split, best epoch; 15 epochs / 4500 steps).") for line in lines
    )
    assert all(("left" in line) != ("centre" in line) and "endpoint" in line for line in lines)


def test_inference_energy_has_one_row_per_accelerator_and_width(make):
    kinds = {"compute_pj": 1e6, "weights_pj": 8e6, "activations_pj": 3e6}
    energy = {"assumptions": ["one image"], "constants_pj": {}, "by_width": {"8": kinds}}
    record = {**make.inspect(), "inference": {"TPU-like": energy}}
    every = tables.build(compare(record))
    (table,) = [table for table in every if table.name == "inference"]
    (row,) = table.rows
    assert row["accelerator"] == "TPU-like" and row["width [bits]"] == 8
    assert row["total [µJ]"] == ("12", 12e6) and row["traffic of weights [µJ]"] == ("8", 8e6)
    assert "not measured" in table.caption and table.notes == ("one image",)
    assert not [t for t in tables.build(compare(make.inspect())) if t.name == "inference"]


def test_large_energies_are_shown_without_an_exponent(make):
    energy = {
        "assumptions": [],
        "constants_pj": {},
        "by_width": {"8": {"compute_pj": 1.5487e10}, "4": {"compute_pj": 9.5487e9}},
    }
    record = {**make.inspect(), "inference": {"TPU-like": energy}}
    (table,) = [t for t in tables.build(compare(record)) if t.name == "inference"]
    assert [row["total [µJ]"] for row in table.rows] == [("15490", 1.5487e10), ("9549", 9.5487e9)]


def test_title_names_the_width_that_truncation_changes_most(make):
    """Truncation may also raise the accuracy. The widest width is not named, as nothing changes."""
    records = make.pair()
    for record in records:
        metrics = record["best"]["metrics"]
        for w in range(1, 9):
            better = metrics[f"val/acc1_quantize_w{w}"] + 1.5 * (w == 2)
            if record["config"]["model"]["quantizer"] == "round":
                metrics[f"val/acc1_truncate_w{w}"] = record["widths"][str(w)]["truncate"] = better
    assert title(compare(*records)).startswith("Truncated to 2 bits, round goes from ")
    assert title(compare(*make.pair())).startswith("Truncated to 2 bits, round goes from ")
