"""Images in class folders or tars, and torchvision's CIFAR files; whatever is missing or broken ends in one line."""

import io
import tarfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tq_lightning.errors import UserError

# the names under which a split is looked for
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
_BROKEN = (
    OSError,
    EOFError,
    tarfile.TarError,
    RuntimeError,
    ValueError,
    AssertionError,
)  # of timm's readers


def find_split(root: Path, split: str) -> Path | None:
    """The .tar or folder of a split under `root`, or None."""
    for name in SPLITS[split]:
        for path in (root / f"{name}.tar", root / name):
            if path.exists():
                return path
    return None


def is_flat(root: Path) -> bool:
    """Whether `root` itself holds the class folders, or is a tar of them: a set without splits."""
    if root.is_file():
        return root.suffix == ".tar"
    return (
        root.is_dir()
        and not any(find_split(root, s) for s in SPLITS)
        and any(p.is_dir() for p in root.iterdir())
    )


def missing(root: Path, *splits: str) -> str:
    """One line: what was looked for where, and what to pass."""
    at = root.absolute()
    if not root.exists():
        return f"no data at {at}: data.root must hold train/ or train.tar with one folder of images per class inside"
    looked = ", ".join(f"{name}/, {name}.tar" for split in splits for name in SPLITS[split])
    return f"no {splits[0]} split in {at}: looked for {looked}; unpack the set there, or pass another data.root"


def open_folder(
    path: Path, index: dict[str, int] | None = None, **options: Any
) -> tuple[Any, dict[str, int], Tensor]:
    """timm's dataset over a folder or a tar. (It replaces an image that it can't decode by the next one, with a warning.)

    Args:
        path: the folder or .tar with <class>/<image> inside, at any depth.
        index: class name -> number; None numbers the classes found, in natural order.
        options: for timm's `create_dataset`.

    Returns:
        the dataset (n -> (PIL image, class number)), the index, and the labels (N,) int64.

    Raises:
        UserError: no images, a broken tar, a class that `index` does not have.
    """
    from timm.data import create_dataset

    tar = path.is_file()
    if tar:
        # opened anew for each image: worker processes that inherit one open file would move each other's place in it
        options = {"cache_tarfiles": False, **options}
    try:
        dataset = create_dataset("", root=str(path), search_split=False, **options)
    except _BROKEN as error:
        if isinstance(error, (OSError, EOFError, tarfile.TarError)):
            raise UserError(
                f"{path} cannot be read to its end ({error}); copy or download it again"
            ) from error
        raise UserError(
            f"no images in {path}: looked for <class>/<name>.jpg, .jpeg or .png; unpack the set there, or pass data.root"
        ) from error
    empty = (
        []
        if tar
        else [d.name for d in sorted(path.iterdir()) if d.is_dir() and not any(d.iterdir())]
    )
    if empty:
        raise UserError(
            f"{path} has {len(empty)} empty class folders ({', '.join(empty[:3])}): unpack it again"
        )
    reader: Any = dataset.reader
    names = reader.class_name_to_idx if tar else reader.class_to_idx
    labels = torch.tensor(
        [int(n) for n in reader.targets] if tar else [n for _, n in reader.samples]
    )
    if index is None or index == names:
        return dataset, names, labels
    unknown = sorted(set(names) - set(index))
    if unknown:
        raise UserError(
            f"{path} has {len(unknown)} class folders that are not among the {len(index)} expected classes "
            f"({', '.join(unknown[:3])}): unpack it again, or pass data.name=imagefolder for a set of its own classes"
        )
    renumber = torch.empty(len(names), dtype=torch.int64)
    for name, number in names.items():
        renumber[number] = index[name]
    dataset.target_transform = lambda number: int(renumber[int(number)])
    return dataset, index, renumber[labels]


def decode_all(path: Path, size: int) -> tuple[list[str], Tensor, Tensor]:
    """Every image of a folder or tar, decoded once.

    Returns:
        class names in index order, labels (N,) int64, pixels (N, 3, size, size) uint8.

    Raises:
        UserError: as `open_folder`, or an image that is broken or of another size.
    """
    import numpy as np
    from PIL import Image

    options: dict[str, Any] = (
        {"cache_tarfiles": True} if path.is_file() else {}
    )  # read in order, in this process alone
    dataset, index, labels = open_folder(path, **options)
    pixels = np.empty((len(dataset), size, size, 3), np.uint8)
    for n in range(len(dataset)):
        # read through timm's reader: its dataset would skip a broken image in silence
        with dataset.reader[n][0] as stream:
            content = stream.read()
        try:
            picture = Image.open(io.BytesIO(content)).convert("RGB")
        except OSError as error:
            name = dataset.filename(n)
            raise UserError(
                f"{path}: {name} is no whole image ({error}); copy or unpack the set again"
            ) from error
        if picture.size != (size, size):
            got = f"{picture.width}x{picture.height}"
            raise UserError(
                f"{path}: {dataset.filename(n)} is {got}, expected {size}x{size}; use data.name=imagefolder"
            )
        pixels[n] = np.asarray(picture)
    return (
        sorted(index, key=index.__getitem__),
        labels,
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
    )


def torchvision_cifar(
    root: Path, classes: int, train: bool, download: bool
) -> tuple[list[str], Tensor, Tensor]:
    """CIFAR-10 or -100 from torchvision's own files under `root`, downloaded first where allowed; as `decode_all`."""
    import torchvision

    factory = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[classes]
    name, at = f"cifar{classes}", root.absolute()
    looked = f"looked in {at} for train.tar and test.tar, train/ and test/, and torchvision's {factory.base_folder}/"
    try:
        data = factory(str(root), train=train, download=False)
    except RuntimeError as absent:
        if not download:
            raise UserError(
                f"no {name}: {looked}; pass data.root, or data.download=true to fetch it"
            ) from absent
        print(f"no {name} yet ({looked}): downloading {factory.url}", flush=True)
        try:
            data = factory(str(root), train=train, download=True)
        except Exception as error:  # of urllib, ssl, socket, tar or disk: all end in one line
            raise UserError(
                f"no {name}, and the download failed ({error}): {looked}; pass data.root"
            ) from error
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return list(data.classes), torch.tensor(data.targets), pixels
