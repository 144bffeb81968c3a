"""`export --calibrate`: observe activation ranges on images and store them in a packed file."""

import sys
from pathlib import Path
from typing import Any

from tq_lightning.errors import UserError

IMAGES, BATCH_SIZE = 256, 64
RUN = "run"  # value of --calibrate for the training data of a checkpoint's run


def calibrate(
    path: Path, out: Path, source: Path, data: str, observer: str, factory: str | None = None
) -> dict[str, int]:
    """Calibrate a packed file.

    Args:
        path: packed file.
        out: target file, written atomically.
        source: file that the user passed; for "run", a checkpoint in the folder of its run.
        data: folder of images, name of a data set, or "run".
        observer: a key of `activation_ranges.OBSERVERS`.
        factory: factory of the network, if the file names one.

    Returns:
        Bytes per section, with "header" and "total".

    Raises:
        UserError: the data does not exist, the run has no config.yaml, or an activation is NaN or
            infinite.
    """
    from tq_lightning.export.packed.edit import add_ranges
    from tq_lightning.export.packed.reader import load_packed
    from tq_lightning.quant.activation_ranges import calibrate_activations

    model = load_packed(path, model=factory)
    if data != RUN and model.tq_file.get("inputs"):  # type: ignore[operator,union-attr]
        raise UserError(f"--calibrate {data} is for networks of images; pass --calibrate run")
    batches = _run_batches(source) if data == RUN else _batches(model, data)
    try:
        ranges = calibrate_activations(model, batches, observer)
    except ValueError as error:
        raise UserError(f"--calibrate {data}: {error}") from error
    return add_ranges(path, out, ranges)


def _batches(model: Any, data: str) -> list[Any]:
    """Read up to `IMAGES` images, with the preprocessing of the packed file.

    Args:
        model: packed model.
        data: folder of images, or name of a data set that `fit` can read from ./data.

    Returns:
        Batches of images (batch, channels, height, width).

    Raises:
        UserError: `data` is neither a folder nor a data set, or has no readable images; the packed
            file has no preprocessing.
    """
    from tq_lightning.data.datasets import DATASETS

    if data in DATASETS and not Path(data).exists():
        return _dataset_batches(model, data)
    if not Path(data).exists():
        raise UserError(
            f"--calibrate {data}: no such folder or data set; pass a folder of images, run, or one "
            f"of {', '.join(DATASETS)}"
        )
    import torch

    from tq_lightning.cli.classify import find_images, read_preprocessed
    from tq_lightning.data.images import SUFFIXES, escape_undecodable

    if Path(data).is_file() and Path(data).suffix.lower() not in SUFFIXES:
        raise UserError(
            f"--calibrate {data} is a file and not a folder of images; unpack it first, or pass a "
            f"data set ({', '.join(DATASETS)})"
        )
    files = find_images(Path(data))
    read = list(read_preprocessed(model, _evenly(files)))
    pixels = [value for _, value in read if not isinstance(value, str)]
    if not pixels:
        raise UserError(f"none of the {len(files)} images under {data} could be read")
    unread = [f"{path} {value}" for path, value in read if isinstance(value, str)]
    if unread:
        example = escape_undecodable(unread[0])
        print(f"skipped {len(unread)} of {len(read)} images, e.g. {example}", file=sys.stderr)
    return list(torch.stack(pixels).split(BATCH_SIZE))


def _evenly(files: list[Path]) -> list[Path]:
    """Return up to `IMAGES` files at equal distances, so that every class folder is sampled."""
    count = min(IMAGES, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def _dataset_batches(model: Any, name: str) -> list[Any]:
    from tq_lightning.data.datamodule import TQDataModule

    options = model.tq_file["preprocessing"] or {}
    known = {key: options[key] for key in ("mean", "std", "interpolation") if key in options}
    if "input_size" in options:
        known["image_size"] = options["input_size"][-1]
    data = TQDataModule(name, workers=0, **known)
    return [images for images, _ in data.calibration_batches(IMAGES // BATCH_SIZE, BATCH_SIZE)]


def _run_batches(checkpoint: Path) -> list[Any]:
    """Return training batches of the run that a checkpoint belongs to, deterministically."""
    from tq_lightning.callbacks.truncation_eval import training_batches
    from tq_lightning.data.datamodule import TQDataModule
    from tq_lightning.data.dataset_module import DatasetModule
    from tq_lightning.quant.batches import split_batch
    from tq_lightning.training.run_folder import run_of
    from tq_lightning.training.yaml_file import read_yaml

    folder = run_of(checkpoint)
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
    data = TQDataModule(**section.get("init_args", section))
    if isinstance(data, TQDataModule | DatasetModule):
        data.workers = 0
    if isinstance(data, TQDataModule):
        batches = data.calibration_batches(IMAGES // BATCH_SIZE, BATCH_SIZE)
    elif isinstance(data, DatasetModule):  # has its own batch size
        batches = data.calibration_batches(max(1, IMAGES // data.batch_size))
    else:
        data.prepare_data()
        batches = training_batches(data, IMAGES // BATCH_SIZE)
    return [split_batch(batch)[0] for batch in batches]
