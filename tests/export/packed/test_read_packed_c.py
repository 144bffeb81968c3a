"""docs/read_packed.c against the library: the same integers at every width, and no crash."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tq_lightning import save_packed
from tq_lightning.export.packed.edit import read_all, write_rest

READER = Path(__file__).parents[3] / "docs" / "read_packed.c"
MUTATE = Path(__file__).with_name("mutate_read_packed.c")
STRICT = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
ARM = ("aarch64-linux-gnu-gcc", "-static", ("qemu-aarch64", "qemu-aarch64-static"))

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def run(*command, check=True):
    return subprocess.run(
        [str(part) for part in command], capture_output=True, check=check, timeout=500
    )


@pytest.fixture(scope="module", params=["native", "arm64"])
def reader(request, tmp_path_factory):
    """Return the command of the reader, compiled for this machine or emulated 64-bit ARM."""
    program = tmp_path_factory.mktemp("c") / "read_packed"
    if request.param == "native":
        run("cc", *STRICT, "-o", program, READER)
        return [program]
    compiler, flag, names = ARM
    emulator = next(filter(None, map(shutil.which, names)), None)
    if shutil.which(compiler) is None or emulator is None:
        pytest.skip("needs an aarch64 cross compiler and qemu-user")
    run(compiler, *STRICT, flag, "-o", program, READER)
    return [emulator, program]


def test_reader_is_one_short_file_without_dependencies():
    text = READER.read_text()
    assert len(text.splitlines()) <= 600
    assert set(re.findall(r"#include (\S+)", text)) == {
        "<stdint.h>", "<stdio.h>", "<stdlib.h>", "<string.h>",
    }  # fmt: skip


def test_codes_and_dot_products_equal_those_of_the_library(reader, packed):
    header, tensors = read_all(packed)
    planes = np.stack([np.unpackbits(tensors[f"plane{p}"]) for p in range(8)]).astype(np.int64)
    stored = sum(planes[p] << (7 - p) for p in range(8))
    for bits in range(1, 9):
        lines = run(*reader, packed, bits).stdout.decode().splitlines()
        assert len(lines) == len(header["layers"]) == 6
        for line, layer in zip(lines, header["layers"], strict=True):
            size = int(np.prod(layer["shape"]))
            codes = stored[layer["offset"] : layer["offset"] + size] >> (8 - bits)
            ramp = np.arange(size) % 255 - 127
            dot = int(((codes - 2 ** (bits - 1)) * ramp).sum())
            assert line == f"{layer['name']} {size} {codes.min()} {codes.max()} {dot}"
        raw = run(*reader, packed, bits, lines[-1].split()[0]).stdout
        np.testing.assert_array_equal(np.frombuffer(raw, np.uint8), codes)


def test_reader_supports_level_tables(reader, make, tmp_path):
    model, _ = make(normalizer="log", level="native", scale="span")
    save_packed(model, tmp_path / "m")
    tensors = read_all(tmp_path / "m")[1]
    for bits in (1, 4, 8):
        *_, last = run(*reader, tmp_path / "m", bits).stdout.decode().splitlines()
        name, *values = last.split()
        assert name == "levels"
        np.testing.assert_array_equal(np.array(values, np.float32), tensors[f"levels{bits}"])
    run(*reader, tmp_path / "m", 2, "layer1.0.conv1.weight")


def test_invalid_files_and_arguments_are_errors(reader, net, packed, tmp_path):
    save_packed(net[0], tmp_path / "z", compress=True)
    save_packed(net[0], tmp_path / "four", max_bits=4)
    write_rest(packed, tmp_path / "rest", 4)
    raw = bytearray(packed.read_bytes())
    raw[-1] ^= 1
    (tmp_path / "damaged").write_bytes(raw)
    run(*reader, tmp_path / "damaged", 7)  # the last plane is not read
    for arguments, message in (
        ((tmp_path / "z", 2), "the file is compressed"),
        ((tmp_path / "rest", 2), "a rest file"),
        ((tmp_path / "four", 5), "the file has fewer planes"),
        ((tmp_path / "damaged", 8), "a plane is damaged"),
        ((packed, 0), "the file has fewer planes"),
        ((packed, 2, "no.weight"), "no tensor no.weight"),
        ((tmp_path / "missing", 2), "can't read"),
        ((packed,), "usage: read_packed FILE BITS [NAME]"),
    ):
        done = run(*reader, *arguments, check=False)
        assert done.returncode == 2 and done.stdout == b""
        assert message in done.stderr.decode() and done.stderr.count(b"\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", [[], ["layer1.0.conv1.weight"]])
def test_full_disk_is_an_error(reader, packed, name):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*map(str, reader), packed, "2", *name], stdout=full, check=False)
    assert done.returncode == 2
    assert run(*reader, packed, 2, *name).returncode == 0


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("choices", [{}, {"normalizer": "log", "level": "native", "scale": "span"}])
def test_mutated_files_never_crash_the_reader(make, tmp_path, count, choices):
    """Most mutants have a correct checksum, so that the parser is reached."""
    program = tmp_path / "mutate"
    sanitize = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    made = run("cc", *STRICT, *sanitize, "-o", program, MUTATE, check=False)
    if b"asan" in made.stderr or b"ubsan" in made.stderr:
        pytest.skip("needs the sanitizers of the compiler")
    assert made.returncode == 0, made.stderr.decode()
    ranges = {"layer1.0.conv1": (-1.0, 2.5)} if choices else None
    save_packed(make(**choices)[0], tmp_path / "m", max_bits=2, activation_ranges=ranges)
    done = run(program, tmp_path / "m", count, 1, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    opened, refused = map(int, re.findall(r"\d+", done.stdout.decode()))
    assert opened + refused == count and refused > count / 4 and opened > count / 50
