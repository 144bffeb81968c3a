"""The tables that `inspect` prints: bytes and energy of a model."""

import shutil
import sys
import textwrap
from collections.abc import Sequence

from tq_lightning.records import STORAGE_LABELS, Energy, InspectRecord

LEFT = ("layer", "kind", "shape", "way", "what")  # columns aligned to the left


def _width() -> int | None:
    """Return the number of columns of the terminal; None if the output is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _print(line: str, indent: str = "") -> None:
    """Print a line, wrapped in a terminal."""
    width = _width()
    print(line if width is None else textwrap.fill(line, width, subsequent_indent=indent))


def _show(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    optional: Sequence[str] = (),
) -> None:
    """Print a table in aligned columns.

    Args:
        title: title of the table.
        columns: column headers.
        rows: cells.
        optional: columns to omit, in this order, until the table fits into the terminal.
    """
    width, hidden = _width(), list[str]()
    while True:
        shown = [cells for cells in zip(columns, *rows, strict=True) if cells[0] not in hidden]
        sizes = [max(map(len, cells)) for cells in shown]
        if (
            width is None
            or sum(sizes) + 2 * len(sizes) - 2 <= width
            or len(hidden) == len(optional)
        ):
            break
        hidden.append(optional[len(hidden)])
    if hidden:
        title += f" (not shown in {width} columns: {', '.join(hidden)})"
    _print(title)
    for line in zip(*shown, strict=True):
        cells = [
            text.ljust(size) if column[0] in LEFT else text.rjust(size)
            for text, size, column in zip(line, sizes, shown, strict=True)
        ]
        print("  ".join(cells).rstrip())
    print()


def show(record: InspectRecord) -> None:
    """Print bytes by layer, in total and by width, then the energy model and its sources."""
    layers = [
        [
            layer.name,
            layer.kind,
            "x".join(map(str, layer.shape)),
            "float" if layer.bits is None else str(layer.bits),
            f"{layer.parameters:,}",
            *(f"{layer.bytes[way]:,}" for way in record.ways),
        ]
        for layer in record.layers
    ]
    columns = ["layer", "kind", "shape", "bits", "parameters", *record.ways]
    optional = ["paper", "master8", "file_per_width", "kind", "shape"]
    _show(f"{record.model}: bytes by layer", columns, layers, optional)
    floats = 4 * record.parameters
    totals = [
        [
            way,
            STORAGE_LABELS[way],
            *(f"{part:,}" for part in (s.weights, s.scales, s.float, s.norms, s.total)),
            f"{floats / s.total:.3f}x",
        ]
        for way, s in record.ways.items()
    ]
    columns = ["way", "what", "weights", "scales", "float", "norms", "total", "smaller"]
    _show(
        "bytes in total, to serve all widths, and how many times smaller than the float parameters",
        columns,
        totals,
        optional=["what", "scales"],
    )
    reads = [
        [str(bits), f"{size:,}", f"{floats / size:.2f}x"] for bits, size in record.read_at.items()
    ]
    _show("bytes read from the packed file to run at a width", ["bits", "bytes", "smaller"], reads)
    energy = record.energy
    assert energy is not None
    _show_energy(
        "energy in microjoules (modeled, not measured): a switch to the width, and the weight "
        "traffic of one inference",
        energy,
    )
    for name, inference in record.inference.items():
        title = f"energy of an inference on {name} in microjoules (modeled, not measured)"
        _show_energy(title, inference, total=True)
    constants = "; ".join(f"{name} {pj:g}" for name, pj in energy.constants_pj.items())
    for line in (
        *record.accounting,
        *(f"energy: {line}" for line in energy.assumptions),
        f"energy, pJ: {constants}",
        f"energy, source: {energy.source}",
        *_inference_notes(record),
    ):
        _print(f"- {line}", indent="  ")


def _show_energy(title: str, energy: Energy, total: bool = False) -> None:
    """Print a table of microjoules by width and kind, and their sum if `total` is True."""
    kinds = next(iter(energy.by_width.values()))
    names = [name.removesuffix("_pj").replace("_", " ") for name in kinds]
    rows = []
    for bits, row in energy.by_width.items():
        values = [*row.values(), sum(row.values())] if total else [*row.values()]
        rows.append([str(bits), *(f"{pj * 1e-6:,.2f}" for pj in values)])
    _show(title, ["bits", *names, "total"] if total else ["bits", *names], rows)


def _inference_notes(record: InspectRecord) -> list[str]:
    """Return the assumptions and source of the inference energy, shared by all accelerators."""
    for energy in record.inference.values():
        notes = [f"inference: {line}" for line in energy.assumptions]
        return [*notes, f"inference, source: {energy.source}"]
    return []
