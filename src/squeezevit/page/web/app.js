// The page: what visitors choose, what is computed for it, and what they see.

import { $, Card, answer, bar, featureFigure, make, median, megabytes, near, percent, times } from "./cards.js";
import { featureMap, fit, looks, picture, show } from "./draw.js";
import { Engine, Failure, lacking } from "./engine.js";

const ROUNDS = 5;
const STEP = 420; // milliseconds that a block stays while it is played
const FIRST = 0.5; // the share that is shown at first
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const REASONS = {
  unreadable: "This file cannot be read as a picture here. JPEG, PNG, WebP and GIF can; HEIC and raw files in few browsers. Nothing was changed.",
  proportions: "One side of this picture is more than a hundred times the other, so its middle says nothing of it. Choose another.",
  memory: "This device gives the page too little memory for the model, even with one graph open at a time. Close other pages and reload this one, or try it on a computer.",
};
const state = { manifest: null, engine: null, photo: null, share: 1, depth: 0, results: new Map(), taken: new Map(), turn: 0, playing: 0 };
let cards = [];
let maps = [];
let bars = [];

$("stuck").remove();
start().catch(failed);

async function start() {
  const missing = lacking();
  if (missing) return problem(missing);
  state.manifest = await (await found("model/manifest.json")).json();
  describe(state.manifest);
  build(state.manifest);
  listen();
  loading(true, 0, state.manifest.weights.bytes);
  const keeping = kept();
  const first = choose(0); // the photograph is there before its model
  await keeping;
  state.engine = new Engine(state.manifest, (done, of) => loading(true, done, of));
  await state.engine.start();
  loading(false);
  machine();
  const blob = await first;
  if (blob) await take(blob, state.manifest.photographs[0].title, state.manifest.photographs[0].credit);
  else $("about-photo").textContent = "Choose a photograph to begin.";
  navigator.serviceWorker?.controller?.postMessage("keep");
  play();
}

async function found(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Failure(`the server has no ${path} (${response.status})`);
  return response;
}

/** Wait, but not for long, until the page is kept for the next time, so that the model is fetched once. */
async function kept() {
  const worker = navigator.serviceWorker;
  if (!worker) return;
  worker.addEventListener("message", ({ data }) => {
    if (data.kept) $("offline").textContent = "All of it is kept by now: it works without a network.";
  });
  try {
    await worker.register("sw.js");
    if (worker.controller) return;
    const ready = new Promise((resolve) => worker.addEventListener("controllerchange", resolve, { once: true }));
    await Promise.race([ready, new Promise((resolve) => setTimeout(resolve, 4000))]);
  } catch {
    // without one the page works as long as there is a network
  }
}

// what is there

function describe(manifest) {
  const { preprocessing: how, weights, versions } = manifest;
  const [height, width] = how.crop;
  $("title").textContent = manifest.title;
  $("crop").textContent = `${width} × ${height} pixels of it, after resizing`;
  $("memory").textContent = `some ${megabytes(2 * weights.bytes)} for each of the models that take turns`;
  $("precision").textContent = manifest.precision === "int8"
    ? `The linear layers compute in int8, which takes a quarter of the bytes and about half of the time here; the unreduced model so keeps a cosine of ${near(manifest.dense.nearness)} to itself in float. Rounding may decide which of two tokens that are nearly as important stays, which moves a photograph\u2019s cosine by some hundredths.`
    : "All layers compute in 32-bit floats.";
  const runtime = `onnxruntime-web ${versions["onnxruntime-web"]}`;
  $("built").textContent = `${manifest.title}, ${manifest.precision}, ${megabytes(weights.bytes)} of weights for ${manifest.graphs.length + 1} graphs, run by ${runtime} (MIT licence). Built ${manifest.created.slice(0, 10)} with squeezevit ${versions.squeezevit}.`;
  $("hatched").hidden = !manifest.methods.some((method) => method.key === "topk");
}

function build(manifest) {
  const shares = [1, ...new Set(manifest.graphs.map((graph) => graph.share))].sort((a, b) => b - a);
  state.shares = shares;
  state.share = shares.includes(FIRST) ? FIRST : shares[Math.min(1, shares.length - 1)];
  Object.assign($("share"), { max: shares.length - 1, value: shares.indexOf(state.share) });
  $("share-ticks").replaceChildren(...shares.map((share) => make("span", {}, percent(share))));
  state.depth = manifest.depth;
  Object.assign($("depth"), { max: manifest.depth, value: manifest.depth });
  $("depth-ticks").replaceChildren(make("span", {}, "photograph"), make("span", {}, `block ${manifest.depth}`));
  cards = manifest.methods.map((method) => new Card(method, manifest));
  $("cards").replaceChildren(...cards.map((card) => card.element));
  maps = [featureFigure("Unreduced"), ...manifest.methods.map((method) => featureFigure(method.label, method))];
  $("maps").replaceChildren(...maps.map((map) => map.element));
  bars = [bar("Unreduced"), ...manifest.methods.map((method) => bar(method.label, method))];
  $("bars").replaceChildren(...bars.map((b) => b.element));
  $("samples").replaceChildren(...manifest.photographs.map(sample));
  for (const card of cards) card.clear();
  chosen();
}

function sample({ file, title }, index) {
  const button = make("button", { type: "button", title, "aria-pressed": "false" }, make("img", { src: `photographs/${file}`, alt: title }));
  button.addEventListener("click", async () => {
    const { title: name, credit } = state.manifest.photographs[index];
    await offer(await choose(index), name, credit, index);
  });
  return button;
}

async function choose(index) {
  const photograph = state.manifest.photographs[index];
  if (!photograph) return null;
  const blob = await (await found(`photographs/${photograph.file}`)).blob();
  if (!state.photo) await preview(blob);
  return blob;
}

/** The photograph as it will be seen, while its model is still on its way. */
async function preview(blob) {
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

// what visitors do

function listen() {
  $("share").addEventListener("input", () => {
    state.share = state.shares[$("share").value];
    chosen();
    clearTimeout(state.soon);
    state.soon = setTimeout(() => compute().catch(failed), 140);
  });
  $("depth").addEventListener("input", () => {
    pause();
    state.depth = Number($("depth").value);
    drawAll();
  });
  $("play").addEventListener("click", () => (state.playing ? pause() : play()));
  $("open").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (file) offer(file, file.name);
    $("file").value = "";
  });
  $("again").addEventListener("click", () => {
    state.taken.clear();
    compute().catch(failed);
  });
  $("save").addEventListener("click", save);
  for (const name of ["dragover", "dragleave", "drop"]) document.addEventListener(name, dragged);
  document.addEventListener("paste", ({ clipboardData }) => {
    const file = [...clipboardData.files].find((f) => f.type.startsWith("image/"));
    if (file) offer(file, "the pasted picture");
  });
  addEventListener("resize", () => requestAnimationFrame(redraw));
}

function dragged(event) {
  if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
  event.preventDefault();
  document.body.classList.toggle("dropping", event.type === "dragover");
  const [file] = event.type === "drop" ? event.dataTransfer.files : [];
  if (file) offer(file, file.name);
}

async function offer(blob, name, credit, index = -1) {
  if (!state.engine) return;
  try {
    await take(blob, name, credit, index);
  } catch (error) {
    failed(error);
  }
}

async function take(blob, name, credit = "", index = 0) {
  const turn = ++state.turn;
  const read = await state.engine.photograph(blob);
  problem("");
  if (turn !== state.turn) return;
  state.photo = { ...read, name, picture: picture(read.seen) };
  state.results.clear();
  [...$("samples").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
  const size = `${read.width.toLocaleString()} × ${read.height.toLocaleString()} pixels`;
  $("about-photo").textContent = `${[name, credit].filter(Boolean).join("; ")}. ${size}${read.shrunk ? ", reduced by the browser first" : ""}; the model sees its middle.`;
  for (const card of cards) card.clear();
  await compute();
}

// what is computed

const graphOf = (method) => state.manifest.graphs.find((graph) => graph.method === method.key && graph.share === state.share);
const fileOf = (method) => graphOf(method)?.file ?? state.manifest.dense.file;

/** Run what is not known yet for this photograph and share, then let the models take turns for their times. */
async function compute() {
  if (!state.photo || !state.engine) return;
  const turn = ++state.turn;
  const files = [state.manifest.dense.file, ...state.manifest.methods.map(fileOf)];
  for (const file of files) {
    if (!state.results.has(file)) {
      const result = await state.engine.run(file);
      if (turn !== state.turn) return;
      result.looks = result.groups.map((groups) => looks(groups, state.photo.seen, state.manifest.grid));
      state.results.set(file, result);
    }
    drawAll();
  }
  $("save").disabled = false;
  await measure([...new Set(files)], turn);
}

async function measure(files, turn) {
  $("again").disabled = true;
  for (const file of files) if (!state.taken.has(file)) state.taken.set(file, []);
  const round = Math.min(...files.map((file) => state.taken.get(file).length));
  for (let i = round; i < ROUNDS; i++) {
    for (const file of files) {
      const ms = await state.engine.time(file);
      if (turn !== state.turn) return;
      state.taken.get(file).push(ms);
    }
    drawTimes();
  }
  drawTimes();
  $("again").disabled = false;
}

// what is seen

function chosen() {
  const index = state.shares.indexOf(state.share);
  $("share").setAttribute("aria-valuetext", `${percent(state.share)} of the multiply-adds`);
  $("share-told").textContent = percent(state.share);
  [...$("share-ticks").children].forEach((tick, i) => tick.classList.toggle("here", i === index));
  for (const card of cards) card.course(graphOf(card.method) ?? null);
  const line = state.manifest.methods[0].python.replace("{share:g}", state.share);
  $("python").textContent = `import squeezevit as sv\n\n${state.share === 1 ? "sv.restore_(model)  # the original, bit for bit" : `sv.reduce_(model, ${line})`}`;
  drawAll();
}

function drawAll() {
  $("depth").value = state.depth;
  const told = state.depth === 0 ? "photograph" : `after block ${state.depth} of ${state.manifest.depth}`;
  $("depth-told").textContent = told;
  $("depth").setAttribute("aria-valuetext", told);
  for (const card of cards) drawCard(card);
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
  show(card.canvas, state.photo.picture, state.manifest.grid, result.looks[stage], key);
  const dropped = stage < 0 ? 0 : result.groups[stage].filter((g) => g < 0).length;
  card.canvas.setAttribute("aria-label", `${card.method.label}: ${left} tokens are left${dropped ? `, ${dropped} patches were thrown away` : ""}`);
  card.cosine.textContent = near(result.cosine);
  card.answer.textContent = answer(result.features, state.manifest.classes);
}

function drawMaps() {
  const files = [state.manifest.dense.file, ...state.manifest.methods.map(fileOf)];
  files.forEach((file, i) => {
    const result = state.results.get(file);
    maps[i].element.classList.toggle("waiting", !result);
    if (!result) return;
    featureMap(maps[i].canvas, result.map, result.groups.at(-1) ?? null, state.manifest.grid);
    maps[i].told.textContent = i ? near(result.patchCosine) : "";
    maps[i].canvas.setAttribute("aria-label", `Features, mean cosine of patch tokens ${near(result.patchCosine)}`);
  });
}

function drawTimes() {
  const of = (file) => state.taken.get(file) ?? [];
  const files = [state.manifest.dense.file, ...state.manifest.methods.map(fileOf)];
  const longest = Math.max(1, ...files.filter((file) => of(file).length).map((file) => median(of(file))));
  files.forEach((file, i) => bars[i].fill(of(file), longest));
  const dense = of(files[0]);
  cards.forEach((card, i) => {
    const own = of(files[i + 1]);
    card.speed.textContent = own.length && dense.length ? times(median(dense) / median(own)) : "–";
  });
  $("result").textContent = sentence(files, of);
}

/** What was found, in one sentence. */
function sentence(files, of) {
  const result = state.results.get(files[1]);
  if (!result) return "\u00a0";
  const first = state.manifest.methods[0];
  if (state.share === 1) return "All of the work: every patch is a token to the end. Move the slider.";
  const work = { 0.5: "half of the work", 0.25: "a quarter of the work" }[state.share] ?? `${percent(state.share)} of the work`;
  const fast = of(files[1]).length && of(files[0]).length ? ` is ${times(median(of(files[0])) / median(of(files[1])))} as fast here, and` : "";
  return `With ${work} ${first.label}${fast} keeps a cosine of ${near(result.cosine)} to the unreduced features.`;
}

function redraw() {
  for (const canvas of document.querySelectorAll("canvas")) delete canvas.dataset.key;
  if (state.photo) drawAll();
}

function play() {
  pause();
  if (!state.photo || calm.matches) return drawAll();
  state.depth = 0;
  document.body.classList.add("playing");
  $("play").setAttribute("aria-label", "Pause");
  state.playing = setInterval(() => {
    state.depth++;
    if (state.depth >= state.manifest.depth) pause();
    drawAll();
  }, STEP);
  drawAll();
}

function pause() {
  clearInterval(state.playing);
  state.playing = 0;
  document.body.classList.remove("playing");
  $("play").setAttribute("aria-label", "Play the blocks from first to last");
}

function loading(on, done = 0, of = 1) {
  $("loading").hidden = !on;
  $("progress").value = done / of;
  $("loading-told").textContent = done < of ? `Fetching the model once: ${megabytes(done)} of ${megabytes(of)}` : "Opening the model …";
}

function machine() {
  const { threads } = state.engine;
  const cores = navigator.hardwareConcurrency || 1;
  const more = threads === 1 && cores > 1 && navigator.serviceWorker?.controller ? " Reload the page to use more of them." : "";
  $("machine").textContent = `WebAssembly on ${threads === 1 ? "one thread" : `${threads} threads`} of ${cores}; ${ROUNDS} rounds; one photograph at a time.${more}`;
}

function problem(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text;
  if (text) loading(false);
}

function failed(error) {
  const known = error instanceof Failure;
  problem(REASONS[error.message] ?? `${known ? "The model could not be run" : "Something went wrong on this page"}: ${error.message}. Reload the page to try again.`);
  if (!known) console.error(error);
}

/** All numbers as a file, with the groups of every patch. */
function save() {
  const { manifest, photo } = state;
  const of = (file) => {
    const { features, groups, cosine, patchCosine } = state.results.get(file);
    return { features: [...features], groups: groups.map((g) => [...g]), cosine, patchCosine, milliseconds: state.taken.get(file) ?? [] };
  };
  const rows = manifest.methods.map((method) => ({ method: method.key, share: state.share, ...graphOf(method), ...of(fileOf(method)) }));
  const numbers = {
    photograph: photo.name, model: manifest.title, precision: manifest.precision, threads: state.engine.threads, browser: navigator.userAgent,
    unreduced: of(manifest.dense.file), rows,
  };
  const url = URL.createObjectURL(new Blob([JSON.stringify(numbers)], { type: "application/json" }));
  make("a", { href: url, download: "squeezevit.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
