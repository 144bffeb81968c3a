"""Images to observe activations on: a folder, or the training split of a data set."""

from pathlib import Path
from typing import Any

from tq_lightning.errors import UserError

IMAGES, BATCH_SIZE = 256, 64


def calibration_batches(model: Any, data: str) -> list[Any]:
    """Read up to `IMAGES` images, preprocessed as the packed file says.

    Args:
        model: packed model.
        data: folder of images, or name of a data set that `fit` can read from ./data.

    Returns:
        Batches of images (batch, channels, height, width).

    Raises:
        UserError: neither a folder nor a data set; no readable images; the packed file does not
            say how images are preprocessed.
    """
    from tq_lightning.data.datasets import DATASETS

    if data in DATASETS and not Path(data).exists():
        return _dataset_batches(model, data)
    if not Path(data).exists():
        raise UserError(
            f"--calibrate {data} is neither a folder of images nor a data set "
            f"({', '.join(DATASETS)})"
        )
    import torch

    from tq_lightning.cli.classify import find_images, read_preprocessed

    files = find_images(Path(data))
    step = max(1, len(files) // IMAGES)  # all classes, where a folder each holds them
    read = read_preprocessed(model, files[::step][:IMAGES])
    pixels = [value for _, value in read if not isinstance(value, str)]
    if not pixels:
        raise UserError(f"none of the {len(files)} images under {data} could be read")
    return list(torch.stack(pixels).split(BATCH_SIZE))


def _dataset_batches(model: Any, name: str) -> list[Any]:
    from tq_lightning.data.datamodule import TQDataModule

    options = model.tq_file["preprocessing"] or {}
    known = {key: options[key] for key in ("mean", "std", "interpolation") if key in options}
    if "input_size" in options:
        known["image_size"] = options["input_size"][-1]
    data = TQDataModule(name, workers=0, **known)
    return [images for images, _ in data.calibration_batches(IMAGES // BATCH_SIZE, BATCH_SIZE)]
