"""The demo page: its files, and its predictions in headless Chromium against PyTorch."""

import importlib
import io
import json
import os
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.browser import CHROMIUM, Browser
from PIL import Image
from timm.data import create_transform

from tq_lightning import bit_width, calibrate_norms, load_packed, prepare, save_packed
from tq_lightning.cli import main
from tq_lightning.cli.demo_page import _examples
from tq_lightning.errors import UserError
from tq_lightning.export.demo_page import runtime, write
from tq_lightning.export.packed.container import Container
from tq_lightning.export.packed.edit import repack
from tq_lightning.quant.bit_planes import unpack_planes

ROOT = Path(__file__).parents[3]
DIGITS = ROOT / "results" / "digits_example"
CIFAR = ROOT.parent / "shared"
if not CIFAR.is_dir():
    CIFAR = Path(os.environ.get("TQ_SHARED", CIFAR))


@pytest.fixture
def no_runtime(tmp_path):
    """Create a folder with empty files in place of ONNX Runtime Web."""
    folder = tmp_path / "ort"
    folder.mkdir()
    for name in runtime.FILES:
        (folder / name).write_bytes(b"")
    return folder


def demo(model, out, *more):
    return main(["demo-page", str(model), "--out", str(out), *map(str, more)])


@pytest.mark.slow
def test_page_is_self_contained_and_can_be_rewritten(no_runtime, tmp_path, capsys):
    out = tmp_path / "page"
    more = ["--images", DIGITS / "images", "--onnxruntime-web", no_runtime, "--title", "<i>Digits"]
    for _ in range(2):
        assert demo(DIGITS / "model.safetensors", out, *more) == 0
    assert f"python -m http.server --directory {out}" in capsys.readouterr().out
    facts = json.loads((out / write.MARKER).read_text())
    assert facts["widths"] == list(range(1, 9)) and len(facts["examples"]) == 10
    named = [facts["file"], facts["graph"], *(e["url"] for e in facts["examples"])]
    named += [f"onnxruntime/{name}" for name in runtime.FILES]
    named += ["index.html", "page.js", "page.css", "planes.js", "preprocess.js"]
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == {
        *named,
        write.MARKER,
    }
    page = (out / "index.html").read_text()
    assert "&lt;i&gt;Digits" in page and "<i>Digits" not in page
    for text in (page, *((out / name).read_text() for name in ("page.js", "page.css"))):
        assert "http:" not in text and "https:" not in text and "//" not in text.replace("// ", "")
    raw = (out / facts["file"]).read_bytes()
    begin, size = facts["planes"]["begin"], facts["planes"]["bytes"]
    assert begin + size * facts["stored_bits"] == len(raw) == facts["file_bytes"]
    with Container(DIGITS / "model.safetensors") as file:
        assert raw[begin : begin + size] == file.read("plane0")["plane0"].tobytes()


def test_own_network_gets_a_page_if_its_factory_is_named(no_runtime, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_images.py").write_text(
        "from torch import nn\n"
        "def net(num_classes=3):\n"
        "    parts = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()\n"
        "    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)\n"
        "    return nn.Sequential(*parts, *head)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = importlib.import_module("own_images").net()
    prepare(model, verbose=False)
    calibrate_norms(model, [torch.randn(8, 3, 8, 8)])
    seen = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}
    save_packed(model, "m", name="own_images:net", preprocessing=seen)
    more = ["--onnxruntime-web", no_runtime]
    assert demo("m", "page", *more) == 2
    assert "pass --model.name own_images:net" in capsys.readouterr().err
    assert demo("m", "page", "--model.name", "own_images:net", *more) == 0
    assert json.loads((tmp_path / "page" / write.MARKER).read_text())["title"] == "own_images:net"
    more += ["--model.name", "own_images:net", "--title", "caf\udce9"]  # as a name in Latin-1
    assert demo("m", "page", *more) == 0
    assert "caf?" in (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "page" / write.MARKER).read_text())["title"] == "caf?"


@pytest.mark.slow
@pytest.mark.parametrize("source", ["digits", "compressed, 4 planes"])
def test_graph_runs_on_the_planes_loaded_so_far(source, no_runtime, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    path = DIGITS / "model.safetensors"
    if source != "digits":
        path = tmp_path / "narrow.safetensors"
        repack(DIGITS / "model.safetensors", path, max_bits=4, compress=True)
    demo(path, tmp_path / "page", "--onnxruntime-web", no_runtime)
    facts = json.loads((tmp_path / "page" / write.MARKER).read_text())
    session = ort.InferenceSession(str(tmp_path / "page" / "graph.onnx"))
    raw = np.fromfile(tmp_path / "page" / facts["file"], np.uint8)[facts["planes"]["begin"] :]
    planes = np.split(raw, facts["stored_bits"])
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = load_packed(path)

    def run(bits, arrived):
        row = unpack_planes(planes[:arrived], facts["codes"])
        row <<= facts["stored_bits"] - arrived
        feeds = {"images": images.numpy(), "bits": np.array(bits)}
        for layer in facts["layers"]:
            begin, count = layer["offset"], int(np.prod(layer["shape"]))
            feeds[layer["name"]] = row[begin : begin + count].reshape(layer["shape"])
        return session.run(None, feeds)[0]

    for bits in facts["widths"]:
        with torch.no_grad(), bit_width(model, bits):
            expected = model(images).numpy()
        for arrived in {bits, facts["stored_bits"]}:
            np.testing.assert_allclose(run(bits, arrived), expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(run(4, 3), run(4, 4), atol=1e-3)  # one plane too few changes the network


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["missing.safetensors", "--out", "x"], "no file missing.safetensors"),
        (["{model}"], "required: --out"),
        (["{model}", "--out", "{model}"], "is a file"),
        (["{model}", "--out", "full"], "is not a demo page"),
        (["{model}", "--out", "x", "--onnxruntime-web", "full"], "full has no ort.wasm.min.mjs"),
        (["{model}", "--out", "x", "--images", "nowhere"], "no image or folder nowhere"),
        (["{model}", "--out", "x", "--images", "full"], "no images found"),
        (["{model}", "--out", "x", "--images", "tiff"], "no image that browsers display"),
        (["{model}", "--out", "no/where/x", "--onnxruntime-web", "{ort}"], "no folder no/where"),
        (["full/notes.safetensors", "--out", "x"], "is not a packed file"),
        (["five.safetensors", "--out", "x"], "images with 5 channels"),
        (["sizeless.safetensors", "--out", "x"], "has no input size"),
        (["{model}", "--out", "x", "--imags", "y"], "did you mean --images"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    argv, message, no_runtime, net, make, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/notes.safetensors").write_text("no model")
    Path("tiff").mkdir()
    Image.new("L", (2, 2)).save("tiff/a.tiff")
    if argv[0] in ("five.safetensors", "sizeless.safetensors"):
        size = {"input_size": [5, 32, 32]} if argv[0] == "five.safetensors" else {}
        save_packed(net[0], argv[0], preprocessing=size)
    before = sorted(Path().rglob("*"))
    names = {"model": DIGITS / "model.safetensors", "ort": no_runtime}
    assert main(["demo-page", *(a.format(**names) for a in argv)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert sorted(Path().rglob("*")) == before


def test_unreadable_examples_are_skipped(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"no image can be read \(.*a\.png"):
        _examples(tmp_path)
    for name in "bcdefghijklmno":
        Image.new("L", (2, 2)).save(tmp_path / f"{name}.png")
    assert [path.stem for path in _examples(tmp_path)] == list("bcdefghijklm")
    error = capsys.readouterr().err
    assert error.startswith("skipped 1 examples, e.g. ") and error.count("\n") == 1
    (tmp_path / "a.png").unlink()
    assert len(_examples(tmp_path)) == 12 and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "npm is not installed"),
        ("echo npm error code E404 >&2; echo npm error 404 Not Found >&2; exit 1", "404 Not Found"),
        ("exit 0", "exit status 0"),
        ("sleep 5", "did not download"),
        ("tar czf x.tgz --files-from /dev/null", "has no ort.wasm.min.mjs"),
    ],
)
def test_npm_failure_is_an_error_of_one_line(script, message, tmp_path, monkeypatch, capsys):
    tools = tmp_path / "bin"
    tools.mkdir()
    if script is not None:
        (tools / "npm").write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
        (tools / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(runtime, "SECONDS", 1)
    assert demo(DIGITS / "model.safetensors", tmp_path / "page") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert (
        len(lines) == 1
        and message in lines[0]
        and "--onnxruntime-web" in lines[0] + ("--onnxruntime-web" if "has no" in message else "")
    )
    assert [p.name for p in tmp_path.iterdir()] == ["bin"]


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js on this machine")
def test_page_waits_for_no_more_planes_than_the_file_has(tmp_path):
    source = shutil.copy(write.HERE / "static" / "planes.js", tmp_path / "planes.mjs").as_uri()
    cases = [[1, [1]], [2, [1, 2]], [8, [1, 2, 8]], [8, [4, 8]]]  # stored planes, widths
    script = (
        f"import(process.argv[1]).then(m => console.log(JSON.stringify({json.dumps(cases)}.map("
        "([stored_bits, widths]) => m.firstPlanes({stored_bits, widths})))))"
    )
    command = ["node", "-e", script, source]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert json.loads(out) == [1, 2, 2, 4]


class Server(ThreadingHTTPServer):
    """Serve static files with or without range requests, and record every request."""

    def __init__(self, folder, ranges=True):
        self.ranges, self.seen = ranges, []
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        requested = self.headers.get("Range")
        self.server.seen.append((self.path, requested))
        if requested is None or not self.server.ranges:
            return super().do_GET()
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            return self.send_error(404)
        raw = file.read_bytes()
        begin, end = (int(x) for x in requested.removeprefix("bytes=").split("-"))
        part = raw[begin : end + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{begin + len(part) - 1}/{len(raw)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """Download the files of ONNX Runtime Web once. Return their folder."""
    folder = tmp_path_factory.mktemp("web")
    given = os.environ.get("TQ_ONNXRUNTIME_WEB")
    try:
        runtime.copy_runtime(folder, Path(given) if given else None)
    except ValueError as error:
        pytest.skip(f"no ONNX Runtime Web: {error}")
    return folder


@pytest.fixture(scope="module")
def digits(web, tmp_path_factory):
    """Write the page of the digits network once."""
    out = tmp_path_factory.mktemp("digits") / "page"
    more = ["--images", DIGITS / "images", "--onnxruntime-web", web]
    assert demo(DIGITS / "model.safetensors", out, *more) == 0
    return out


@pytest.fixture
def page(digits, tmp_path):
    """Return a copy of that page that a test may change."""
    return Path(shutil.copytree(digits, tmp_path / "page"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory, request):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    made = Browser(tmp_path_factory.mktemp("profile"), ("http://127.0.0.1", "blob:", "about:"))
    request.addfinalizer(made.close)
    return made


@pytest.fixture
def serve(browser, request):
    def start(folder, ranges=True):
        server = Server(folder, ranges)
        request.addfinalizer(server.shutdown)
        browser.events.clear()
        browser.open(server.url)
        return server

    return start


READY = "document.body.dataset.state"
WAIT = (
    "new Promise((resume, fail) => {{ const end = Date.now() + 60000; (function look() {{ "
    "const value = {0}; if (value) resume(value); "
    "else if (Date.now() > end) fail(document.getElementById('status').textContent); "
    "else setTimeout(look, 20); }})(); }})"
)
ROWS = (
    "[...document.querySelectorAll('#every tr')].map(r => "
    "[Number(r.dataset.bits), Number(r.dataset.class), Number(r.dataset.probability)])"
)
DROP = (
    "fetch({!r}).then(a => a.blob()).then(blob => {{ const data = new DataTransfer(); "
    "data.items.add(new File([blob], {!r}, {{type: 'image/png'}})); "
    "document.dispatchEvent(new DragEvent('drop', {{dataTransfer: data, cancelable: true}})); }})"
)


def wait(browser, condition):
    return browser.run(WAIT.format(condition))


def drop(browser, image, folder):
    """Drop a file on the page; the server of the page delivers it."""
    (folder / image.name).write_bytes(image.read_bytes())
    browser.run(DROP.format(image.name, image.name))
    shown = f"document.getElementById('picture-name').textContent.startsWith({image.name!r})"
    wait(browser, f"{shown} && {READY} === 'ready'")


def expected(model, image):
    """Return (bits, class, probability) of an image in PyTorch, preprocessed by timm."""
    options = dict(model.tq_file["preprocessing"])
    with Image.open(image) as picture:
        pixels = create_transform(**options)(picture.convert("RGB"))
    rows = []
    for bits in range(1, 9):
        with torch.no_grad(), bit_width(model, bits):
            probabilities = model(pixels[None]).softmax(1)[0]
        rows.append((bits, int(probabilities.argmax()), float(probabilities.max())))
    return rows


def assert_same(shown, wanted):
    assert [row[:2] for row in shown] == [list(row[:2]) for row in wanted]
    np.testing.assert_allclose([r[2] for r in shown], [r[2] for r in wanted], atol=2e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestChromium:
    @pytest.mark.parametrize("ranges", [True, False])
    def test_digits_at_every_width(self, ranges, page, browser, serve):
        server = serve(page, ranges)
        assert wait(browser, f"{READY} === 'ready'")
        assert browser.run("document.body.dataset.ranges") == str(ranges).lower()
        model = load_packed(DIGITS / "model.safetensors")
        images = sorted((DIGITS / "images").iterdir())
        assert_same(browser.run(ROWS), expected(model, images[0]))  # the first example
        for image in images[1:]:
            drop(browser, image, page)
            assert_same(browser.run(ROWS), expected(model, image))
        requested = [r for path, r in server.seen if path == "/model.safetensors"]
        facts = json.loads((page / write.MARKER).read_text())
        begin, size = facts["planes"]["begin"], facts["planes"]["bytes"]
        first = [f"bytes={begin}-{begin + 2 * size - 1}"]
        each = [f"bytes={begin + p * size}-{begin + (p + 1) * size - 1}" for p in range(2, 8)]
        assert requested == (first + each if ranges else first)
        assert browser.problems() == []

    def test_slider_table_and_plane_bars_stay_in_sync(self, page, browser, serve):
        serve(page)
        assert wait(browser, f"{READY} === 'ready'")
        used = "document.querySelectorAll('.plane.used').length"
        assert browser.run(used) == 8  # the width is that of the planes
        browser.run("document.getElementById('width').focus()")
        for _ in range(6):
            browser.key("ArrowLeft", 37)
        assert browser.run(used) == 2
        assert browser.run("document.getElementById('width-out').textContent") == "2 bits"
        browser.run("document.querySelector('#every tr:nth-child(4)').click()")
        assert browser.run("document.getElementById('width').value") == "4"
        assert "Uses 36.9 kB" in browser.run("document.getElementById('loaded').textContent")
        best = browser.run("document.querySelector('#prediction li').textContent")
        assert best.startswith("0")

    def test_invalid_images_and_missing_files(self, page, browser, serve):
        serve(page)
        status = "document.getElementById('status').textContent"
        wait(browser, f"{READY} === 'ready'")
        (page / "dropped").write_bytes(b"no picture")
        browser.run(DROP.format("dropped", "notes.png"))
        wait(browser, f'{status} === "notes.png can\'t be read as an image."')
        (page / "model.safetensors").unlink()
        serve(page)
        wait(browser, f"{status}.includes('the server returned 404 for model.safetensors')")

    def test_damaged_plane(self, page, browser, serve):
        raw = bytearray((page / "model.safetensors").read_bytes())
        raw[-1] ^= 1
        (page / "model.safetensors").write_bytes(raw)
        serve(page)
        status = "document.getElementById('status').textContent"
        wait(browser, f"{status}.includes('plane 7 does not match its checksum')")

    def test_preprocessing_equals_timm(self, page, browser, serve):
        """Every value, over crops, filters and shapes: upscaled, downscaled, padded, gray."""
        serve(page)
        noise = np.random.default_rng(0)
        shapes = [(8, 8), (50, 37), (33, 70), (5, 9), (64, 64)]
        files = []
        for i, (h, w) in enumerate(shapes):
            pixels = noise.integers(0, 256, (h, w, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(page / f"{i}.png")
            files.append(f"{i}.png")
        call = (
            "(async () => {{ const {{ preprocess }} = await import('./preprocess.js'); "
            "const blob = await (await fetch({!r})).blob(); "
            "const bitmap = await createImageBitmap(blob, {{colorSpaceConversion: 'none'}}); "
            "const canvas = new OffscreenCanvas(bitmap.width, bitmap.height); "
            "const context = canvas.getContext('2d'); context.drawImage(bitmap, 0, 0); "
            "const pixels = context.getImageData(0, 0, bitmap.width, bitmap.height); "
            "return [...preprocess(pixels, {})]; }})()"
        )
        filters = ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box")
        cases = [
            *product(filters, ("center",), (0.875,), ((3, 16, 16),)),
            *product(("bicubic",), ("center", "squash", "border"), (0.9, 1.0),
                     ((3, 16, 16), (3, 10, 14))),
            ("bilinear", "center", 1.0, (1, 12, 12)),
        ]  # fmt: skip
        for (interpolation, mode, part, size), file in product(cases, files):
            options = {
                "input_size": list(size),
                "interpolation": interpolation,
                "crop_mode": mode,
                "crop_pct": part,
                "mean": [0.485, 0.456, 0.406][: size[0]],
                "std": [0.229, 0.224, 0.225][: size[0]],
            }
            with Image.open(page / file) as picture:
                wanted = create_transform(**options)(
                    picture.convert("L" if size[0] == 1 else "RGB")
                )
            got = np.float32(browser.run(call.format(file, json.dumps(options))))
            assert np.array_equal(got, wanted.numpy().reshape(-1)), (options, file)

    def test_narrow_window_does_not_scroll_sideways(self, page, browser, serve):
        serve(page)
        wait(browser, f"{READY} === 'ready'")
        size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.send("Emulation.setDeviceMetricsOverride", **size)
        assert browser.run("document.documentElement.scrollWidth") <= 390
        browser.send("Emulation.clearDeviceMetricsOverride")

    def test_cifar_network_on_test_images(self, web, browser, serve, tmp_path):
        """A ResNet-20 after a few joint steps from float weights, on PNG copies of test images."""
        if not (CIFAR / "data" / "cifar10" / "test.tar").is_file():
            pytest.skip(f"no CIFAR-10 under {CIFAR}")
        path, images = trained_cifar(tmp_path)
        page = tmp_path / "page"
        demo(path, page, "--onnxruntime-web", web)
        serve(page)
        wait(browser, "document.getElementById('status').textContent.startsWith('Ready.')")
        model = load_packed(path)
        for image in images:
            drop(browser, image, page)
            assert_same(browser.run(ROWS), expected(model, image))


def trained_cifar(folder, steps=16, count=20):
    """Return a packed ResNet-20 after a few joint steps, and PNG test images (label_number)."""
    from timm.data.readers import create_reader

    from tq_lightning.models import create_model
    from tq_lightning.models.weights import load_weights

    options = {
        "input_size": [3, 32, 32],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    transform = create_transform(**options)

    def read(split, picks):
        reader = create_reader("", str(CIFAR / "data" / "cifar10" / f"{split}.tar"))
        for i in picks:
            source, label = reader[i]
            yield Image.open(io.BytesIO(source.read())).convert("RGB"), label

    torch.manual_seed(0)
    model = create_model("resnet20_cifar", num_classes=10)
    load_weights(model, CIFAR / "weights" / "resnet20_cifar10_fp32.th")
    prepare(model, verbose=False)
    train = [(transform(i), label) for i, label in read("train", range(0, 50000, 65))]
    pixels = torch.stack([image for image, _ in train])
    labels = torch.tensor([label for _, label in train])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(labels), (64,))
        for bits in (8, 4, 2, 1):
            with bit_width(model, bits):
                torch.nn.functional.cross_entropy(model(pixels[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    calibrate_norms(model, pixels.split(128))
    path = folder / "cifar.safetensors"
    save_packed(model, path, preprocessing=options)
    images = []
    for i, (image, label) in enumerate(read("test", range(7, 10000, 10000 // count))):
        images.append(folder / f"{label}_{i}.png")
        image.save(images[-1])
    return path, images
