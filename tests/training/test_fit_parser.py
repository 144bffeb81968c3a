"""Arguments of fit: values typed once as YAML, one-line errors with a hint, short help."""

import pytest
import yaml

from tq_lightning.errors import UserError
from tq_lightning.training.cli_messages import rewrite_parser_error
from tq_lightning.training.fit_parser import preprocess_argv
from tq_lightning.training.help_pages import page
from tq_lightning.training.lightning_cli import TQCLI, TQDataModule, TQModule
from tq_lightning.training.yaml_file import parse_yaml
from tq_lightning.training.yaml_values import Loader, Text, as_plain_strings, dump


class ParserBuilt(Exception):
    pass


@pytest.fixture(scope="module")
def verbs():
    """Return {verb: parser}, with the top-level parser under ""."""

    class ParserOnly(TQCLI):
        def parse_arguments(self, parser, args):
            raise ParserBuilt(parser, self._subcommand_parsers)

    with pytest.raises(ParserBuilt) as parsed:
        ParserOnly(TQModule, TQDataModule, auto_configure_optimizers=False, args=[])
    parser, below = parsed.value.args
    return {"": parser, **below}


@pytest.fixture
def fit(verbs, tmp_path):
    """Parse arguments of fit after writing `config=TEXT` to a file."""

    def parse(*arguments, config=None):
        if config is not None:
            (tmp_path / "c.yaml").write_text(config)
            arguments = ("--config", str(tmp_path / "c.yaml"), *arguments)
        return verbs[""].parse_args(["fit", *preprocess_argv(arguments)]).fit

    return parse


def message(call, *arguments, **keys):
    with pytest.raises(Exception) as error:
        call(*arguments, **keys)
    return rewrite_parser_error(error.value)


FILE = """
model:
  checkpoint_path: '8e12345'
  teacher_checkpoint_path: "null"
  lr: 1e-3
  model_args: {a: 'null', b: 1e-3, c: '1e-3', d: null, e: 'true'}
data: {root: "None"}
"""


def test_values_in_a_file_are_parsed_as_yaml_once(fit):
    model = fit(config=FILE).model
    assert model.checkpoint_path == "8e12345" and model.teacher_checkpoint_path == "null"
    assert model.lr == 0.001
    assert model.model_args == {"a": "null", "b": 0.001, "c": "1e-3", "d": None, "e": "true"}
    assert fit(config=FILE).data.root == "None"


def test_dumped_configuration_is_read_back_unchanged(verbs, fit):
    config = fit(config=FILE)
    text = verbs["fit"].dump(config, skip_none=False)
    assert parse_yaml(text, "text", Loader)["model"]["checkpoint_path"] == "8e12345"
    again = fit(config=text)
    assert again.model.as_dict() == config.model.as_dict()
    for value in ("8e12345", "1e-3", "null", "true", "None", "2024-01-01", "~", "1_000", ".5"):
        assert parse_yaml(dump({"k": Text(value)}), "text", Loader) == {"k": value}
        assert isinstance(parse_yaml(dump({"k": value}), "text", Loader)["k"], Text)


def test_dumped_arguments_of_a_class_are_read_back_unchanged(verbs, fit):
    """They were text in config.yaml and record.json, and config.yaml could not be read."""
    given = ["EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    config = fit("--trainer.callbacks", *given)
    text = verbs["fit"].dump(config, skip_none=False)
    (saved,) = parse_yaml(text, "text", Loader)["trainer"]["callbacks"]
    assert saved["init_args"]["monitor"] == "val/loss"
    assert fit(config=text).trainer.callbacks == config.trainer.callbacks
    assert fit("--data.root", "a: b").data.root == "a: b"


def test_text_among_arguments_of_a_factory_is_dumped_without_a_warning(verbs, fit, recwarn):
    config = fit("--data.data_args={file: 'a.zip', size: 3}", "--model.model_args={kind: b}")
    written = verbs["fit"].dump(config)
    assert "file: a.zip" in written and "kind: b" in written
    assert not recwarn.list


@pytest.mark.parametrize(
    ("arguments", "section", "key", "value"),
    [
        (["--model.lr='1e-3'"], "model", "lr", 0.001),
        (["--model.lr", "1e-3"], "model", "lr", 0.001),
        (["--model.activations=None"], "model", "activations", None),
        (["--model.activations", "null"], "model", "activations", None),
        (["--model.activations='None'"], "model", "activations", "None"),
        (["--model.checkpoint_path=8e12345"], "model", "checkpoint_path", "8e12345"),
        (["--model.checkpoint_path", '"null"'], "model", "checkpoint_path", "null"),
        (["--model.skip=['first', 'null']"], "model", "skip", ["first", "null"]),
        (
            ["--model.model_args={a: 'null', b: 1e-3}"],
            "model",
            "model_args",
            {"a": "null", "b": 1e-3},
        ),
        (["--data.root", "C:"], "data", "root", "C:"),
    ],
)
def test_values_on_the_command_line_are_parsed_as_yaml_once(fit, arguments, section, key, value):
    got = fit(*arguments)[section][key]
    assert got == value and type(got) in (type(value), Text)


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["conf/r50.yaml"], "unknown argument conf/r50.yaml; did you mean --config conf/r50.yaml?"),
        (
            ["--trainer.max_epoch", "3"],
            "unknown option --trainer.max_epoch; did you mean --trainer.max_epochs",
        ),
        (["--modl.name", "x"], "unknown option --modl.name; did you mean --model.name"),
        (
            ["--model.widths+", "3"],
            "unknown option --model.widths+; appending to lists is not supported, "
            "pass the full list as --model.widths",
        ),
        (
            ["--trainer.precision", "bf16-mixd"],
            "trainer.precision: got 'bf16-mixd', pass an integer or 'transformer-engine'",
        ),
        (["--wandb=5"], "--wandb: got '5', pass true or false"),
        (["--model.model_args={a: 1, a: 2}"], "duplicate key a"),
        (["--model.model_args", "{a: [}"], "not valid YAML"),
        (["--data.lr", "1"], "unknown option --data.lr; did you mean --model.lr?"),
        (["--max_epochs=3"], "unknown option --max_epochs; did you mean --trainer.max_epochs?"),
        (["--config="], "config: got an empty path"),
        (["--config", "/"], "/ is not a file; pass a YAML file"),
    ],
)  # fmt: skip
def test_invalid_argument_is_an_error_of_one_line(fit, arguments, printed):
    text = message(fit, *arguments)
    assert printed in text and "\n" not in text and len(text) < 700


@pytest.mark.parametrize(
    ("config", "printed"),
    [
        (
            "model:\n  quantiser: floor\n",
            "unknown key model.quantiser in the configuration; did you mean model.quantizer",
        ),
        ("modell: {quantizer: floor}\n", "did you mean model.quantizer"),
        ("model: {widths+: 3}\n", "appending to lists is not supported"),
        ("model:\n  lr: 1\n  lr: 2\n", "c.yaml, line 3: duplicate key lr (first on line 2)"),
        ("model: [1,\n  a: }", "c.yaml, line 2: not valid YAML"),
        ("just text", "expected sections such as model: and data:"),
        ("trainer: []\n", "c.yaml: trainer: got [], expected keys with values"),
        ("data: true\n", "c.yaml: data: got True, expected keys with values"),
        ("data: {lr: 1}\n", "unknown key data.lr in the configuration; did you mean model.lr?"),
        ("lr: 1\n", "unknown key lr in the configuration; did you mean model.lr?"),
        ("fit: {model: {lr: 1}}\n", "unknown key fit.model.lr in the configuration; did you mean"),
        ("x: {lr: 1}\n", "unknown key x.lr in the configuration; did you mean model.lr?"),
    ],
)  # fmt: skip
def test_invalid_file_is_an_error_of_one_line(fit, config, printed):
    text = message(fit, config=config)
    assert printed in text and "\n" not in text


def test_file_that_is_not_utf8_is_an_error(fit, tmp_path):
    path = tmp_path / "wide.yaml"
    path.write_bytes("model: {lr: 1e-3, checkpoint_path: '8e1'}  # für\n".encode("utf-16"))
    model = fit("--config", str(path)).model
    assert (model.lr, model.checkpoint_path) == (0.001, "8e1")
    path.write_bytes("model: {name: für}\n".encode("latin-1"))
    assert f"{path}, line 1: not UTF-8" in message(fit, "--config", str(path))


def test_error_names_the_file_of_a_section(fit, tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("lr: 1\nlr: 2\n")
    with pytest.raises(UserError, match=r"model.yaml, line 2: duplicate key lr"):
        fit("--model", str(path))


def test_section_files_are_read_in_any_encoding(fit, tmp_path):
    path = tmp_path / "model.yaml"
    for encoding in ("utf-8", "utf-16"):
        path.write_bytes("lr: 1e-3  # für\ncheckpoint_path: '8e1'\n".encode(encoding))
        for arguments in (["--model", str(path)], [f"--model={path}"]):
            model = fit(*arguments).model
            assert (model.lr, model.checkpoint_path) == (0.001, "8e1")
    path.write_text("- lr\n")
    assert "expected keys with values" in message(fit, "--model", str(path))


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_help_fits_a_screen_and_shows_choices(verbs, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = page(verb, "", verbs[verb]).splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert lines[0].startswith(f"usage: python -m tq_lightning {verb} ")
    assert "{floor, round}" in text and "{none, widest, recursive, external}" in text
    assert text.index("--model.quantizer") < text.index("--trainer.max_epochs")


def test_every_option_is_on_a_help_page(verbs):
    assert "--model.distill_weight" in page("fit", "model", verbs["fit"])
    assert "--data.val_fraction" in page("fit", "data", verbs["fit"])
    trainer = page("fit", "trainer", verbs["fit"])
    assert "--trainer.gradient_clip_val" in trainer and "--model.lr" not in trainer
    assert "--trainer.gradient_clip_val" in page("fit", "all", verbs["fit"])


def test_conf_files_are_read_as_pyyaml_reads_them(fit):
    import tq_lightning

    root = __import__("pathlib").Path(tq_lightning.__file__).parents[1]
    for path in sorted((root / "conf").glob("*.yaml")):
        assert parse_yaml(path.read_text(), str(path), Loader) == yaml.safe_load(path.read_text())


def test_classes_receive_plain_strings(fit):
    """A checkpoint with a subclass of str can't be loaded with weights_only."""

    def kinds(value):
        if isinstance(value, dict):
            return {k for v in value.values() for k in kinds(v)}
        if isinstance(value, list):
            return {k for v in value for k in kinds(v)}
        return {type(value)}

    config = fit(config=FILE)
    assert Text in kinds(config.as_dict())
    plain = as_plain_strings(config)
    assert Text not in kinds(plain.as_dict()) and plain.as_dict() == config.as_dict()
    assert Text in kinds(config.as_dict())
