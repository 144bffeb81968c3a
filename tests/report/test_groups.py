"""Arms, settings, labels and flags."""

import pytest
from fixtures.records import compare, runs

from tq_lightning.report.caveats import flags_of, provenance_notes
from tq_lightning.report.comparisons import make_groups
from tq_lightning.report.groups import arm_config, group
from tq_lightning.report.labels import format_range, wrapped


def test_seed_paths_and_loggers_do_not_split_arms_but_the_learning_rate_does(make):
    base = make.run(seed=0)
    alike = make.run(
        seed=1, data_root="elsewhere", trainer_logger={"save_dir": "x"}, trainer_accelerator="cuda"
    )
    assert len(group(runs(base, alike), [])) == 1
    assert len(group(runs(base, make.run(seed=1, model_lr=0.1)), [])) == 2


def test_inferred_and_explicit_number_of_classes_are_one_arm(make):
    assert len(group(runs(make.run(seed=0), make.run(seed=1, model_num_classes=10)), [])) == 1
    assert len(group(runs(make.run(seed=0), make.run(seed=1, data_num_classes=5)), [])) == 2


@pytest.mark.parametrize(
    "widths",
    ["8,4,2,1", "(8,4,2,1)", "8.0,4,2,1,", "[8, 4, 2, 1]", [1, 2, 4, 8], ["8", "4", "2", "1"]],
)
def test_list_notation_does_not_split_arms(make, widths):
    (arm,) = group(runs(make.run(seed=0), make.run(seed=1, model_widths=widths)), [])
    assert arm.trained == [1, 2, 4, 8]
    assert len(group(runs(make.run(seed=0), make.run(seed=1, model_widths="8,4")), [])) == 2


def test_checkpoint_names_that_differ_in_numbers_are_one_arm(make):
    made = [
        make.run(seed=s, model_checkpoint_path=f"/a/float_s{s}/checkpoints/best-epoch={s}.ckpt")
        for s in (0, 1)
    ]
    assert len(group(runs(*made), [])) == 1
    assert (
        len(group(runs(*made, make.run(seed=2, model_checkpoint_path="other/last.ckpt")), [])) == 2
    )


@pytest.mark.parametrize(
    ("key", "one", "two"),
    [
        ("data_name", "hfds/uoft-cs/cifar10", "hfds/uoft-cs/cifar100"),
        ("model_name", "hf-hub:timm/resnet18.a1_in1k", "hf-hub:timm/resnet50.a1_in1k"),
        ("data_data_args", {"file": "a/set1.csv"}, {"file": "a/set2.csv"}),
        ("data_data_args", {"version": 1}, {"version": 2}),
        ("model_model_args", {"group": 1}, {"group": 2}),
        ("data_seed", 5, 6),
    ],
)
def test_names_and_arguments_that_differ_in_a_number_are_two_arms(make, key, one, two):
    made = [make.run(seed=s, **{key: value}) for s, value in enumerate((one, two))]
    assert len(group(runs(*made), [])) == 2


@pytest.mark.parametrize(("name", "arms"), [("imagefolder", 2), ("wds", 2), ("cifar10", 1)])
def test_folder_identifies_the_data_of_a_user(make, name, arms):
    made = [make.run(seed=s, data_name=name, data_root=r) for s, r in enumerate(("/cars", "/d"))]
    assert len(group(runs(*made), [])) == arms


def test_seed_of_the_data_that_is_the_seed_of_the_run_does_not_split_arms(make):
    assert len(group(runs(*(make.run(seed=s, data_seed=s) for s in (0, 1))), [])) == 1


def test_callbacks_split_arms_unless_they_only_watch(make):
    def callback(name, **arguments):
        path = f"lightning.pytorch.callbacks.{name}"
        return {"class_path": path} | ({"init_args": arguments} if arguments else {})

    plain = make.run(seed=0)
    watched = make.run(seed=1)
    watched["config"]["trainer"]["callbacks"] = [
        callback("ModelCheckpoint", monitor="val/loss"),
        {"class_path": "tq_lightning.sweep.pruning.ReportToStudy"},
        callback("LearningRateMonitor"),
    ]
    assert len(group(runs(plain, watched), [])) == 1
    swa = make.run(seed=1)
    swa["config"]["trainer"]["callbacks"] = [
        callback("StochasticWeightAveraging", swa_lrs=0.05),
        callback("RichProgressBar"),
    ]
    arms = group(runs(plain, swa), [])
    assert [arm["trainer.callbacks"] for arm in arms] == [
        None,
        ["StochasticWeightAveraging{'swa_lrs': 0.05}"],
    ]


def test_weights_of_widths_are_compared_in_the_order_of_the_widths(make):
    def arm_count(widths, weights):
        one = make.run(seed=0, model_widths="8,4,2,1", model_width_weights="1,1,.7,.3")
        two = make.run(seed=1, model_widths=widths, model_width_weights=weights)
        return len(group(runs(one, two), []))

    assert arm_count([1, 2, 4, 8], [".3", ".7", "1", "1"]) == 1
    assert arm_count([1, 2, 4, 8], ["1", "1", ".7", ".3"]) == 2


@pytest.mark.parametrize(("quantizer", "ste"), [("floor", "scaled"), ("round", "identity")])
def test_auto_ste_is_the_pairing_of_the_paper(make, quantizer, ste):
    (auto,), (named,) = runs(make.run(quantizer)), runs(make.run(quantizer, model_ste=ste))
    assert arm_config(auto) == arm_config(named)
    (other,) = runs(make.run(quantizer, model_ste="clipped"))
    assert arm_config(auto) != arm_config(other)


def test_latest_run_of_a_seed_is_used(make):
    old, new = make.run(seed=0), make.run(seed=0, started="2026-01-01T00:00:00")
    left_out = []
    (arm,) = group(runs(new, old), left_out)
    assert [run.id for run in arm.runs] == [new["id"]]
    assert "superseded by the later" in left_out[0][1]


def test_group_has_both_quantizers_and_no_flag_if_all_else_is_equal(make):
    (setting,) = compare(*make.pair()).by_quantizer
    assert [value for value, _ in setting.arms] == ["floor", "round"]
    assert [name for name, _, _ in setting.rows] == [
        "round, quantized",
        "round, truncated",
        "floor, truncated",
    ]
    assert setting.flags == ()
    assert setting.label == "resnet20_cifar · cifar10"


def test_unequal_budgets_and_seeds_are_flagged(make):
    records = [*(make.run("round", s) for s in (0, 1)), make.run("floor", 0, epochs=30)]
    (setting,) = compare(*records).by_quantizer
    words = " ".join(setting.flags)
    assert "Unequal budgets: floor 30 epochs / 9000 steps; round 15 epochs / 4500 steps." in words
    assert "Unequal seeds: floor 0; round 0,1." in words
    assert "One seed (floor): no interval." in words
    assert flags_of([setting]) == [f"{setting.label}: {flag}" for flag in setting.flags]


def test_two_complete_budgets_are_two_groups_without_flags(make):
    found = compare(*make.pair(epochs=15), *make.pair(epochs=30)).by_quantizer
    assert [s.label for s in found] == [
        "resnet20_cifar · cifar10 · max_epochs=15",
        "resnet20_cifar · cifar10 · max_epochs=30",
    ]
    assert not any(s.flags for s in found)


def test_early_stopping_within_an_arm_is_flagged(make):
    records = make.pair(seeds=(0, 1))
    records[0]["epochs"] = 11
    (setting,) = compare(*records).by_quantizer
    assert "round 11 epochs / 4500 steps or 15 epochs / 4500 steps" in setting.flags[0]


def test_ignored_key_joins_arms_with_different_tuning(make):
    records = [make.run("round", model_lr=0.1), make.run("floor", model_lr=0.2)]
    assert [len(setting.arms) for setting in compare(*records).by_quantizer] == [
        1
    ]  # round alone has no comparison
    (setting,) = compare(*records, ignore=("model.lr",)).by_quantizer
    assert len(setting.arms) == 2


def test_factor_groups_compare_only_one_key(make):
    records = [make.run("floor", 0, model_ste=ste) for ste in ("identity", "scaled")]
    found = compare(*records)
    assert list(found.by_factor) == ["model.ste"]
    assert not compare(records[0], make.run("floor", 0, model_ste="scaled", model_lr=0.5)).by_factor


def test_reference_is_the_first_preferred_value_in_the_group(make):
    def reference(*values):
        records = [make.run("floor", 0, model_normalizer=value) for value in values]
        (group,) = compare(*records).by_factor["model.normalizer"]
        return group.reference[0]

    assert reference("gaussian", "learned", "tanh") == "tanh"
    assert reference("gaussian", "learned") == "learned"
    assert reference("gaussian", "float_e2") == "gaussian"  # neither: the first


def test_kind_and_source_of_activations_are_two_factors(make):
    records = [
        make.run(model_activations=kind)
        for kind in ("clamp_round", "clamp_round_truncate", "pact_round")
    ]
    found = compare(*records)
    assert list(found.by_factor) == ["model.activations", "model.activations_source"]
    (setting,) = found.by_factor["model.activations_source"]
    assert [value for value, _ in setting.arms] == ["quantize", "truncate"]


def test_float_activations_are_the_reference_of_quantized_ones(make):
    kinds = (None, "clamp_round", "clamp_round_truncate")
    found = compare(*(make.run(model_activations=kind) for kind in kinds))
    (setting,) = found.by_factor["model.activations"]
    assert [value for value, _ in setting.arms] == ["none", "clamp_round"]
    assert setting.reference[0] == "none"


def test_only_the_setting_of_the_paper_is_recognized(make):
    papers = {"model": "preresnet20_cifar", "model_activations": "clamp_round"}
    (setting,) = compare(*make.pair(**papers)).by_quantizer
    assert setting.is_papers
    misses = [
        {"model": "resnet20_cifar"}, {"model_activations": None},
        {"model_activations": "clamp_round_truncate"},
        {"data_name": "cifar100"}, {"model_widths": [8, 4]}, {"model_expansion": 5},
    ]  # fmt: skip
    for miss in misses:
        (setting,) = compare(*make.pair(**{**papers, **miss})).by_quantizer
        assert not setting.is_papers, miss


def test_rows_depend_on_nested_codes_not_on_the_quantizer_name(make):
    """A quantizer whose record states that its codes nest has one row, like floor."""
    toy = make.run("toy", ste="toy_ste", nested=True)
    (group,) = compare(make.run("round"), toy).by_quantizer
    assert [name for name, _, _ in group.rows] == [
        "round, quantized",
        "round, truncated",
        "toy, truncated",
    ]
    assert dict(group.arms)["toy"]["model.ste"] == "toy_ste"
    (group,) = compare(make.run("round"), toy | {"nested": False}).by_quantizer
    assert len(group.rows) == 4


def test_runs_of_different_calibration_are_two_arms(make):
    records = [make.run(seed=0), make.run(seed=1), make.run(seed=2, calibration="weighted")]
    assert [len(arm.runs) for arm in compare(*records).arms] == [2, 1]


def test_tests_on_other_data_are_ignored(make):
    """Recorded tests on other data or on a part of the data are not in any table."""
    record = make.run(test=True)
    record["tests"] = [record.pop("test") | {"data": {"name": "cifar100"}}]
    (arm,) = compare(record).arms
    assert not arm.runs[0].has_test


def test_mixed_commits_and_versions_are_reported(make):
    (setting,) = compare(
        make.run("round"),
        make.run("floor", commit="ffff", versions={"tq_lightning": "0.2"}, dirty=True),
    ).by_quantizer
    words = " ".join(provenance_notes([arm for _, arm in setting.arms]))
    assert "different commits" in words
    assert "different versions of tq_lightning: 0.1.0, 0.2" in words
    assert "uncommitted" in words
    (same,) = compare(*make.pair()).by_quantizer
    assert provenance_notes([arm for _, arm in same.arms]) == []


def test_settings_that_changed_at_a_resume_are_named_and_form_an_arm(make):
    change = {"epoch": 5, "step": 1500, "before": 64, "after": 128}
    keys = ("data.batch_size", "data.workers", "trainer.max_epochs", "versions.torch", "data.root")
    changes = [{"key": key, **change} for key in keys]
    loaded = compare(make.run("floor"), make.run("floor", changes=changes, id="other"))
    assert len(loaded.arms) == 2  # none of them supersedes the other
    (changed,) = [arm for arm in loaded.arms if arm["data.batch_size"] != 128]
    assert changed["data.batch_size"] == "64, then 128 (epoch 5)"
    assert provenance_notes([changed]) == [
        "Changed when runs were resumed: data.batch_size 64, then 128 (epoch 5); "
        "trainer.max_epochs 64, then 128 (epoch 5); versions.torch 64, then 128 (epoch 5)."
    ]


def test_an_unknown_calibration_is_reported_where_untrained_widths_are_shown(make):
    def notes(**how):
        (group,) = compare(*(make.run(q, **how) for q in ("round", "floor"))).by_quantizer
        return " ".join(provenance_notes([arm for _, arm in group.arms]))

    assert "do not say how the norms of untrained widths were calibrated" in notes(calibration=None)
    assert "calibrated" not in notes(calibration="augmented")
    all_widths = [8, 7, 6, 5, 4, 3, 2, 1]
    assert "calibrated" not in notes(calibration=None, model_widths=all_widths)


def test_only_the_kind_of_a_tested_checkpoint_is_compared(make):
    """The path and the epoch differ between runs; a last checkpoint beside best ones is named."""
    records = make.pair(test=True)
    for i, record in enumerate(records):
        record["test"]["checkpoint"] = f"runs/{i}/checkpoints/best-{i}.ckpt"
    (group,) = compare(*records).by_quantizer
    assert provenance_notes([arm for _, arm in group.arms]) == []
    records[0]["test"]["checkpoint"] = "runs\\0\\checkpoints\\last.ckpt"
    (group,) = compare(*records).by_quantizer
    assert "kinds of tested checkpoints: best, last" in " ".join(
        provenance_notes([a for _, a in group.arms])
    )


def test_a_missing_key_is_its_default(make):
    """Records written before a key was added belong to the arm of its default."""
    old, new = make.run(seed=0), make.run(seed=1, model_shared_norms=[])
    assert len(compare(old, new).arms) == 1
    assert len(compare(old, make.run(seed=1, model_shared_norms=["*skip_bn"])).arms) == 2


def test_labels_name_floor_weights_and_wrap_between_parts(make):
    kinds = ("clamp_round", "clamp_round_truncate")
    found = compare(*(make.run(q, model_activations=k) for q in ("floor", "round") for k in kinds))
    labels = [s.label for s in found.by_factor["model.activations_source"]]
    assert labels == [
        "resnet20_cifar · cifar10 · floor weights",
        "resnet20_cifar · cifar10 · round weights",
    ]
    assert [s.label for s in found.by_quantizer][
        1
    ] == "resnet20_cifar · cifar10 · activations truncated too"
    assert wrapped(labels[0], 26) == "resnet20_cifar · cifar10\nfloor weights"


def test_labels_are_unique_even_for_many_settings(make):
    records = [
        make.run(q, 0, model_lr=lr, model_level=level)
        for q in ("round", "floor")
        for lr in (0.1, 0.2)
        for level in ("left", "endpoint")
    ]
    found = make_groups(compare(*records).arms, "model.quantizer", ["model.ste"])
    assert len({s.label for s in found}) == len({s.slug for s in found}) == 4


def test_range_of_equally_printed_values_is_one_number():
    assert format_range([41.91, 41.94]) == "41.9"
    assert format_range([41.9, 42.0]) == "41.9 to 42.0"
    assert format_range([2.2, 1.8], 0) == "2"
