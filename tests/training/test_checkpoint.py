"""load_checkpoint_model refuses files that are not training checkpoints."""

import pytest
import torch

from tq_lightning.errors import UserError
from tq_lightning.training.checkpoint import load_checkpoint_model

OURS = {"name": "resnet8_cifar", "num_classes": 10, "model_args": None}


@pytest.mark.parametrize(
    ("hparams", "said"),
    [
        (None, "is not a training checkpoint (it has no 'hyper_parameters')"),
        ({"lr": 0.1}, "is not a training checkpoint (it has no 'name')"),
        (
            {**OURS, "of_another_library": 1},
            "got an unexpected keyword argument 'of_another_library'",
        ),
        ({**OURS, "loss": "mse"}, "model.loss: got 'mse'"),
        (OURS, "does not fit its own configuration"),
        ({**OURS, "name": "hf-hub:someone/model"}, "would be fetched from elsewhere"),
        ({**OURS, "name": "local-dir:/somewhere"}, "would be fetched from elsewhere"),
    ],
)
def test_a_foreign_checkpoint_is_one_sentence(tmp_path, hparams, said):
    path = tmp_path / "foreign.ckpt"
    torch.save(
        {"state_dict": {}, **({} if hparams is None else {"hyper_parameters": hparams})}, path
    )
    with pytest.raises(UserError) as error:
        load_checkpoint_model(path)
    assert said in str(error.value)
