"""Provenance of a result: package versions and the git commit."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__version__ = "0.1.0"

PACKAGES = ("torch", "torchvision", "lightning", "timm", "numpy", "optuna", "wandb")


def package_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Return {name: version} of tq_lightning, Python and those of `packages` that are installed."""
    found = {"tq_lightning": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_state() -> tuple[str | None, bool]:
    """Return (commit, has uncommitted changes) of the source tree; (None, False) without git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # a package may be installed inside another checkout
        return None, False
    try:
        options = {"cwd": root, "capture_output": True, "text": True, "timeout": 20}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **options)  # type: ignore[call-overload]
        if commit.returncode != 0:
            return None, False
        status = subprocess.run(["git", "status", "--porcelain"], **options)  # type: ignore[call-overload]
        return commit.stdout.strip(), bool(status.stdout.strip())
    except (OSError, subprocess.TimeoutExpired):
        return None, False
