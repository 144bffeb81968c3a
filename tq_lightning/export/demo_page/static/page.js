import { env, InferenceSession, Tensor } from "./onnxruntime/ort.wasm.min.mjs";
import { addPlane, firstPlanes, loadPlanes } from "./planes.js";
import { preprocess } from "./preprocess.js";

const TOP = 5;
const TINY = 64; // pixels; smaller pictures are shown without smoothing

const $ = (id) => document.getElementById(id);
const slider = $("width");
const bytes = (n) => (n < 1e3 ? `${n} B` : n < 1e6 ? `${(n / 1e3).toPrecision(3)} kB` : `${(n / 1e6).toPrecision(3)} MB`);
const percent = (p) => `${(100 * p).toFixed(1)} %`;
const bits = (n) => `${n} bit${n === 1 ? "" : "s"}`;

let facts, session, codes, feeds;
let loaded = 0; // planes
let followPlanes = true; // the width grows with the planes until the user moves the slider
let picture = null; // input of the network
let turn = 0; // number of the picture or plane that the running computation belongs to

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").className = isError ? "error" : "soft";
  if (isError) document.body.dataset.state = "error";
}

const usable = () => facts.widths.filter((n) => n <= loaded);
const width = () => Number(slider.value);

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

// ---- widths and planes

function drawPlanes() {
  const count = facts.stored_bits;
  document.documentElement.style.setProperty("--planes", count);
  for (let p = 0; p < count; p++) {
    const plane = element("div", "", "plane");
    plane.append(element("i"), element("b", String(p + 1)));
    $("planes").append(plane);
  }
}

function showPlanes(arrived = loaded * facts.planes.bytes) {
  const size = facts.planes.bytes || 1;
  [...$("planes").children].forEach((plane, p) => {
    const part = Math.min(1, Math.max(0, arrived / size - p));
    plane.firstChild.style.height = `${100 * part}%`;
    plane.classList.toggle("full", part === 1);
    plane.classList.toggle("used", p < width());
    plane.classList.toggle("none", !facts.widths.includes(p + 1));
  });
  const used = width() * size;
  $("loaded").textContent = `Uses ${bytes(used)} of weights, ${bytes(arrived)} of ${bytes(size * facts.stored_bits)} loaded`;
}

/** Move the slider to the nearest width that is there. */
function setWidth(wanted) {
  const choices = usable();
  if (!choices.length) return;
  const near = choices.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
  slider.value = near;
  slider.setAttribute("aria-valuetext", bits(near));
  $("width-out").textContent = bits(near);
  showPlanes();
  for (const row of $("every").children) {
    row.setAttribute("aria-current", String(Number(row.dataset.bits) === near));
  }
}

// ---- predictions

async function run(n) {
  const images = new Tensor("float32", picture, [1, ...facts.preprocessing.input_size]);
  const width = new Tensor("int64", [BigInt(n)], []);
  const start = performance.now();
  const { logits } = await session.run({ images, bits: width, ...feeds });
  const time = performance.now() - start;
  const top = Math.max(...logits.data);
  const powers = Array.from(logits.data, (x) => Math.exp(x - top));
  const sum = powers.reduce((a, b) => a + b, 0);
  const ranked = powers.map((p, i) => [i, p / sum]).sort((a, b) => b[1] - a[1]);
  return { ranked, time };
}

const className = (i) => facts.classes[i] ?? `class ${i}`;

function showPrediction({ ranked }) {
  $("prediction").replaceChildren(...ranked.slice(0, TOP).map(([i, p]) => {
    const row = element("li"), bar = element("i");
    bar.style.width = `${100 * p}%`;
    row.append(bar, element("span", className(i)), element("span", percent(p), "n"));
    return row;
  }));
}

function emptyRow(n) {
  const row = element("tr");
  row.dataset.bits = n;
  const head = element("td"), button = element("button", String(n));
  button.type = "button";
  button.setAttribute("aria-label", `Show ${bits(n)}`);
  head.append(button);
  row.append(head, element("td", "…"), element("td", "", "n"), element("td", bytes(n * facts.planes.bytes), "n"), element("td", "", "n"));
  row.addEventListener("click", () => choose(n));
  return row;
}

function fillRow(n, { ranked, time }) {
  const row = [...$("every").children].find((r) => Number(r.dataset.bits) === n);
  const [[best, p]] = ranked;
  row.dataset.class = best;
  row.dataset.probability = p;
  const cells = row.children;
  cells[1].textContent = className(best);
  cells[2].textContent = percent(p);
  cells[4].textContent = `${time < 10 ? time.toFixed(1) : Math.round(time)} ms`;
  const widest = $("every").querySelector("tr:last-child").dataset.class;
  for (const r of $("every").children) {
    r.classList.toggle("different", widest !== undefined && r.dataset.class !== undefined && r.dataset.class !== widest);
  }
}

/** Run the width in use first, then all others whose planes are there. */
async function predict(mine) {
  if (mine !== turn || !picture || !session || !usable().length) return;
  try {
    const first = width();
    for (const n of [first, ...usable().filter((x) => x !== first)]) {
      const result = await run(n);
      await new Promise((resume) => setTimeout(resume)); // lets the page take input
      if (mine !== turn) return;
      if (n === first) showPrediction(result);
      fillRow(n, result);
    }
    if (loaded === facts.stored_bits) document.body.dataset.state = "ready";
    say("");
  } catch (error) {
    say(`ONNX Runtime Web could not run the network: ${error.message}`, true);
  }
}

// Runs of one session must not overlap.
let queue = Promise.resolve();
function schedule() {
  const mine = ++turn;
  queue = queue.then(() => predict(mine));
}

function choose(n) {
  followPlanes = false;
  setWidth(n);
  schedule();
}

// ---- pictures

async function show(blob, name) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    say(`${name} can't be read as an image.`, true);
    return;
  }
  const canvas = $("preview");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  canvas.classList.toggle("tiny", Math.max(bitmap.width, bitmap.height) <= TINY);
  canvas.hidden = false;
  $("drop").classList.add("filled");
  $("picture-name").textContent = `${name}, ${bitmap.width} × ${bitmap.height}`;
  picture = preprocess(context.getImageData(0, 0, bitmap.width, bitmap.height), facts.preprocessing);
  document.body.dataset.state = "loading";
  $("every").replaceChildren(...facts.widths.map(emptyRow));
  setWidth(width());
  schedule();
}

async function showExample(example, button) {
  for (const other of $("examples").children) other.setAttribute("aria-pressed", String(other === button));
  const answer = await fetch(example.url);
  await show(await answer.blob(), example.name);
}

function listen() {
  const drop = $("drop");
  const take = (files) => {
    for (const other of $("examples").children) other.setAttribute("aria-pressed", "false");
    if (files?.length) show(files[0], files[0].name);
  };
  $("file").addEventListener("change", (event) => take(event.target.files));
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") take(event.dataTransfer.files);
    });
  }
  slider.addEventListener("input", () => choose(width()));
  for (const example of facts.examples) {
    const button = element("button"), image = element("img");
    button.type = "button";
    image.src = example.url;
    image.alt = example.name;
    image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth <= TINY));
    button.append(image);
    button.addEventListener("click", () => showExample(example, button));
    $("examples").append(button);
  }
}

// ---- start

async function start() {
  say("Loading ONNX Runtime Web and the graph …");
  facts = await (await fetch("demo.json")).json();
  codes = new Uint8Array(facts.codes);
  feeds = Object.fromEntries(facts.layers.map(({ name, offset, shape }) => {
    const count = shape.reduce((a, b) => a * b, 1);
    return [name, new Tensor("uint8", codes.subarray(offset, offset + count), shape)];
  }));
  const narrowest = firstPlanes(facts);
  drawPlanes();
  showPlanes(0);
  listen();
  $("facts").textContent = `${facts.model ?? "network"}, ${facts.quantizer} codes, ${facts.weights.toLocaleString("en")} quantized weights. Packed file ${bytes(facts.file_bytes)}, graph ${bytes(facts.graph_bytes)}.`;
  env.wasm.numThreads = 1; // more need headers that a plain file server does not send
  env.wasm.wasmPaths = new URL("onnxruntime/", document.baseURI).href;
  const graph = InferenceSession.create(facts.graph, { executionProviders: ["wasm"] }).then((made) => {
    session = made;
    const names = new Set(made.inputNames); // a tied tensor has the input of another
    feeds = Object.fromEntries(Object.entries(feeds).filter(([name]) => names.has(name)));
    if (document.body.dataset.state === "error") return; // the planes did not arrive
    say(picture ? "" : "Ready. Choose an image.");
    schedule();
  });
  const planes = loadPlanes(facts, narrowest, showPlanes, (p, plane) => {
    addPlane(codes, plane, p, facts.stored_bits);
    loaded = p + 1;
    if (loaded < narrowest) return;
    slider.disabled = false;
    setWidth(followPlanes ? loaded : width());
    schedule();
  });
  if (facts.examples.length) showExample(facts.examples[0], $("examples").firstChild);
  const [, ranges] = await Promise.all([graph, planes]);
  $("facts").textContent += ranges ? " The server sent the planes one by one." : " The server does not support range requests and sent the whole file.";
  document.body.dataset.ranges = ranges;
}

start().catch((error) => say(`The page can't be started: ${error.message}`, true));
