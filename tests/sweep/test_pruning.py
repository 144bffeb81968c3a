"""ReportToStudy outside of a sweep."""

from test_real_fit import TINY

from tq_lightning.cli import run_fit


def test_saved_configuration_of_a_pruned_sweep_starts_a_fit(tmp_path):
    callback = "tq_lightning.sweep.pruning.ReportToStudy"
    given = ["--trainer.callbacks", callback, "--trainer.callbacks.monitor=val/acc1_truncate_mean"]
    once = [*TINY, "--trainer.max_epochs=1"]
    run_fit([*once, *given, "--run_dir", str(tmp_path / "trial")])
    metrics = run_fit(
        ["--config", str(tmp_path / "trial" / "config.yaml"), "--run_dir", str(tmp_path / "run")]
    )
    assert metrics["val/acc1_truncate_mean"] >= 0
