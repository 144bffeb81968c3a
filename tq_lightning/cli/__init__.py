"""The command line: `tq-lightning VERB ...` or `python -m tq_lightning VERB ...`.

A verb's modules are imported when the verb is called, so that --help does not load torch.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from tq_lightning import __version__
from tq_lightning.errors import (
    Interrupted,
    TrainingError,
    UserError,
    did_you_mean,
    file_error,
    one_line,
    program_name,
)

REQUEUE_SECONDS = 60.0  # time that a requeued job waits for SLURM to end it
LIGHTNING_VERBS = {
    "fit": "train: --config conf/X.yaml [--ckpt_path last]",
    "validate": "evaluate on the validation split: --config X.yaml --ckpt_path best",
    "test": "evaluate on the test split: --config X.yaml --ckpt_path best",
    "predict": "probabilities of the test split: --config X.yaml --ckpt_path best",
}
# verb -> (module with main(argv) -> exit status, description)
VERBS = {
    "sweep": (
        "tq_lightning.cli.sweep",
        "run a W&B sweep file with Optuna: sweeps/digits.yaml [--workers 2]",
    ),
    "report": (
        "tq_lightning.cli.report",
        "tables, figures and an HTML page of runs: RUNS... --out results/NAME",
    ),
    "inspect": (
        "tq_lightning.cli.inspect",
        "storage and energy, without training: --model.name resnet50",
    ),
    "export": (
        "tq_lightning.cli.export",
        "packed file, ONNX or ExecuTorch from a checkpoint: CKPT --out model.safetensors",
    ),
    "classify": (
        "tq_lightning.cli.classify",
        "classify images with a packed file: MODEL IMAGES --bits 2",
    ),
    "demo-page": (
        "tq_lightning.cli.demo_page",
        "a page that runs a packed file in a browser: MODEL --out DIR",
    ),
}


def usage() -> str:
    """Return the top-level help: one line per verb."""
    program = program_name()
    rows = [*LIGHTNING_VERBS.items(), *((verb, words) for verb, (_, words) in VERBS.items())]
    return "\n".join(
        [
            f"usage: {program} VERB [options]",
            "",
            "TruncQuant on PyTorch Lightning: train one network that runs at 8, 4, 2 or 1",
            "bits by a right shift of its stored weights.",
            "",
            *(f"  {verb:<11}{words}" for verb, words in rows),
            "",
            f"{program} VERB --help lists the options of a verb.",
            f"{program} --version prints the version.",
        ]
    )


def run_fit(argv: list[str]) -> dict[str, Any]:
    """Run `fit` in this process, as the command line does.

    Args:
        argv: arguments as on the command line, after `fit`.

    Returns:
        The last metrics as floats, and the paths "run_dir" and "record".

    Raises:
        UserError: bad input.
        TrainingError: the training cannot continue.
        KeyboardInterrupt: the user pressed Ctrl-C.

    Example:
        `run_fit(["--config", "conf/digits.yaml", "--trainer.max_epochs", "1"])` trains one epoch.
    """
    from tq_lightning.training import lightning_cli

    return lightning_cli.run_fit(argv)


def main(argv: list[str] | None = None) -> int:
    """Run a verb.

    Args:
        argv: the verb and its arguments; None for those of the process.

    Returns:
        The exit status: 0, 1 (the run failed), 2 (bad input), 130 (Ctrl-C) or 128 + the number of
        another signal (141 if standard output was closed).
    """
    # the MPLBACKEND of a notebook may name a missing module; no command opens a window
    os.environ["MPLBACKEND"] = "agg"
    try:
        with _sigterm_raises():
            status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of a pipe is gone, e.g. head
        _close_stdout()
        return 141
    except OSError as error:
        known = file_error(error)
        if known is None:
            raise
        print(f"error: {one_line(known)}", file=sys.stderr)
        _close_stdout()
        return 2


def _close_stdout() -> None:
    """Discard the rest of standard output, so that the interpreter's last flush cannot fail."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"tq_lightning {__version__}")
        return 0
    verb, rest = argv[0], argv[1:]
    try:
        if verb in LIGHTNING_VERBS:
            from tq_lightning.training.lightning_cli import run

            run(argv)
            return 0
        if verb not in VERBS:
            known = [*LIGHTNING_VERBS, *VERBS]
            hint = did_you_mean(verb, known)
            raise UserError(f"unknown verb {verb!r}; pass one of {', '.join(known)}{hint}")
        status = import_module(VERBS[verb][0]).main(rest)
        if status == 128 + getattr(signal, "SIGUSR1", 0):  # a sweep in a SLURM job
            _requeue()
        return status
    except UserError as error:
        if str(error):  # empty if another rank prints it
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except TrainingError as error:
        if str(error):
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        return 130
    except Interrupted as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process is about to end
        if _first_rank():
            print(f"interrupted: {error}", file=sys.stderr, flush=True)
        if error.requeue:
            _requeue()
        return error.status


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Raise `Interrupted` on SIGTERM, so that a verb cleans up; Python's default does not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise_interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _raise_interrupted(signum: int, _: Any) -> None:
    raise Interrupted(signum)


def _first_rank() -> bool:
    return all(os.environ.get(key, "0") == "0" for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _requeue() -> None:
    """Requeue this SLURM job and wait for its end, so that the script does not continue."""
    from tq_lightning.training.cluster import requeue, slurm_job

    job, _ = slurm_job()
    if job is None:
        return
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, _: ended.append(signum))
    reason = requeue() if _first_rank() else None
    if reason is not None:
        print(f"SLURM did not requeue job {job}: {reason}", file=sys.stderr, flush=True)
        return
    if _first_rank():
        print(f"SLURM job {job} is queued again", file=sys.stderr, flush=True)
    until = time.monotonic() + REQUEUE_SECONDS
    while not ended and time.monotonic() < until:
        time.sleep(0.1)
