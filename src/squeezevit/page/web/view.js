// What visitors see: made once from the manifest, then drawn anew whenever something is chosen or found.

import { $, Card, answer, bar, featureFigure, make, median, megabytes, near, percent, times } from "./cards.js";
import { featureMap, fit, show } from "./draw.js";
import { Failure } from "./engine.js";
import { fileOf, filesShown, graphOf, state } from "./state.js";

export const ROUNDS = 5;
const FIRST = 0.5; // the share that is shown at first
const REASONS = {
  unreadable: "This file cannot be read as a picture here. JPEG, PNG, WebP and GIF can; HEIC and raw files in few browsers. Nothing was changed.",
  proportions: "One side of this picture is more than a hundred times the other, so its middle says nothing of it. Choose another.",
  memory: "This device gives the page too little memory for the model, even with one graph open at a time. Close other pages and reload this one, or try it on a computer.",
};
let cards = [];
let maps = [];
let bars = [];

export function describe(manifest) {
  const { preprocessing: how, weights, versions } = manifest;
  const [height, width] = how.crop;
  $("title").textContent = manifest.title;
  $("crop").textContent = `${width} × ${height} pixels of it, after resizing`;
  $("memory").textContent = `some ${megabytes(2 * weights.bytes)} for each of the models that take turns`;
  $("precision").textContent = manifest.precision === "int8"
    ? `The linear layers compute in int8, which takes a quarter of the bytes and, where it was measured, half of the time; the unreduced model so keeps a cosine of ${near(manifest.dense.nearness)} to itself in float. Rounding may decide which of two tokens that are nearly as important stays, which moves a photograph\u2019s cosine by some hundredths: methods that are nearer than that are not ranked by it.`
    : "All layers compute in 32-bit floats.";
  const runtime = `onnxruntime-web ${versions["onnxruntime-web"]}`;
  $("built").textContent = `${manifest.title}, ${manifest.precision}, ${megabytes(weights.bytes)} of weights for ${manifest.graphs.length + 1} graphs, run by ${runtime} (MIT licence). Built ${manifest.created.slice(0, 10)} with squeezevit ${versions.squeezevit}.`;
}

export function build(manifest, sample) {
  const shares = [1, ...new Set(manifest.graphs.map((graph) => graph.share))].sort((a, b) => b - a);
  state.shares = shares;
  state.share = shares.includes(FIRST) ? FIRST : shares[Math.min(1, shares.length - 1)];
  Object.assign($("share"), { max: shares.length - 1, value: shares.indexOf(state.share) });
  const ticks = shares.map((share) => make("span", {}, percent(share)));
  ticks.forEach((tick, i) => (tick.style.left = `${(100 * i) / (shares.length - 1)}%`));
  $("share-ticks").replaceChildren(...ticks);
  state.depth = manifest.depth;
  Object.assign($("depth"), { max: manifest.depth, value: manifest.depth });
  $("depth-ticks").replaceChildren(make("span", {}, "photograph"), make("span", {}, `block ${manifest.depth}`));
  cards = manifest.methods.map((method) => new Card(method, manifest));
  for (const card of cards) {
    for (const name of ["pointermove", "pointerdown", "pointerleave"]) card.canvas.addEventListener(name, (event) => pointed(card, event));
    card.canvas.addEventListener("keydown", (event) => walked(card, event));
    card.canvas.addEventListener("blur", () => light(card));
  }
  $("cards").replaceChildren(...cards.map((card) => card.element));
  maps = [featureFigure("Unreduced"), ...manifest.methods.map((method) => featureFigure(method.label, method))];
  $("maps").replaceChildren(...maps.map((map) => map.element));
  bars = [bar("Unreduced"), ...manifest.methods.map((method) => bar(method.label, method))];
  $("bars").replaceChildren(...bars.map((b) => b.element));
  $("samples").replaceChildren(...manifest.photographs.map(sample));
  emptied();
  chosen();
}

/** Nothing is known of this photograph yet. */
export function emptied() {
  for (const card of cards) card.clear();
}

/** The photograph as it will be seen, while its model is still on its way. */
export async function preview(blob) {
  const bitmap = await createImageBitmap(blob);
  const side = Math.min(bitmap.width, bitmap.height);
  const canvas = $("photo");
  fit(canvas, state.manifest.grid);
  const at = [(bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side];
  for (const target of [canvas, ...cards.map((card) => card.canvas)]) {
    fit(target, state.manifest.grid);
    target.getContext("2d").drawImage(bitmap, ...at, 0, 0, target.width, target.height);
  }
}

export function chosen() {
  const index = state.shares.indexOf(state.share);
  $("share").setAttribute("aria-valuetext", `${percent(state.share)} of the multiply-adds`);
  $("share-told").textContent = percent(state.share);
  [...$("share-ticks").children].forEach((tick, i) => tick.classList.toggle("here", i === index));
  for (const card of cards) card.course(graphOf(card.method) ?? null);
  const line = graphOf(state.manifest.methods[0])?.python ?? "sv.restore_(model)  # the original, bit for bit";
  $("python").textContent = `import squeezevit as sv\n\n${line}`;
  drawAll();
}

export function drawAll() {
  $("depth").value = state.depth;
  const told = state.depth === 0 ? "photograph" : `after block ${state.depth} of ${state.manifest.depth}`;
  $("depth-told").textContent = told;
  $("depth").setAttribute("aria-valuetext", told);
  for (const card of cards) drawCard(card);
  $("hatched").hidden = !filesShown().some((file) => state.results.get(file)?.groups.some((groups) => groups.includes(-1)));
  if (!state.photo) return;
  show($("photo"), state.photo.picture, state.manifest.grid, null, `photo ${state.photo.name}`);
  drawMaps();
  drawTimes();
}

function drawCard(card) {
  const { stage, left } = card.at(state.depth);
  const result = state.results.get(fileOf(card.method));
  card.element.classList.toggle("waiting", !result);
  if (!result) return;
  const key = `${state.photo.name} ${fileOf(card.method)} ${stage}`;
  const look = result.looks[stage];
  const group = look && card.patch !== undefined ? look.groups[card.patch] : -1;
  show(card.canvas, state.photo.picture, state.manifest.grid, look, key, group);
  card.tell(card.patch === undefined ? null : !look ? 1 : group < 0 ? 0 : look.sizes[group]);
  const dropped = stage < 0 ? 0 : result.groups[stage].filter((g) => g < 0).length;
  card.canvas.setAttribute("aria-label", `${card.method.label}: ${left} tokens are left${dropped ? `, ${dropped} patches were thrown away` : ""}`);
  card.cosine.textContent = near(result.cosine);
  card.answer.textContent = answer(result.features, state.manifest.classes);
}

/** Light up the token that a patch has become. */
function pointed(card, event) {
  const [rows, columns] = state.manifest.grid;
  const { width, height } = card.canvas.getBoundingClientRect();
  const [row, column] = [Math.floor((event.offsetY * rows) / height), Math.floor((event.offsetX * columns) / width)];
  const inside = event.type !== "pointerleave" && row >= 0 && row < rows && column >= 0 && column < columns;
  light(card, inside ? row * columns + column : undefined);
}

/** The same by keys: arrows go from patch to patch, from the middle on. */
function walked(card, event) {
  const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
  if (!down && !right) return event.key === "Escape" && light(card);
  event.preventDefault();
  const [rows, columns] = state.manifest.grid;
  const at = card.patch ?? Math.floor(rows / 2) * columns + Math.floor(columns / 2);
  const [row, column] = [Math.floor(at / columns) + down, (at % columns) + right];
  if (row >= 0 && row < rows && column >= 0 && column < columns) light(card, row * columns + column);
}

function light(card, patch) {
  card.patch = patch;
  drawCard(card);
}

function drawMaps() {
  const files = filesShown();
  files.forEach((file, i) => {
    const result = state.results.get(file);
    maps[i].element.classList.toggle("waiting", !result);
    if (!result) return;
    featureMap(maps[i].canvas, result.map, result.groups.at(-1) ?? null, state.manifest.grid);
    maps[i].told.textContent = i ? near(result.patchCosine) : "";
    maps[i].canvas.setAttribute("aria-label", `${i ? state.manifest.methods[i - 1].label : "Unreduced"}: features, mean cosine of patch tokens ${near(result.patchCosine)}`);
  });
}

export function drawTimes() {
  const of = (file) => state.taken.get(file) ?? [];
  const files = filesShown();
  const longest = Math.max(1, ...files.filter((file) => of(file).length).map((file) => median(of(file))));
  files.forEach((file, i) => bars[i].fill(of(file), longest));
  const dense = of(files[0]);
  cards.forEach((card, i) => {
    const own = of(files[i + 1]);
    card.speed.textContent = own.length && dense.length ? times(median(dense) / median(own)) : "–";
  });
  const said = sentence(files, of);
  if ($("result").textContent !== said) $("result").textContent = said; // it is read aloud
}

/** What was found, in one sentence. */
function sentence(files, of) {
  const result = state.results.get(files[1]);
  if (!result) return "\u00a0";
  const first = state.manifest.methods[0];
  if (state.share === 1) return "All of the work: every patch is a token to the end. Move the slider.";
  const work = { 0.5: "half of the work", 0.25: "a quarter of the work" }[state.share] ?? `${percent(state.share)} of the work`;
  const fast = of(files[1]).length >= ROUNDS && of(files[0]).length >= ROUNDS ? ` is ${times(median(of(files[0])) / median(of(files[1])))} as fast here, and` : "";
  return `With ${work} ${first.label}${fast} keeps a cosine of ${near(result.cosine)} to the unreduced features.`;
}

export function redraw() {
  for (const canvas of document.querySelectorAll("canvas")) delete canvas.dataset.key;
  if (state.photo) drawAll();
}

export function loading(on, done = 0, of = 1) {
  $("loading").hidden = !on;
  $("progress").value = done / of;
  $("loading-told").textContent = done < of ? `Fetching the model once: ${megabytes(done)} of ${megabytes(of)}` : "Opening the model …";
}

export function machine() {
  const { threads } = state.engine;
  const cores = navigator.hardwareConcurrency || 1;
  const more = threads === 1 && cores > 1 && navigator.serviceWorker?.controller ? " Reload the page to use more of them." : "";
  $("machine").textContent = `WebAssembly on ${threads === 1 ? "one thread" : `${threads} threads`} of ${cores}; ${ROUNDS} rounds; one photograph at a time.${more}`;
}

export function problem(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text;
  if (text) loading(false);
}

export function failed(error) {
  const known = error instanceof Failure;
  problem(REASONS[error.message] ?? `${known ? "The model could not be run" : "Something went wrong on this page"}: ${error.message}. Reload the page to try again.`);
  if (!known) console.error(error);
}
