"""Write the demo page: HTML, the graph, the packed file and ONNX Runtime Web in one folder.

The graph holds everything except the codes. The page reads the codes from the packed file, plane by
plane, so a browser downloads only the planes of its width.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tq_lightning.errors import UserError
from tq_lightning.export.class_names import class_names
from tq_lightning.export.demo_page.runtime import copy_runtime
from tq_lightning.export.onnx.dynamic import export_dynamic
from tq_lightning.export.packed.container import Container
from tq_lightning.export.packed.edit import repack
from tq_lightning.export.packed.header import read_header
from tq_lightning.export.packed.optional_fields import check_takes_images
from tq_lightning.files import atomic_write, check_replaceable

HERE = Path(__file__).parent
MARKER = "demo.json"  # data of the page; also marks a folder that a new page may replace
KIND = "tq_lightning demo page"
MODEL, GRAPH = "model.safetensors", "graph.onnx"


def check_out(out: Path) -> None:
    """Raise UserError if `out` is a file, or a folder that is not a demo page."""
    check_replaceable(out, MARKER, KIND, "a demo page")


def write_demo_page(
    path: Path,
    out: Path,
    *,
    title: str | None = None,
    examples: Sequence[Path] = (),
    runtime: Path | None = None,
    model: str | None = None,
) -> dict[str, int]:
    """Write a page that runs a packed file in a browser.

    Args:
        path: packed file.
        out: folder of the page, replaced atomically.
        title: title of the page. None takes the name of the model.
        examples: example images on the page.
        runtime: folder with the files of ONNX Runtime Web. None downloads its npm package.
        model: factory of the network, if the file names one; see `load_packed`.

    Returns:
        Bytes of each file.

    Raises:
        UserError: see `export_dynamic` and `copy_runtime`; the network does not take images, or
            has neither 1 nor 3 channels; the target can't be replaced.
    """
    check_out(out)
    with Container(path) as file:
        header = read_header(file)
    check_takes_images(header, path)
    size = (header["preprocessing"] or {}).get("input_size") or [0]
    if size[0] not in (0, 1, 3):
        raise UserError(
            f"{path} takes images with {size[0]} channels; pass a model with 1 or 3 channels"
        )
    with atomic_write(out) as folder:
        folder.mkdir()
        (folder / "onnxruntime").mkdir()
        copy_runtime(folder / "onnxruntime", runtime)
        repack(path, folder / MODEL)  # decompressed: browsers have no zstd
        export_dynamic(path, folder / GRAPH, codes_as_inputs=True, model=model)
        names = _copy_examples(examples, folder)
        facts = _facts(folder) | {"title": title or header["model"].get("name") or "A network"}
        text = json.dumps(facts | {"examples": names}, ensure_ascii=False, allow_nan=False)
        (folder / MARKER).write_text(text, encoding="utf-8", errors="replace")
        for source in (HERE / "static").iterdir():
            shutil.copyfile(source, folder / source.name)
        loader = FileSystemLoader(HERE / "templates", encoding="utf-8")
        environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
        page = environment.get_template("index.html.j2").render(facts=facts)
        (folder / "index.html").write_text(page, encoding="utf-8", errors="replace")
        return {
            p.relative_to(folder).as_posix(): p.stat().st_size
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }


def _copy_examples(examples: Sequence[Path], folder: Path) -> list[dict[str, str]]:
    (folder / "examples").mkdir()
    names = []
    for i, source in enumerate(examples):
        target = f"examples/{i}{source.suffix.lower()}"  # not every file name is a valid URL
        shutil.copyfile(source, folder / target)
        names.append({"url": target, "name": source.name})
    return names


def _facts(folder: Path) -> dict[str, Any]:
    """Return the data of the page: layout of the packed file, widths, classes, preprocessing."""
    with Container(folder / MODEL) as file:
        header = read_header(file)
        begin = file.data_start + file.entries["plane0"].begin
        stored, plane_bytes = header["stored_bits"], header["codes"] // 8
        checksums = [file.checksums[f"plane{p}"] for p in range(stored)]
        total = file.size
    layers = [
        {"name": layer["name"], "offset": layer["offset"], "shape": layer["shape"]}
        for layer in header["layers"]
    ]
    return {
        "kind": KIND,
        "schema": 1,
        "model": header["model"].get("name"),
        "quantizer": header["prepare"]["quantizer"],
        "classes": class_names(header),
        "preprocessing": header["preprocessing"],
        "widths": sorted(header["norm_widths"]) or list(range(1, stored + 1)),
        "stored_bits": stored,
        "codes": header["codes"],
        "weights": sum(math.prod(layer["shape"]) for layer in layers),
        "layers": layers,
        "file": MODEL,
        "file_bytes": total,
        "planes": {"begin": begin, "bytes": plane_bytes, "sha256": checksums},
        "graph": GRAPH,
        "graph_bytes": (folder / GRAPH).stat().st_size,
    }
