"""QuantConfig: the nine choices in one place, checked on construction."""

import inspect
from dataclasses import FrozenInstanceError, fields, replace

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
            continue  # the key of the module also enables the float pass
        default = parameters[field.name].default
        assert (tuple(default) if isinstance(default, list) else default) == field.default


def test_dict_round_trip_keeps_every_choice():
    config = QuantConfig(quantizer="round", widths=[2, 8], skip=["last"], activations="pact_round")
    assert config.widths == (8, 2) and config.skip == ("last",)
    plain = config.to_dict()
    assert plain["widths"] == [8, 2] and plain["skip"] == ["last"]
    assert QuantConfig(**plain) == config
    assert QuantConfig.from_mapping({**plain, "name": "resnet8_cifar"}) == config
    assert QuantConfig.from_mapping({}) == QuantConfig()


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        QuantConfig().quantizer = "round"


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_ste_and_nested_are_resolved_from_the_quantizer(quantizer):
    row = QUANTIZERS[quantizer]
    config = QuantConfig(quantizer)
    assert config.resolved_ste == row.ste and config.nested == row.nested
    assert QuantConfig(quantizer, ste="dsq").resolved_ste == "dsq"


@pytest.mark.parametrize("key", ["quantizer", "level", "normalizer", "scale"])
def test_unknown_choice_is_an_error_of_one_line(key):
    with pytest.raises(ValueError, match=f"unknown {key} 'x'; pass one of ") as error:
        QuantConfig(**{key: "x"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"widths": 8}, "widths must be a list of integers, got 8; pass"),
        ({"widths": "8,4"}, "widths must be a list of integers, got '8,4'; pass"),
        ({"skip": None}, "skip must be a list of layer names, got None; pass"),
        ({"skip": [3]}, r"skip must be a list of layer names, got \[3\]; pass"),
        ({"shared_norms": 3}, "shared_norms must be a list of layer names, got 3; pass"),
    ],
)
def test_list_of_another_type_is_an_error(choices, message):
    with pytest.raises(ValueError, match=message):
        QuantConfig(**choices)


PAIRINGS = {  # supported pairings; all others are errors
    ("tanh", "endpoint"): ("mean", "span"),
    ("absmax_channel", "left"): ("mean", "span"),
    ("learned", "centre"): ("span",),
    ("learned_channel", "centroid"): ("span",),
    ("gaussian", "centroid"): ("span",),
    ("mu_law", "centroid"): ("span",),
    ("float_e2", "centroid"): ("span",),
    ("float_e2", "native"): ("span",),
    ("log", "native"): ("span",),
}


@pytest.mark.parametrize(("normalizer", "level"), PAIRINGS)
def test_only_supported_pairings_are_accepted(normalizer, level):
    for scale in PAIRINGS[normalizer, level]:
        assert QuantConfig(normalizer=normalizer, level=level, scale=scale).nested


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"normalizer": "gaussian"},
            "level 'endpoint' is not supported with normalizer 'gaussian'; pass level centroid",
        ),
        (
            {"normalizer": "gaussian", "level": "centroid"},
            "scale 'mean' is not supported with normalizer 'gaussian'; pass scale span",
        ),
        ({"level": "centroid"}, "level 'centroid' is not supported with normalizer 'tanh'"),
        (
            {"normalizer": "mu_law", "level": "native", "scale": "span"},
            "level 'native' is not supported with normalizer 'mu_law'; pass level centroid",
        ),
        ({"normalizer": "learned", "scale": "span"}, "pass level centre or centroid"),
        (
            {"normalizer": "log", "level": "native", "scale": "span", "quantizer": "round"},
            "level 'native' is not supported with quantizer 'round'",
        ),
        (
            {"normalizer": "log", "level": "native", "scale": "span", "ste": "ewgs"},
            "ste 'ewgs' is not supported with normalizer 'log'",
        ),
    ],
)
def test_unsupported_pairings_are_errors(choices, message):
    with pytest.raises(ValueError, match=message) as error:
        QuantConfig(**choices)
    assert "\n" not in str(error.value)


def test_quantizer_that_wrongly_declares_nested_codes_is_an_error(monkeypatch):
    row = replace(QUANTIZERS["round"], nested=True)
    monkeypatch.setitem(QUANTIZERS, "false_claim", row)
    with pytest.raises(ValueError, match="quantizer 'false_claim' declares nested codes, but at u"):
        QuantConfig("false_claim")
    monkeypatch.setitem(QUANTIZERS, "honest", QUANTIZERS["round"])
    assert not QuantConfig("honest").nested


def test_auto_ste_is_that_of_the_normalizer_if_it_has_one():
    span = {"scale": "span"}
    assert QuantConfig(**span).resolved_ste == "scaled"
    assert QuantConfig(normalizer="learned", level="centre", **span).resolved_ste == "identity"
    assert QuantConfig(normalizer="log", level="native", **span).resolved_ste == "value"
