"""Synchronized batch norms under `--trainer.sync_batchnorm true`.

PyTorch's converter, which Lightning calls, drops the activation that timm fuses into
`BatchNormAct2d`. timm's converter keeps it. It is applied to each norm, including those of each
width in a `PerWidthNorm`.
"""

from typing import Any

from lightning.pytorch.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tq_lightning.errors import UserError
from tq_lightning.quant.layers import replace_modules


class TimmSyncBatchNorm(LayerSync):
    """Convert the batch norms of a model with timm's converter, and revert to the same modules."""

    def __init__(self) -> None:
        self._plain: dict[nn.Module, nn.Module] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace every batch norm by a synchronized one with the same parameters and buffers."""

        def convert(norm: nn.Module) -> nn.Module:
            if isinstance(norm, nn.SyncBatchNorm):
                return norm
            synchronized = convert_sync_batchnorm(norm)
            self._plain[synchronized] = norm
            return synchronized

        replace_modules(model, _BatchNorm, convert)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Put the original batch norms back, with the current parameters and buffers."""

        def restore(synchronized: nn.Module) -> nn.Module:
            norm = self._plain.get(synchronized)
            if norm is None:
                return synchronized
            norm._parameters.update(synchronized._parameters)
            norm._buffers.update(synchronized._buffers)
            norm.training = synchronized.training
            return norm

        replace_modules(model, nn.SyncBatchNorm, restore)
        self._plain.clear()
        return model


def use_timm_sync_batchnorm(trainer: Any) -> None:
    """Make `Trainer(sync_batchnorm=True)` use timm's converter, before the strategy is set up.

    Raises:
        UserError: the devices are CPUs, on which PyTorch cannot synchronize batch norms.
    """
    strategy = trainer.strategy
    if not isinstance(getattr(strategy, "_layer_sync", None), TorchSyncBatchNorm):
        return
    if strategy.root_device.type == "cpu":
        raise UserError(
            "trainer.sync_batchnorm: PyTorch synchronizes batch norms on GPUs only; pass false"
        )
    strategy._layer_sync = TimmSyncBatchNorm()
