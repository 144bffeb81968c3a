"""Images in class folders, as files or in a tar, and torchvision's CIFAR files; every way in which they can be missing or broken is one line."""

import io
import tarfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tq_lightning.errors import UserError

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}  # names under which a split is looked for
_BROKEN = (OSError, EOFError, tarfile.TarError, RuntimeError, ValueError, AssertionError)  # what readers raise on bad files


def find_split(root: Path, split: str) -> Path | None:
    """The folder or .tar of a split under `root`, or None."""
    for name in SPLITS[split]:
        for path in (root / f"{name}.tar", root / name):
            if path.exists():
                return path
    return None


def is_flat(root: Path) -> bool:
    """Whether `root` itself holds the class folders, or is a tar of them: a set without splits."""
    if root.is_file():
        return root.suffix == ".tar"
    return root.is_dir() and not any(find_split(root, s) for s in SPLITS) and any(p.is_dir() for p in root.iterdir())


def missing(root: Path, split: str) -> str:
    """One line: what was looked for where, and how to get it."""
    if not root.exists():
        return f"no data at {root.absolute()}: data.root must be a folder with {split}/ or {split}.tar, one folder of images per class inside"
    return f"no {split} split in {root.absolute()}: looked for {' and '.join(f'{n}/, {n}.tar' for n in SPLITS[split])}; pass data.root"


def open_folder(path: Path, index: dict[str, int] | None, **kwargs: Any) -> tuple[Any, Tensor]:
    """timm's dataset over a folder or tar.

    Args:
        path: class folders, or a .tar of them.
        index: class name -> number, or None for the classes found.

    Returns:
        the dataset (n -> (PIL image, class number)) and its labels (N,) int64.

    Raises:
        UserError: no images, a broken tar, a class that `index` does not know.
    """
    from timm.data import create_dataset

    tar = path.is_file()
    try:
        # a tar opened anew for each image: worker processes that inherit one open file would move each other's place in it
        options = {"cache_tarfiles": False} | kwargs if tar else kwargs
        dataset = create_dataset("", root=str(path), search_split=False, **options)
    except _BROKEN as error:
        if tar and isinstance(error, (OSError, EOFError, tarfile.TarError)):
            raise UserError(f"{path} cannot be read to its end ({error}): copy or download it again") from error
        raise UserError(f"no images in {path}: expected <class>/<name>.jpg, .jpeg or .png inside; unpack it, or pass another data.root") from error
    reader = dataset.reader
    names = reader.class_name_to_idx if tar else reader.class_to_idx
    found = [int(label) for label in reader.targets] if tar else [label for _, label in reader.samples]
    if index is None:
        return dataset, torch.tensor(found)
    unknown = sorted(set(names) - set(index))
    if unknown:
        raise UserError(
            f"{path} has {len(unknown)} class folders that are not among the {len(index)} known classes ({', '.join(unknown[:3])}, ...): "
            "is it half unpacked, or a set for data.name=imagefolder?"
        )
    back = {number: index[name] for name, number in names.items()}
    dataset.target_transform = back.__getitem__
    return dataset, torch.tensor([back[label] for label in found])


def class_index(root: Path) -> dict[str, int]:
    """Class name -> number, from the training split (or the first one there is)."""
    path = next((p for s in SPLITS if (p := find_split(root, s)) is not None), root if is_flat(root) else None)
    if path is None:
        raise UserError(missing(root, "train"))
    reader = open_folder(path, None)[0].reader
    return dict(reader.class_name_to_idx if path.is_file() else reader.class_to_idx)


def decode_all(path: Path, size: tuple[int, int]) -> tuple[list[str], Tensor, Tensor]:
    """Every image of a folder or tar, decoded once.

    Returns:
        class names in index order, labels (N,) int64, pixels (N, 3, H, W) uint8.
    """
    import numpy as np
    from PIL import Image

    dataset, labels = open_folder(path, None, load_bytes=True, **({"cache_tarfiles": True} if path.is_file() else {}))
    reader = dataset.reader
    pixels = np.empty((len(dataset), *size, 3), np.uint8)
    for n in range(len(dataset)):
        stream, _ = reader[n]
        with stream:
            content = stream.read()
        try:
            picture = Image.open(io.BytesIO(content)).convert("RGB")
        except OSError as error:
            raise UserError(f"{path}: {reader.filename(n)} is not a whole image ({error}); copy or unpack the set again") from error
        if picture.size != size[::-1]:
            raise UserError(f"{path}: {reader.filename(n)} is {picture.size[0]}x{picture.size[1]}, expected {size[1]}x{size[0]}; use data.name=imagefolder")
        pixels[n] = picture
    index = reader.class_name_to_idx if path.is_file() else reader.class_to_idx
    return sorted(index, key=index.__getitem__), labels, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def torchvision_cifar(root: Path, classes: int, train: bool, download: bool) -> tuple[list[str], Tensor, Tensor]:
    """CIFAR from torchvision's own files under `root`, downloaded first where allowed and needed; same returns as `decode_all`."""
    import torchvision

    factory = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[classes]
    what = f"cifar{classes}"
    looked = f"looked in {root.absolute()} for train.tar and test.tar, train/ and test/, and torchvision's {factory.base_folder}/"
    try:
        data = factory(str(root), train=train, download=False)
    except RuntimeError as absent:
        if not download:
            raise UserError(f"{what} not found or incomplete: {looked}; pass data.root, or data.download=true to fetch it") from absent
        print(f"{what} not found ({looked}): downloading {factory.url}", flush=True)
        try:
            data = factory(str(root), train=train, download=True)
        except Exception as error:  # urllib, ssl, socket, tar and disk errors alike end in one sentence
            raise UserError(f"{what} could not be downloaded to {root.absolute()} ({error}): {looked}; pass data.root") from error
    return list(data.classes), torch.tensor(data.targets), torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
