"""Messages of a verb: the run folder, the best epoch, the next command.

Those of Lightning that do not concern the user are silenced.
"""

import logging
import shlex
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from tq_lightning.errors import UserError, program_name
from tq_lightning.records import NAME, metric_of, read_record
from tq_lightning.training.ckpt_path import newest_checkpoint
from tq_lightning.training.run_folder import CONFIG, LAST


class StartLine(Callback):
    """Print a line when a verb has read its data and loaded its model.

    A run that fails earlier has no folder that the line could name.
    """

    def __init__(self, line: str) -> None:
        self.line = line

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Print the line of a fit."""
        if trainer.is_global_zero:
            print(self.line, flush=True)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Print the line of another verb."""
        if trainer.is_global_zero and trainer.state.fn != "fit":
            print(self.line, flush=True)

    on_test_start = on_predict_start = on_validation_start


def start_line(verb: str, run_dir: Path, checkpoint: Path | None, step: int | None) -> str:
    """Return the line that names the run folder and the loaded checkpoint."""
    if checkpoint is None:
        return f"run folder: {run_dir}" if verb == "fit" else "no checkpoint: initial weights"
    action = "resume" if verb == "fit" else verb
    if verb in ("validate", "test") and not (run_dir / NAME).is_file():
        return f"{verb} {checkpoint}, step {step}"  # a checkpoint outside of a run folder
    return f"run folder: {run_dir} ({action} {checkpoint.name}, step {step})"


def end_lines(verb: str, run_dir: Path) -> list[str]:
    """Return the lines with the best epoch, its metrics and the next command; [] if none."""
    path = run_dir / NAME
    if not path.is_file():
        return []
    record = read_record(path)
    lines = []
    if record.best is not None:
        widths = "/".join(str(bits) for bits in _trained(record.config))
        found, metric = record.best.metrics, metric_of(record.best.metrics)
        keys = [f"val/{metric.key}_truncate_w{bits}" for bits in _trained(record.config)]
        scores = "/".join(f"{found[key]:.2f}" for key in keys if key in found)
        unit = f" {metric.unit}" if metric.unit else ""
        mean = found.get(metric.monitor, float("nan"))
        lines.append(
            f"best epoch {record.best.epoch}: {metric.name} {scores}{unit} at {widths} bits "
            f"(truncated, validation), mean {mean:.2f}{unit}"
        )
    command = next_command(verb, run_dir)
    return [*lines, f"next: {command}"] if command else lines


def next_command(verb: str, run_dir: Path) -> str | None:
    """Return the command that usually follows a verb; None after predict."""
    program = program_name()
    if verb == "predict":
        return None
    if verb == "test":
        out = shlex.quote(f"results/{run_dir.name}")
        return f"{program} report {shlex.quote(str(run_dir))} --out {out}"
    config = shlex.quote(str(run_dir / CONFIG))
    try:
        best = newest_checkpoint(run_dir, "best", run_dir)
    except UserError:  # none
        best = run_dir / LAST
    if not best.is_file():
        return None
    return f"{program} test --config {config} --ckpt_path {shlex.quote(str(best))}"


def how_to_resume(verb: str, run_dir: Path) -> str:
    """Return the option that resumes a fit. `last` could be the checkpoint of another run."""
    if verb != "fit":
        return ""
    last = run_dir / LAST
    if not last.is_file():
        return f"{run_dir} has no checkpoint yet"
    return f"resume with the same command and --ckpt_path {shlex.quote(str(last))}"


def _trained(config: dict) -> list[int]:
    from tq_lightning.training.lists import as_ints

    widths = config.get("model", {}).get("widths", [])
    return sorted(as_ints(widths, "model.widths"), reverse=True)


def quiet() -> None:
    """Silence messages and warnings of Lightning that do not concern the user."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        ".*args parameter is intended to run from within Python.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*LeafSpec.*",
        ".*sync_dist=True.*",
        ".*nn.functional.all_gather is deprecated.*",
        ".*overrides the configure_model callback.*",
        ".*The number of training batches.*",
        ".*when using `ckpt_path`, callbacks used to create the checkpoint.*",
        ".*The dirpath has changed from.*",
        ".*`weights_only` was not set.*",
        ".*`isinstance\\(treespec.*",
        ".*Couldn't infer the batch indices.*",
        ".*The `srun` command is available.*",
        "(?s).*Dump of a value that does not round-trip.*",  # `Text`, which becomes str
        ".*AMP with fp16 is not supported on CPU.*",  # an error of `check_precision`
        ".*You requested to overfit but enabled train dataloader shuffling.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
