"""load_checkpoint_model rejects files that are not training checkpoints."""

import pytest
import torch

from tq_lightning.errors import UserError
from tq_lightning.training.checkpoint import load_checkpoint_model
from tq_lightning.training.module import TQModule
from tq_lightning.training.optim import check_restored_state

OURS = {"name": "resnet8_cifar", "num_classes": 10, "model_args": None}


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        (None, "is not a training checkpoint (it has no 'hyper_parameters')"),
        ({"lr": 0.1}, "is not a training checkpoint (it has no 'name')"),
        (
            {**OURS, "of_another_library": 1},
            "got an unexpected keyword argument 'of_another_library'",
        ),
        ({**OURS, "loss": "mse"}, "model.loss: got 'mse'"),
        (OURS, "does not fit its own configuration"),
        ({**OURS, "name": 5}, "names the model 5"),
        ({**OURS, "name": "hf-hub:someone/model"}, "would have to be downloaded"),
        ({**OURS, "name": "local-dir:/somewhere"}, "would have to be downloaded"),
    ],
)
def test_foreign_checkpoint_is_an_error_of_one_line(tmp_path, hparams, message):
    path = tmp_path / "foreign.ckpt"
    torch.save(
        {"state_dict": {}, **({} if hparams is None else {"hyper_parameters": hparams})}, path
    )
    with pytest.raises(UserError) as error:
        load_checkpoint_model(path)
    assert message in str(error.value)


KEY = "layer1.0.conv1.parametrizations.weight.original"


@pytest.fixture
def trained():
    """Return (module, the checkpoint that it would write)."""
    module = TQModule(name="resnet8_cifar", num_classes=10)
    module.configure_model()
    state = {f"model.{k}": v for k, v in module.model.state_dict().items()}
    return module, {"state_dict": state, "hyper_parameters": dict(module.hparams)}


BROKEN = {  # name -> (tensors that replace those of the checkpoint, message)
    "another shape": (
        {KEY: torch.zeros(3)},
        f"{KEY} has shape (3,), its own configuration has (16",
    ),
    "not a tensor": ({KEY: "weights"}, f"{KEY} is not a tensor, got str"),
    "missing": ({KEY: None}, f"does not fit its own configuration: tensors 1 missing ({{at}}{KEY}"),
    "unknown": ({"more": torch.zeros(1)}, "tensors 1 unknown ({at}more"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_checkpoint_with_invalid_parts_is_an_error_of_one_line(tmp_path, trained, case):
    module, checkpoint = trained
    parts, message = BROKEN[case]
    changed = checkpoint["state_dict"] | {f"model.{k}": v for k, v in parts.items()}
    checkpoint["state_dict"] = {k: v for k, v in changed.items() if v is not None}
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    with pytest.raises(UserError) as error:  # export, classify
        load_checkpoint_model(tmp_path / "broken.ckpt")
    assert message.format(at="") in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError) as error:  # fit, test, validate, predict
        module.on_load_checkpoint(checkpoint)
    assert message.format(at="model.") in str(error.value) and "\n" not in str(error.value)


def test_moving_average_with_invalid_weights_is_an_error_of_one_line(trained):
    module, checkpoint = trained
    module.on_load_checkpoint(dict(checkpoint))
    average = checkpoint["state_dict"] | {f"model.{KEY}": torch.zeros(3)}
    with pytest.raises(UserError, match=r"has shape \(3,\)"):
        module.on_load_checkpoint(checkpoint | {"current_model_state": average})


def test_optimizer_state_of_another_shape_is_an_error_of_one_line():
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    check_restored_state(optimizer)
    optimizer.state[weight]["momentum_buffer"] = torch.zeros(2)
    with pytest.raises(UserError, match=r"momentum_buffer has shape \(2,\), .* \(4, 3\)"):
        check_restored_state(optimizer)


def test_a_text_file_is_not_taken_for_code(tmp_path):
    path = tmp_path / "conf.yaml"
    path.write_text("# a comment\nmodel:\n  name: resnet8_cifar\n")
    with pytest.raises(UserError, match=r"not a file that torch\.save wrote"):
        load_checkpoint_model(path)
