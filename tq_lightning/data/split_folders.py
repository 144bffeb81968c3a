"""Find the folders and tars of the splits of an image data set on disk."""

import functools
from pathlib import Path

from tq_lightning.data.images import escape_undecodable, is_hidden, report
from tq_lightning.errors import UserError

# file and folder names of each split
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
SPLIT_NAMES = {name for names in SPLITS.values() for name in names}


def find_split(root: Path, split: str) -> Path | None:
    """Find the .tar or folder of a split under `root`.

    If there are several, e.g. train.tar and train/, one line names the one that is used.
    """
    paths = [path for name in SPLITS[split] for path in (root / f"{name}.tar", root / name)]
    found = [path for path in paths if path.exists()]
    if len(found) > 1:
        _report_once(f"{root}: using {found[0].name}, not {', '.join(p.name for p in found[1:])}")
    return found[0] if found else None


def is_flat(root: Path) -> bool:
    """Return True if `root` is a tar of class folders, or has class folders instead of splits.

    Raises:
        UserError: a class folder has the name of a split, or a split that of a class, e.g. Train.
    """
    if root.is_file():
        return root.suffix == ".tar"
    if not root.is_dir():
        return False
    splits = [path for split in SPLITS if (path := find_split(root, split)) is not None]
    folders = _subfolders(root)
    classes = [name for name in folders if name not in SPLIT_NAMES]
    plain = [path for path in splits if path.is_dir() and not _subfolders(path)]
    if classes and plain == splits and any(any(path.iterdir()) for path in plain):
        name = plain[0].name
        raise UserError(
            escape_undecodable(
                f"{root} has the folder {name} without class folders next to "
                f"{', '.join(classes[:3])}; if {name} is a class too, move the class folders into "
                f"{root / 'train'}"
            )
        )
    for name in classes:
        if name.lower() in SPLIT_NAMES and _subfolders(root / name):
            raise UserError(
                escape_undecodable(
                    f"{root / name} is not read as a split; rename it to {name.lower()}"
                )
            )
    return not splits and bool(folders)


def _subfolders(path: Path) -> list[str]:
    """Return the sorted names of the folders in a folder, without hidden ones."""
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not is_hidden((p.name,)))


def missing(root: Path, *splits: str) -> str:
    """Return the error message for splits that were not found under `root`."""
    at = root.absolute()
    if not root.exists():
        return (
            f"no data at {at}: data.root must contain train/ or train.tar with one folder of "
            "images per class"
        )
    looked = ", ".join(f"{name}/, {name}.tar" for split in splits for name in SPLITS[split])
    return (
        f"no {splits[0]} split in {at}: looked for {looked}; unpack the data set there, or pass "
        "another data.root"
    )


@functools.cache
def _report_once(line: str) -> None:
    report(line)
