"""QuantConfig: one home of the nine choices, checked on construction."""

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest

from tq_lightning.quant.codes import QUANTIZERS
from tq_lightning.quant.config import QuantConfig
from tq_lightning.quant.prepare import prepare
from tq_lightning.training.module import TQModule


@pytest.mark.parametrize("function", [prepare, TQModule.__init__])
def test_public_signatures_have_the_same_choices_and_defaults(function):
    parameters = inspect.signature(function).parameters
    for field in fields(QuantConfig):
        if field.name == "float_pass" and function is not prepare:
            continue  # the module's key also says whether there is a float pass at all
        default = parameters[field.name].default
        assert (tuple(default) if isinstance(default, list) else default) == field.default


def test_plain_form_and_back():
    config = QuantConfig(quantizer="round", widths=[2, 8], skip=["last"], activations="pact_round")
    assert config.widths == (8, 2) and config.skip == ("last",)
    plain = config.to_dict()
    assert plain["widths"] == [8, 2] and plain["skip"] == ["last"]
    assert QuantConfig(**plain) == config
    assert QuantConfig.from_mapping({**plain, "name": "resnet8_cifar"}) == config
    assert QuantConfig.from_mapping({}) == QuantConfig()


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        QuantConfig().quantizer = "round"


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_resolved_ste_and_nested_come_from_the_row(quantizer):
    row = QUANTIZERS[quantizer]
    config = QuantConfig(quantizer)
    assert config.resolved_ste == row.ste and config.nested == row.nested
    assert QuantConfig(quantizer, ste="dsq").resolved_ste == "dsq"
