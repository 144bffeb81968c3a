"""`export --calibrate` for packed files: observe activation ranges and store them in the file."""

from pathlib import Path
from typing import Any

from tq_lightning.cli.calibration import BATCH_SIZE, IMAGES, calibration_batches
from tq_lightning.errors import UserError

RUN = "run"  # stands for the data of the run that a checkpoint belongs to


def calibrate_packed(
    path: Path, out: Path, source: Path, data: str, observer: str
) -> dict[str, int]:
    """Calibrate a packed file.

    Args:
        path: packed file.
        out: target file, written atomically.
        source: what the user named; for "run", a checkpoint in the folder of its run.
        data: folder of images, name of a data set, or "run".
        observer: a key of `activation_ranges.OBSERVERS`.

    Returns:
        Bytes per section, with "header" and "total".

    Raises:
        UserError: no such data, or a run without its configuration.
    """
    from tq_lightning.export.packed.edit import add_ranges
    from tq_lightning.export.packed.reader import load_packed
    from tq_lightning.quant.activation_ranges import calibrate_activations

    model = load_packed(path)
    batches = _run_batches(source) if data == RUN else calibration_batches(model, data)
    ranges = calibrate_activations(model, batches, observer)
    return add_ranges(path, out, ranges)


def _run_batches(checkpoint: Path) -> list[Any]:
    """Training batches of the run that a checkpoint belongs to, always the same ones."""
    from tq_lightning.data.datamodule import TQDataModule
    from tq_lightning.training.checkpoint import run_folder
    from tq_lightning.training.yaml_file import read_yaml

    folder = run_folder(checkpoint)
    config = None if folder is None else folder / "config.yaml"
    if config is None or not config.is_file():
        raise UserError(
            f"--calibrate run: {checkpoint} is not in the folder of a run with a config.yaml; "
            "pass a folder of images or a data set"
        )
    match read_yaml(config):
        case {"data": dict(section)}:
            pass
        case _:
            section = {}
    data = TQDataModule(**{**section.get("init_args", section), "workers": 0})
    return [x for x, _ in data.calibration_batches(IMAGES // BATCH_SIZE, BATCH_SIZE)]
