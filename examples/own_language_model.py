"""A small language model and its data sets, for `model.task: language_modeling`.

tq-lightning fit --model.name own_language_model:network --data.name own_language_model:texts \
    --model.task language_modeling --model.norm per_width_all --model.skip last \
    --model.quantize_embeddings true --model.opt adamw --model.lr 0.01 --trainer.max_epochs 5
"""

import random

import torch
from torch import Tensor, nn

WORDS = ("<pad>", "the", "a", "cat", "dog", "bird", "sees", "hears", "follows", "and", ".")
STEPS = 16


class Network(nn.Module):
    """Predict the next word from the previous ones. Any nn.Module works."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        self.rnn = nn.LSTM(width, width, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits (batch, tokens, vocabulary) of token indices (batch, tokens)."""
        return self.head(self.norm(self.rnn(self.embed(input_ids))[0]))


def network(num_classes: int, width: int = 32) -> nn.Module:
    """Return the network; `num_classes` is the size of the vocabulary."""
    return Network(num_classes, width)


class Sentences:
    """Sentences of a small grammar, of different lengths, padded to `STEPS` words."""

    num_classes = len(WORDS)

    def __init__(self, count: int, seed: int) -> None:
        draw = random.Random(seed)
        self.tokens = torch.zeros(count, STEPS + 1, dtype=torch.long)
        for row in self.tokens:
            words: list[str] = []
            while len(words) < draw.choice((4, 12)):
                noun = [draw.choice(("the", "a")), draw.choice(("cat", "dog", "bird"))]
                words += [*noun, draw.choice(("sees", "hears", "follows"))]
            words = [*words[:STEPS], "."]
            row[: len(words)] = torch.tensor([WORDS.index(word) for word in words])

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return the words, and the next word of each as its label; -100 for padding."""
        inputs, labels = self.tokens[number, :-1], self.tokens[number, 1:].clone()
        return {"input_ids": inputs, "labels": labels.masked_fill_(labels == 0, -100)}


def texts(count: int = 512) -> tuple[Sentences, Sentences]:
    """Return (train, test)."""
    return Sentences(count, 0), Sentences(count // 4, 1)
