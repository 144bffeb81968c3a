"""Parameters in training, and those that a width uses."""

from torch import nn

from tq_lightning.quant.switchable_norm import PerWidthNorm, width_name


class TrainedParameters:
    """The parameters of a model that require a gradient.

    Args:
        modules: the modules of the model, from `walk_modules`.

    Attributes:
        parameters: each of them once, in model order.
        indices: index in `parameters` by the `id` of a parameter.
    """

    def __init__(self, modules: list[tuple[str, nn.Module]]) -> None:
        every = dict.fromkeys(p for *_, p in parameter_slots(modules))
        self.parameters = [p for p in every if p.requires_grad]
        self.indices = {id(p): index for index, p in enumerate(self.parameters)}
        self._widths = self._norm_widths([m for _, m in modules if isinstance(m, PerWidthNorm)])
        self._used: dict[str, list[int]] = {}

    def used(self, bits: int | None) -> list[int]:
        """List the indices of the parameters that a width uses: all but norms of other widths."""
        name = width_name(bits)
        if name not in self._used:
            self._used[name] = [i for i, own in enumerate(self._widths) if own in (None, name)]
        return self._used[name]

    def _norm_widths(self, norms: list[PerWidthNorm]) -> list[str | None]:
        """Return, for each parameter, the name of the width whose norm owns it, or None."""
        owners: dict[int, str | None] = {}
        for norm in norms:
            for name in norm.trained:
                own = norm.sets._modules[name]._parameters  # type: ignore[union-attr]
                for p in own.values():  # a parameter of several norms has no owner
                    owners[id(p)] = name if owners.get(id(p), name) == name else None
        return [owners.get(id(p)) for p in self.parameters]


def parameter_slots(
    modules: list[tuple[str, nn.Module]],
) -> list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]]:
    """List (parameters of a module, name in it, parameter)."""
    return [
        (m._parameters, name, p)
        for _, m in modules
        for name, p in m._parameters.items()
        if p is not None
    ]
