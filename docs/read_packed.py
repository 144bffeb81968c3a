"""Reads a packed file of tq_lightning in plain NumPy: `python read_packed.py FILE BITS` lists its n-bit integer weights.

It knows nothing but docs/format.md. `read(path, bits)` gives {name: (codes, scale)}, `weights(path, bits)` float32 arrays;
only the planes that `bits` needs are read. Compressed files need the `zstandard` package.
"""

import hashlib
import json
import math
import sys

import numpy as np

TYPES = {"I64": "<i8", "F64": "<f8", "F32": "<f4", "U8": "|u1"}


def read_header(file):
    """(header, tensor index, where the data begins) of an open file; ValueError where it is none of this format."""
    head = file.read(8)
    size = int.from_bytes(head, "little")
    if len(head) < 8 or size > 1 << 26:
        raise ValueError("not a safetensors file")
    raw = file.read(size)
    index = json.loads(raw)
    metadata = index.pop("__metadata__", {})
    if metadata.get("format") != "tq_packed" or metadata.get("format_version") != "1":
        raise ValueError(
            f"not a packed file of version 1: {metadata.get('format')} {metadata.get('format_version')}"
        )
    blank = raw.replace(metadata["header_sha256"].encode(), b"0" * 64, 1)
    if hashlib.sha256(blank).hexdigest() != metadata["header_sha256"]:
        raise ValueError("the header is damaged")
    return json.loads(metadata["header"]), index, 8 + size


def read_tensor(file, header, index, start, name):
    """One tensor that is a section of its own ("scale", "norm4", "plane0"), checked against its SHA-256."""
    entry = index[name]
    begin, end = entry["data_offsets"]
    file.seek(start + begin)
    raw = file.read(end - begin)
    if hashlib.sha256(raw).hexdigest() != header["checksums"][name]:
        raise ValueError(f"{name} is damaged")
    return np.frombuffer(raw, TYPES[entry["dtype"]]).reshape(entry["shape"])


def unfold(plane, first, size):
    """A zstd frame -> the plane of `size` bytes; every plane but the first was XORed with it."""
    import zstandard

    out = np.frombuffer(
        zstandard.ZstdDecompressor().decompress(plane.tobytes(), max_output_size=size), np.uint8
    )
    if out.size != size:
        raise ValueError("a plane unfolds to another size")
    return out if first is None else out ^ first


def read(path, bits):
    """{tensor name: (uint8 codes of width `bits`, float32 scale)}, both in the tensor's shape or broadcastable to it."""
    with open(path, "rb") as file:
        header, index, start = read_header(file)
        if not 1 <= bits <= header["stored_bits"]:
            raise ValueError(f"the file stores {header['stored_bits']} planes")
        row, first = np.zeros(header["codes"], np.uint8), None
        for p in range(bits):
            plane = read_tensor(file, header, index, start, f"plane{p}")
            if header["compression"] is not None:
                plane = unfold(plane, first, header["codes"] // 8)
            first = plane if p == 0 else first
            row = row * 2 + np.unpackbits(plane)
        scales = read_tensor(file, header, index, start, "scale")
    out, at = {}, 0
    for layer in header["layers"]:
        size, count = math.prod(layer["shape"]), math.prod(layer["scale"])
        codes = row[layer["offset"] : layer["offset"] + size].reshape(layer["shape"])
        out[layer["name"]] = codes, scales[at : at + count].reshape(layer["scale"])
        at += count
    return out


def norms(path, bits):
    """The norm set of one width: {tensor name: float32 array}; empty where the file has none."""
    with open(path, "rb") as file:
        header, index, start = read_header(file)
        if bits not in header["norm_widths"]:
            return {}
        row, at, out = read_tensor(file, header, index, start, f"norm{bits}"), 0, {}
    for cut in header["norms"]:
        size = math.prod(cut["shape"])
        out[cut["name"]] = row[at : at + size].reshape(cut["shape"])
        at += size
    return out


def weights(path, bits):
    """{tensor name: float32 weight}: scale * (2 level - 1), rounded to float32 at every step."""
    with open(path, "rb") as file:
        level = read_header(file)[0]["prepare"]["level"]
    out = {}
    for name, (codes, scale) in read(path, bits).items():
        k = codes.astype(np.float32)
        if level == "endpoint":
            k /= np.float32(2**bits - 1)
        else:
            k = (k + np.float32(0.5) if level == "centre" else k) * np.float32(2.0**-bits)
        out[name] = (k * np.float32(2) - np.float32(1)) * scale
    return out


if __name__ == "__main__":
    for name, (codes, _) in read(sys.argv[1], int(sys.argv[2])).items():
        print(
            f"{name:<40} {codes.shape!s:<20} {codes.min():>3} .. {codes.max():>3}  mean {codes.mean():.2f}"
        )
