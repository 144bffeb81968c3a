"""PrepareReport: what `prepare` attached to each layer, and how much of a model is quantized."""

from torch import nn
from torch.nn.parameter import is_lazy

from tq_lightning.quant.layers import Layer, embedding_tables, is_embedding


class PrepareReport(dict[str, str]):
    """Dict from layer name to a description of the attached modules. It prints as a table.

    Attributes:
        share: quantized part of all parameters.
        weight_share: quantized part of the convolution and linear weights.
        embedding_share: share of embedding tables, quantized or not, in all parameters.
    """

    share: float = 0.0
    weight_share: float = 0.0
    embedding_share: float = 0.0

    def __str__(self) -> str:
        wide = max((len(name) for name in self), default=0)
        lines = [f"{name:<{wide}}  {what}" for name, what in self.items()]
        lines.append(
            f"quantized: {100 * self.share:.1f} % of all parameters, "
            f"{100 * self.weight_share:.1f} % of the convolution and linear weights"
        )
        if self.embedding_share:
            lines.append(f"embedding tables: {100 * self.embedding_share:.1f} % of all parameters")
        return "\n".join(lines)

    def set_shares(self, model: nn.Module, layers: list[Layer]) -> None:
        """Set the shares of a report, before quantizers are attached."""
        sizes = {id(p): 0 if is_lazy(p) else p.numel() for p in model.parameters()}
        tables = {id(p) for table in embedding_tables(model).values() for p in table.parameters()}
        multiplied = [layer for layer in layers if not is_embedding(layer.module)]
        weights = {id(p) for layer in multiplied for p in layer.parameters()}
        chosen = {id(p) for layer in layers if layer.skipped is None for p in layer.parameters()}
        total = sum(sizes.values())
        self.share = sum(sizes[i] for i in chosen) / total
        of_weights = sum(sizes[i] for i in weights)
        self.weight_share = sum(sizes[i] for i in chosen & weights) / of_weights if weights else 0.0
        self.embedding_share = sum(sizes[i] for i in tables) / total
