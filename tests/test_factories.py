"""Factories of networks and data sets: imported for the user, never because of a file."""

import shutil
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from fixtures.packed import resign, set_in
from torch import nn

from tq_lightning import bit_width, load_packed, prepare, save_packed
from tq_lightning.cli import main
from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.errors import UserError
from tq_lightning.factories import is_factory
from tq_lightning.models import create_model
from tq_lightning.quant.batches import split_batch
from tq_lightning.training.checkpoint import load_checkpoint_model
from tq_lightning.training.module import TQModule

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_network.py"
OWN = """
from pathlib import Path
import torch
Path("imported").touch()
number = 3
def network(num_classes=3): return torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
def text(): return "no network"
def needs(num_classes): return network(num_classes)
def fails(): raise KeyError("a cause\\nand more")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Create a current directory with the example and a module that writes a file on import."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    shutil.copy(EXAMPLE, tmp_path)
    yield tmp_path
    for name in ("own", "own_network"):
        sys.modules.pop(name, None)


def test_factory_names_are_recognized():
    assert is_factory("package.module:factory") and is_factory("own:network")
    for other in ("resnet18", "hf-hub:timm/resnet18", "hf_hub:x", "own:", "own: x", "a/b:c", None):
        assert not is_factory(other)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:network", "can't import it .ModuleNotFoundError: No module named 'nowhere'"),
        ("own:missing", "can't import it .AttributeError"),
        ("own:number", "got a int, pass a function"),
        ("own:text", "the factory returned a str; return an nn.Module"),
        ("own:fails", "the call with no arguments raised KeyError"),
        ("own:needs", "the number of classes is not known, pass model.num_classes"),
    ],
)
def test_invalid_factory_is_an_error(folder, name, message):
    with pytest.raises(UserError, match=message) as caught:
        create_model(name)
    assert "\n" not in str(caught.value)


def test_packed_file_never_imports_a_factory(folder):
    model = create_model("own:network", 3)
    prepare(model, verbose=False)
    save_packed(model.eval(), "own.safetensors", name="own:network")
    x = torch.ones(1, 4)
    with bit_width(model, 4, "truncate"):
        expected = model(x)
    del sys.modules["own"]
    Path("imported").unlink()
    with pytest.raises(UserError, match="names the factory own:network, which is not imported"):
        load_packed("own.safetensors")
    message = "its network is 'own:network', got model='own_network:network'"
    with pytest.raises(UserError, match=message):
        load_packed("own.safetensors", model="own_network:network")
    assert not Path("imported").exists()
    for passed in ("own:network", nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])):
        assert torch.equal(load_packed("own.safetensors", bits=4, model=passed)(x), expected)
    assert Path("imported").exists()


def test_packed_file_whose_arguments_are_refused_is_a_warning(folder):
    """The model arguments of training may name files; a header may not."""
    model = create_model("own:network", 3)
    prepare(model, verbose=False)
    args = {"name": "own:network", "model_args": {"sizes": (1, 2)}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_packed(model, "own.safetensors", **args)
    args["model_args"]["vocabulary"] = "data/words.txt"
    message = "can't be loaded by the name own:network: disallowed model argument .*'vocabulary'"
    with pytest.warns(UserWarning, match=message):
        save_packed(model, "own.safetensors", **args)
    with pytest.raises(UserError, match=r"disallowed model argument .*'vocabulary'"):
        load_packed("own.safetensors", model="own:network")
    load_packed("own.safetensors", model=nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]))


HOSTILE = {  # model of the header -> message
    "path as argument": ({"name": "own:network", "args": {"block": "../x"}}, "'block'"),
    "file as argument": ({"name": "own:network", "args": {"file": "x"}}, "argument.*'file'"),
    "large number": ({"name": "own:network", "args": {"num_classes": 1 << 40}}, "'num_classes'"),
    "list": ({"name": "own:network", "args": [1]}, "arguments in the file header are a list"),
    "no arguments": ({"name": "own:network"}, "arguments in the file header are a NoneType"),
    "no name": ({"args": {}}, "its network is 'None'"),
    "no text": ({"name": ["own:network"], "args": {}}, "its network is"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_arguments_of_a_header_are_checked_before_a_factory_gets_them(case, folder):
    model = create_model("own:network", 3)
    prepare(model, verbose=False)
    save_packed(model, "own.safetensors", name="own:network", model_args={"num_classes": 4})
    raw, (described, message) = Path("own.safetensors").read_bytes(), HOSTILE[case]
    Path("bad.safetensors").write_bytes(resign(raw, set_in("content", "model", described)))
    del sys.modules["own"]
    Path("imported").unlink()
    with pytest.raises(UserError, match=message) as caught:
        load_packed("bad.safetensors", model="own:network")
    assert "pass" in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("imported").exists()
    load_packed("own.safetensors", model="own:network")
    assert Path("imported").exists()


def _fit(*more):
    return main(
        [
            "fit",
            *("--model.name", "own_network:network", "--data.name", "own_network:data_sets"),
            *("--data.data_args", "{count: 90}", "--data.batch_size", "16", "--data.workers", "0"),
            *("--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"),
            *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
            *more,
        ]
    )


def test_checkpoint_never_imports_a_factory(folder, capsys):
    """The example trains, and its checkpoint loads only for the same name, in Python and verbs."""
    assert _fit() == 0
    (run,) = Path("runs").iterdir()
    last = run / "checkpoints" / "last.ckpt"
    assert _fit("--ckpt_path", str(last), "--trainer.max_epochs", "3") == 0
    hostile = torch.load(last, weights_only=True)
    hostile["hyper_parameters"]["name"] = "own:network"
    bad = folder / "bad.ckpt"
    torch.save(hostile, bad)
    with pytest.raises(UserError, match="names the factory 'own:network'"):
        load_checkpoint_model(bad)
    with pytest.raises(UserError, match="is a checkpoint of own:network, got model own_network:"):
        load_checkpoint_model(bad, model="own_network:network")
    with pytest.raises(UserError, match="names the factory 'own:network'"):
        TQModule.load_from_checkpoint(bad, weights_only=True)
    capsys.readouterr()
    assert _fit("--ckpt_path", str(bad), "--trainer.max_epochs", "4") == 2
    assert "--model.name own:network" in capsys.readouterr().err
    assert main(["export", str(bad), "--out", "bad.safetensors"]) == 2
    assert not Path("imported").exists()

    model, _, _ = load_checkpoint_model(last, model="own_network:network")
    loaded = TQModule.load_from_checkpoint(last, name="own_network:network", weights_only=True)
    points = torch.randn(5, 2)
    assert torch.equal(model(points=points), loaded.eval().model(points))
    name = ["--model.name", "own_network:network"]
    assert main(["export", str(last), "--out", "own.safetensors", *name]) == 0
    packed = load_packed("own.safetensors", model=name[1])
    torch.testing.assert_close(packed(points), model(points))


@pytest.mark.slow
def test_data_factory_supports_shuffling_resume_and_validation_split(folder):
    def batches(loader):
        return [batch["points"] for batch in loader]

    data = {
        workers: TQDataModule("own_network:data_sets", batch_size=16, workers=workers, seed=3)
        for workers in (0, 2)
    }
    one, two = (batches(d.train_dataloader()) for d in data.values())
    assert len(one) == 33 and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    loader = data[0].train_dataloader()
    loader.progress = lambda: (0, 30)  # like the counters of Lightning after a resume
    assert all(torch.equal(a, b) for a, b in zip(batches(loader), one[30:], strict=True))
    loader.progress = lambda: (1, 0)
    assert not torch.equal(batches(loader)[0], one[0])
    _, train = data[0]._part("train")
    _, held = data[0]._part("val")
    assert not set(train.tolist()) & set(held.tolist()) and len(train) + len(held) == 600
    assert data[0].num_classes == 3 and data[0].class_names == ["inner", "middle", "outer"]
    assert len(list(data[0].calibration_batches(2))) == 2


SMALL = {"batch_size": 4}


def test_return_value_of_a_data_factory_is_checked(folder):
    (folder / "own.py").write_text(
        "import lightning\n"
        "def module(): return lightning.LightningDataModule()\n"
        "def text(): return 'no data'\n"
        "def pair(): return [1, 2, 3], [4]\n"
        "def paths(): return 'train.csv', 'test.csv'\n"
        "def empty(): return [1, 2, 3], []\n"
        "def triple(): return [(1, 0)], [(1, 0)], [(1, 0)]\n"
        "def stream(): return iter([1]), iter([2])\n"
        "def no_training(): return None, [1]\n"
    )
    assert isinstance(TQDataModule("own:module"), L.LightningDataModule)
    with pytest.raises(UserError, match=r"own:text: it returns a str; return a Lightning"):
        TQDataModule("own:text")
    assert TQDataModule("own:pair").num_classes is None
    for name, got in (
        ("paths", "a tuple of str, str"),
        ("stream", "a tuple of list_iterator, list_iterator"),
        ("no_training", "a tuple of NoneType, list"),
    ):
        with pytest.raises(UserError, match=f"own:{name}: it returns {got}; return a Lightning"):
            TQDataModule(f"own:{name}")
    with pytest.raises(UserError, match="own:empty: its test data set is empty"):
        TQDataModule("own:empty")
    for name, key in (("pair", {"mixup": 0.2}), ("pair", {"image_size": 8}), ("module", SMALL)):
        with pytest.raises(
            UserError, match=rf"data.{next(iter(key))}=.* has no effect on the data"
        ):
            TQDataModule(f"own:{name}", **key)
    with pytest.raises(UserError, match=r"data.val_fraction=0.2 .* there is a validation split"):
        TQDataModule("own:triple", val_fraction=0.2)
    assert TQDataModule("own:pair", root="elsewhere", val_fraction=0.2, **SMALL).batch_size == 4
    with pytest.raises(UserError, match=r"data.data_args: got .*data.name=digits has no arguments"):
        TQDataModule("digits", data_args={"a": 1})
    with pytest.raises(UserError, match=r"data.batch_size=0 is out of range"):
        TQDataModule("own:pair", batch_size=0)
    with pytest.raises(UserError, match=r"pass one of digits, .* or package.module:factory"):
        TQDataModule("own:")


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("(x, 0.5)", "the labels have type torch.float64; return integers"),
        ("(x, 4)", "the labels are between 4 and 4, but the network has 4 outputs; pass --model.n"),
        ("(x, -1)", "the labels are between -1 and -1, but the network has 4 outputs; number the"),
        ("x", "a batch is a Tensor; return (inputs, labels)"),
        ("{'input': x}", "a batch has the keys input, and no labels"),
        ("{'input': x, 'other': x, 'label': 0}", "got an unexpected keyword argument 'other'"),
    ],
)
def test_samples_that_do_not_fit_are_one_line(folder, capsys, sample, message):
    (folder / "own.py").write_text(
        OWN + f"x = torch.zeros(4)\ndef samples(): return ([{sample}] * 40,) * 2\n"
    )
    fit = ["fit", "--model.name=own:network", "--data.name=own:samples", "--model.num_classes=4"]
    fit += ["--data.workers=0", "--data.batch_size=8", "--trainer.max_epochs=1"]
    assert main([*fit, "--trainer.accelerator=cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("training", "evaluation", "message"),
    [
        ("0", "torch.tensor([0])", "logits (8, 4) for labels (8, 1); expected (batch, classes)"),
        ("torch.tensor([0])", "0", "logits (8, 4) for labels (8, 1); expected (batch, classes)"),
        ("torch.eye(4)[n % 4]", "torch.eye(4)[0]", "labels of an evaluation are probabilities (8,"),
        ("torch.eye(4).long()[0]", "0", None),
        ("n % 4", "7", "the labels are between 7 and 7, but the network has 4 outputs"),
        ("n % 4", "-1", "the labels are between -1 and -1, but the network has 4 outputs"),
        ("str(n)", "0", "the labels of a batch are a tuple; return a tensor of class indices"),
    ],
)
def test_labels_of_another_form_are_one_line(folder, capsys, training, evaluation, message):
    (folder / "own.py").write_text(
        OWN + "class Samples(list): num_classes = 4\n"
        "def samples():\n"
        f"    train = Samples((torch.zeros(4), {training}) for n in range(40))\n"
        f"    test = [(torch.zeros(4), {evaluation}) for n in range(8)]\n"
        "    return train, test, test\n"
    )
    fit = ["fit", "--model.name=own:network", "--data.name=own:samples", "--model.num_classes=4"]
    fit += ["--data.workers=0", "--data.batch_size=8", "--trainer.max_epochs=1"]
    loss = [] if message else ["--model.loss=bce"]
    status = main([*fit, *loss, "--trainer.accelerator=cpu"])
    error = capsys.readouterr().err
    assert status == (2 if message else 0) and (message or "") in error, error
    assert "Traceback" not in error


@pytest.mark.parametrize("kind", ["uint8", "int32", "bool"])
def test_labels_of_every_integer_type_are_class_indices(kind):
    batch = {"x": torch.zeros(300, 4), "labels": torch.ones(300).to(getattr(torch, kind))}
    labels = split_batch(batch)[1]
    assert labels.dtype == torch.int64 and labels.tolist() == [1] * 300
    assert split_batch((batch["x"], ["a"] * 300))[1] == ["a"] * 300  # predict reads no labels


def test_label_that_only_a_later_batch_has_is_one_line(folder, capsys):
    samples = "[(x, 0)] * 39 + [(x, 7)]"
    (folder / "own.py").write_text(
        OWN + f"x = torch.zeros(4)\ndef samples(): return {samples}, [(x, 0)] * 40\n"
    )
    fit = ["fit", "--model.name=own:network", "--data.name=own:samples", "--model.num_classes=4"]
    fit += ["--data.workers=0", "--data.batch_size=8", "--trainer.max_epochs=1"]
    assert main([*fit, "--trainer.accelerator=cpu"]) == 2
    assert "and 7, but the network has 4 outputs; pass --model.n" in capsys.readouterr().err


def test_run_with_a_data_module_of_the_user_gives_activation_ranges(folder):
    (folder / "own.py").write_text(
        OWN + "import lightning\n"
        "class Module(lightning.LightningDataModule):\n"
        "    num_classes = 3\n"
        "    def setup(self, stage): self.samples = [(torch.ones(4), n % 3) for n in range(16)]\n"
        "    def train_dataloader(self): return torch.utils.data.DataLoader(self.samples, 8)\n"
        "    val_dataloader = train_dataloader\n"
        "def module(): return Module()\n"
    )
    name = "--model.name=own:network"
    fit = ["fit", name, "--model.num_classes=3", "--data.name=own:module", "--run_dir=run"]
    assert main([*fit, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]) == 0
    export = ["export", "run/checkpoints/last.ckpt", name, "--out=m.safetensors"]
    assert main([*export, "--calibrate=run"]) == 0
    assert load_packed("m.safetensors", model="own:network").tq_ranges


def test_factory_is_exported_on_the_command_line(folder, capsys):
    fit = ["fit", "--model.name=own_network:network", "--data.name=own_network:data_sets"]
    fit += ["--data.workers=0", "--trainer.max_epochs=1", "--run_dir=run", "--data.batch_size=64"]
    assert main([*fit, "--trainer.accelerator=cpu", "--trainer.limit_train_batches=2"]) == 0
    name, last = ["--model.name", "own_network:network"], "run/checkpoints/last.ckpt"
    assert main(["export", last, *name, "--out", "m.onnx", "--format", "onnx", "--bits", "4"]) == 0
    assert main(["export", last, *name, "--out", "m.safetensors", "--calibrate", "run"]) == 0
    packed = load_packed("m.safetensors", model=name[1])
    assert packed.tq_file["inputs"] == [{"name": "points", "shape": [2], "type": "float32"}]
    assert packed.tq_file["class_names"] == ["inner", "middle", "outer"]
    assert set(packed.tq_ranges) == {"second"}
    capsys.readouterr()
    (folder / "x.png").touch()
    for command, message in (
        (
            ["export", "m.safetensors", "--out", "n.onnx", "--format", "onnx"],
            "not imported automatically",
        ),
        (["classify", "m.safetensors", "x.png"], "takes points; run it with load_packed"),
        (["demo-page", "m.safetensors", "--out", "page"], "takes points; run it with load_packed"),
        (["demo-page", last, "--out", "page"], "pass --model.name own_network:network"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1, error
    assert not (folder / "n.onnx").exists() and not (folder / "page").exists()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_samples_of_different_shapes_are_an_error_of_one_line(folder, capsys, workers):
    (folder / "own.py").write_text(
        "import torch\n"
        "def ragged(): return ([(torch.zeros(1 + n % 3, 2), n % 2) for n in range(40)],) * 2\n"
    )
    fit = ["fit", "--model.name=own_network:network", "--data.name=own:ragged"]
    fit += [f"--data.workers={workers}", "--data.batch_size=8", "--model.num_classes=2"]
    assert main([*fit, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]) == 2
    error = capsys.readouterr().err
    # in a worker process PyTorch fails while it makes the shared memory of the batch
    reason = "Trying to resize storage" if workers else "stack expects each tensor to be equal size"
    assert f"the samples of the data set can't be stacked ({reason}" in error
    assert "give the data set a collate_fn" in error and "Traceback" not in error
