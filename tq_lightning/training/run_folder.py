"""The folder of a run, for --run_dir and --ckpt_path auto."""

from pathlib import Path
from typing import Any

from tq_lightning.errors import UserError
from tq_lightning.records import NAME, read_record
from tq_lightning.training.yaml_file import read_yaml

LAST = "checkpoints/last.ckpt"
CONFIG = "config.yaml"
_WRITTEN = (CONFIG, "metrics.csv")  # files that a fit replaces or extends
# data keys that may change when a run is resumed: location and reading of the data
_PLACES = {"root", "download", "workers"}


def auto_folder(run_dir: str | None, root: Path) -> Path:
    """Return the folder of `--ckpt_path auto`: `run_dir`, or one named after the SLURM job.

    Raises:
        UserError: `run_dir` is None outside of a SLURM job.
    """
    if run_dir is not None:
        return Path(run_dir)
    from tq_lightning.training.cluster import slurm_job  # imports Lightning

    job, _ = slurm_job()
    if job is None:
        raise UserError(
            "ckpt_path=auto needs the run folder outside of a SLURM job; pass --run_dir FOLDER"
        )
    return root / f"slurm-{job}"


def run_of(path: Path) -> Path | None:
    """Return the run folder of a checkpoint: RUN of RUN/checkpoints/FILE.

    Return None if the file is elsewhere, or if RUN has neither a record nor a configuration.
    """
    folder = path.absolute().parent
    run = path.parent.parent
    if folder.name != "checkpoints":
        return None
    return run if (run / NAME).is_file() or (run / CONFIG).is_file() else None


def check_unused(folder: Path, reason: str = "") -> None:
    """Raise UserError, with a reason, if `folder` already has a run."""
    if (folder / NAME).exists() or (folder / "checkpoints").exists():
        raise UserError(
            f"run_dir={folder} already has a run{reason and f', and {reason}'}; pass --ckpt_path "
            "auto to resume it, or another folder"
        )


def check_no_other_files(folder: Path) -> None:
    """Raise UserError if `folder` has no run, but files that a fit would replace."""
    if (folder / NAME).exists() or (folder / "checkpoints").exists():
        return
    for name in _WRITTEN:
        if (folder / name).exists():
            raise UserError(
                f"run_dir={folder} has no run, but a {name} that a fit would replace; pass another "
                "folder"
            )


def check_files(folder: Path, checkpoint: Path, logger: Any) -> None:
    """Check that a run to resume has its record and its metrics.csv: new ones would lack epochs.

    A run writes its record before its first checkpoint, and the first row of metrics.csv before the
    record has training metrics.

    Args:
        folder: the run folder.
        checkpoint: the checkpoint to resume, for the message.
        logger: trainer.logger of the fit; only the default one writes metrics.csv.

    Raises:
        UserError: a file is missing.
    """
    path = folder / NAME
    if not path.exists():
        raise UserError(
            f"{path} is missing; restore it, or pass --ckpt_path {checkpoint} and --run_dir with a "
            "new folder to continue as another run"
        )
    record, metrics = read_record(path), folder / "metrics.csv"
    loggers = [logger, (record.config.get("trainer") or {}).get("logger")]
    loggers += [change.before for change in record.changes or [] if change.key == "trainer.logger"]
    has_rows = any(key.startswith("train/") for key in record.curves or {})
    if has_rows and all(one in (None, True) for one in loggers) and not metrics.exists():
        raise UserError(
            f"{metrics} is missing; restore it, or create an empty file to resume without its rows"
        )


def is_same_folder(one: Path | None, two: Path | None) -> bool:
    """Return True for two forms of the same path."""
    return None not in (one, two) and one.resolve() == two.resolve()  # type: ignore[union-attr]


def check_same_run(folder: Path, config: dict[str, Any]) -> None:
    """Check that a configuration matches the run in `folder`, so that it can be resumed.

    Two fits in one SLURM job use the same folder without --run_dir.

    Args:
        folder: the run folder; an empty one matches.
        config: plain types, before a checkpoint has changed its `model` section.

    Raises:
        UserError: the model, the data or the seed differ.
    """
    path = folder / CONFIG
    if not path.is_file():
        return
    saved = _read_config(path)
    for section in ("seed_everything", "model", "data"):
        ours, theirs = _flat(section, config.get(section)), _flat(section, saved.get(section))
        for key in ours:
            if ours[key] is None and section == "model":
                continue  # filled in by the run, such as the number of classes
            if str(ours[key]) != str(theirs.get(key, ours[key])):
                raise UserError(
                    f"{folder} is a run with {key}={theirs[key]}, not {ours[key]}; "
                    f"pass --run_dir for another run, or --ckpt_path {folder / LAST} "
                    "to continue this one with other settings"
                )


def _read_config(path: Path) -> dict[str, Any]:
    """Read the saved configuration of a run. Raises UserError for a damaged file."""
    saved = read_yaml(path)
    if not isinstance(saved, dict):
        raise UserError(
            f"{path} is damaged: it has no settings; restore it, or pass another --run_dir"
        )
    return saved


def _flat(section: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {section: value}
    return {f"{section}.{key}": v for key, v in value.items() if key not in _PLACES}


def has_finished(folder: Path) -> bool:
    """Return True if the record of the run in `folder` has the status "finished"."""
    record = folder / NAME
    return record.is_file() and read_record(record).status == "finished"


def is_finished(folder: Path, config: dict[str, Any]) -> bool:
    """Return True if the run in `folder` finished with the same end as in `config`."""
    if not has_finished(folder):
        return False
    path = folder / CONFIG
    saved = (_read_config(path).get("trainer") or {}) if path.is_file() else {}
    given = config["trainer"]
    return all(given.get(key) == saved.get(key) for key in ("max_epochs", "max_steps", "max_time"))
