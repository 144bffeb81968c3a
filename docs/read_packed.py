"""Read a packed file of tq_lightning in plain NumPy.

`python read_packed.py FILE BITS` lists its weights as n-bit integers. This reader implements
docs/format.md and depends only on NumPy, and on `zstandard` for compressed files. `read` returns
codes and scales, `weights` float32 arrays, `norms` the norm set of a width, `activation_ranges` the
ranges for integer inference. Only the planes that BITS needs are read.
"""

import hashlib
import json
import math
import sys

import numpy as np

TYPES = {"I64": "<i8", "F64": "<f8", "F32": "<f4", "U8": "|u1"}


def read_header(file):
    """Return (header, tensor index, start of the data) of an open file."""
    head = file.read(8)
    size = int.from_bytes(head, "little")
    raw = file.read(size) if size <= 1 << 26 else b""
    if len(head) < 8 or raw[:1] != b"{" or len(raw) < size:
        raise ValueError("not a safetensors file, or cut off inside its header")
    index = json.loads(raw)
    metadata = dict(index.pop("__metadata__", {})) if isinstance(index, dict) else {}
    kind, version = metadata.get("format"), metadata.get("format_version")
    if kind != "tq_packed" or version not in ("1", "2"):
        raise ValueError(f"not a packed file of version 1 or 2 (format {kind}, version {version})")
    digest = str(metadata.get("header_sha256"))
    blank = raw.replace(digest.encode(), b"0" * 64, 1)
    if hashlib.sha256(blank).hexdigest() != digest:
        raise ValueError("the header is damaged")
    header = json.loads(metadata["header"])
    if header.get("rest_of") is not None:
        raise ValueError("a rest file, without the first planes; join it with `export --add`")
    return header, index, 8 + size


def read_tensor(file, header, index, start, name):
    """Return one tensor that is a section ("scale", "norm4", "plane0"), with a checksum test."""
    entry = index[name]
    begin, end = entry["data_offsets"]
    file.seek(start + begin)
    raw = file.read(end - begin)
    if hashlib.sha256(raw).hexdigest() != header["checksums"][name]:
        raise ValueError(f"{name} is damaged")
    return np.frombuffer(raw, TYPES[entry["dtype"]]).reshape(entry["shape"])


def decompress(frame, first, size):
    """Return the plane of `size` bytes in a zstd frame; all planes except the first were XORed."""
    import zstandard

    raw = zstandard.ZstdDecompressor().decompress(frame.tobytes(), max_output_size=size)
    plane = np.frombuffer(raw, np.uint8)
    if plane.size != size:
        raise ValueError("a plane decompresses to another size")
    return plane if first is None else plane ^ first


def read(path, bits):
    """Return {tensor name: (codes, scale)} at a width.

    Codes are uint8 in the shape of the tensor, scales float32, broadcastable to it.
    """
    with open(path, "rb") as file:
        header, index, start = read_header(file)
        if not 1 <= bits <= header["stored_bits"]:
            raise ValueError(f"the file stores {header['stored_bits']} planes, got {bits} bits")
        row, first = np.zeros(header["codes"], np.uint8), None
        for p in range(bits):
            plane = read_tensor(file, header, index, start, f"plane{p}")
            if header["compression"] is not None:
                plane = decompress(plane, first, header["codes"] // 8)
            first = plane if p == 0 else first
            row = row * 2 + np.unpackbits(plane)
        scales = read_tensor(file, header, index, start, "scale")
    result, at = {}, 0
    for layer in header["layers"]:
        size, count = math.prod(layer["shape"]), math.prod(layer["scale"])
        codes = row[layer["offset"] : layer["offset"] + size].reshape(layer["shape"])
        result[layer["name"]] = codes, scales[at : at + count].reshape(layer["scale"])
        at += count
    return result


def norms(path, bits):
    """Return the norm set of a width, {tensor name: float32 array}; empty if there is none."""
    with open(path, "rb") as file:
        header, index, start = read_header(file)
        if bits not in header["norm_widths"]:
            return {}
        row, at, result = read_tensor(file, header, index, start, f"norm{bits}"), 0, {}
    for part in header["norms"]:
        size = math.prod(part["shape"])
        result[part["name"]] = row[at : at + size].reshape(part["shape"])
        at += size
    return result


def weights(path, bits):
    """Return {tensor name: float32 weight}: scale * (2 level - 1), rounded at every step."""
    with open(path, "rb") as file:
        header, index, start = read_header(file)
        level, table = header["prepare"].get("level", "endpoint"), None
        if f"levels{bits}" in index:
            table = read_tensor(file, header, index, start, f"levels{bits}")
    result = {}
    for name, (codes, scale) in read(path, bits).items():
        k = codes.astype(np.float32)
        if table is not None:
            k = table[codes]
        elif level == "endpoint":
            k /= np.float32(2**bits - 1)
        elif level in ("left", "centre"):
            k = (k + np.float32(0.5) if level == "centre" else k) * np.float32(2.0**-bits)
        else:
            raise ValueError(f"level {level} is not known and has no table")
        result[name] = (k * np.float32(2) - np.float32(1)) * scale
    return result


def activation_ranges(path):
    """Return {layer name: (low, high)}, the ranges of the inputs of integer layers."""
    with open(path, "rb") as file:
        header, _, _ = read_header(file)
    return {name: tuple(pair) for name, pair in header.get("activation_ranges", {}).items()}


def main(args):
    """List the codes of a file. Return the exit status."""
    if len(args) != 2 or not args[1].isdecimal():
        print("usage: python read_packed.py FILE BITS", file=sys.stderr)
        return 2
    try:
        tensors = read(args[0], int(args[1]))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        print(f"read_packed.py: {args[0]}: {error}", file=sys.stderr)
        return 2
    for name, (codes, _) in tensors.items():
        span = f"{codes.min():>3} .. {codes.max():>3}"
        print(f"{name:<40} {codes.shape!s:<20} {span}  mean {codes.mean():.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
