"""Loggers of a fit."""

import pytest

from tq_lightning.training.run_callbacks import make_loggers


@pytest.mark.parametrize("resume_step", [3, None])
def test_tensorboard_shows_no_step_of_a_resumed_fit_twice(tmp_path, resume_step):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = {"tensorboard": True, "wandb": False}
    for resumed, steps in ((None, range(6)), (resume_step, range(3, 8))):
        _, logger = make_loggers(tmp_path / "run", config, {}, resumed)
        for step in steps:
            logger.log_metrics({"train/loss": 1.0}, step)
        logger.finalize("success")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    seen = [event.step for event in events.Scalars("train/loss")]
    assert (seen == list(range(8))) == (resume_step is not None), seen
