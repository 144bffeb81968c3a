"""WebDataset shards on disk: `data.name: wds`, tars of KEY.jpg with KEY.cls or KEY.json.

The shards are indexed once, and images are then read by index, as from a folder. Shuffling, exact
resume, several processes and held-out samples work as for every other data set.
"""

import io
import re
from pathlib import Path
from typing import Any

import torch

from tq_lightning.data.images import (
    UnreadableImage,
    escape_undecodable,
    is_hidden,
    read_image,
)
from tq_lightning.data.shard_index import ShardIndex, cached_index
from tq_lightning.data.split_folders import SPLITS
from tq_lightning.data.splits import Source, Split, classes_of
from tq_lightning.errors import UserError, message_of


def read_wds(source: Source, split: str) -> Split | None:
    """Open the shards of a split: ROOT/SPLIT/*.tar, or tars of ROOT with the split in their name.

    Tars of ROOT without the name of any split are the training split. Class names are read from
    ROOT/classes.txt, one per line; without this file, they are class indices.

    Raises:
        UserError: there are no shards, a shard is damaged, or no image has a label.
    """
    if not source.root.is_dir():
        raise UserError(f"no data at {source.root.absolute()}: data.root must contain .tar shards")
    shards = find_shards(source.root, split)
    if not shards:
        if split == "train":
            raise UserError(f"no .tar shards in {source.root.absolute()}; pass another data.root")
        return None
    if source.index is None and split != "train":
        read_wds(source, "train")  # the training split defines the classes
    index = cached_index(shards)
    labels = torch.from_numpy(index.labels)
    known = _read_names(source.root / "classes.txt")
    have = f"the {split} shards in {source.root} have"
    return Split(classes_of(source, labels, known, have), labels, read=Shards(shards, index))


def find_shards(root: Path, split: str) -> list[Path]:
    """List the shards of a split, sorted by name; hidden files are not shards.

    Raises:
        UserError: the name of a shard of `root` contains two splits, or the split is in several
            places, of which one may be outdated.
    """
    folders = [folder for name in SPLITS[split] if _list_tars(folder := root / name)]
    tars = _list_tars(root)
    names = {split: set(names) for split, names in SPLITS.items()}
    words = {tar: set(re.split(r"[^a-z]+", tar.stem.lower())) for tar in tars}
    for tar in tars:
        found = [name for name in names if words[tar] & names[name]]
        if len(found) > 1:
            raise UserError(
                escape_undecodable(
                    f"shard {tar}: its name contains the splits {' and '.join(found)}; move the "
                    f"shards to {root / found[0]}/ and {root / found[1]}/"
                )
            )
    named = [tar for tar in tars if words[tar] & names[split]]
    places = [*(f"{folder.name}/" for folder in folders), *(tar.name for tar in named[:1])]
    if len(places) > 1:
        raise UserError(
            escape_undecodable(
                f"{root} has {split} shards in several places ({', '.join(places)}); move all but "
                "one elsewhere"
            )
        )
    if folders:
        return _list_tars(folders[0])
    if not named and split == "train":
        every = set().union(*names.values())
        return [tar for tar in tars if not words[tar] & every]
    return named


def _list_tars(folder: Path) -> list[Path]:
    return sorted(tar for tar in folder.glob("*.tar") if not is_hidden((tar.name,)))


def _read_names(file: Path) -> list[str]:
    """Read class names, one per line; an empty list without the file.

    Raises:
        UserError: the file is not UTF-8, or two classes have the same name.
    """
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} can't be read ({message_of(error, 100)}); save it as UTF-8"
        ) from None
    names = [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []
    for number, name in enumerate(names):
        if not name:
            raise UserError(f"{file}: line {number + 1} is empty; pass the name of class {number}")
        if names.index(name) != number:
            raise UserError(
                f"{file}: the classes {names.index(name)} and {number} have the same name, "
                f"{name[:60]!r}; pass different names"
            )
    return names


class Shards:
    """Images of shards by index."""

    def __init__(self, shards: list[Path], index: ShardIndex) -> None:
        self.shards, self.index = shards, index

    def __call__(self, number: int) -> tuple[Any, int]:
        """Read (PIL image in RGB, class index).

        Raises:
            UnreadableImage: the image can't be decoded. The message names it and its shard.
        """
        index = self.index
        shard = self.shards[index.shards[number]]
        try:
            # opened for each image, because worker processes would share the position of a file
            with open(shard, "rb") as file:
                file.seek(int(index.offsets[number]))
                content = io.BytesIO(file.read(int(index.sizes[number])))
            return read_image(content), int(index.labels[number])
        except (UnreadableImage, OSError) as error:
            raise UnreadableImage(
                escape_undecodable(f"{index.keys[number]} in {shard.name} {error}")
            ) from error
