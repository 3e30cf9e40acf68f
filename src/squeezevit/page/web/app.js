// The page: what visitors do, and what is computed for it.

import { $, make } from "./cards.js";
import { looks, picture } from "./draw.js";
import { Engine, Failure, lacking } from "./engine.js";
import { fileOf, filesShown, graphOf, state } from "./state.js";
import { ROUNDS, build, chosen, describe, drawAll, drawTimes, emptied, failed, loading, machine, preview, problem, redraw } from "./view.js";

const STEP = 420; // milliseconds that a block stays while it is played
const QUIET = 500; // milliseconds in which what the last visit asked for comes to its end
const PATIENCE = 4000; // milliseconds for a worker that is to take over
const BAD = ["unreadable", "proportions"]; // photographs
const calm = matchMedia("(prefers-reduced-motion: reduce)");

$("stuck").remove();
start().catch(failed);

async function start() {
  const missing = lacking();
  if (missing) return problem(missing);
  await newest();
  state.manifest = await (await found("model/manifest.json")).json();
  describe(state.manifest);
  build(state.manifest, sample);
  listen();
  loading(true, 0, state.manifest.weights.bytes);
  const keeping = kept();
  const first = choose(0); // the photograph is there before its model
  await keeping;
  const engine = new Engine(state.manifest, (done, of) => loading(true, done, of));
  await engine.start();
  const blob = await first;
  state.engine = engine;
  loading(false);
  machine();
  navigator.serviceWorker?.controller?.postMessage("keep");
  if (state.early) await offer(...state.early);
  else if (blob) await take(blob, state.manifest.photographs[0].title, state.manifest.photographs[0].credit);
  else $("about-photo").textContent = "Choose a photograph to begin.";
}

async function found(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Failure(`the server has no ${path} (${response.status})`);
  return response;
}

/** Let another version of the page take over, if one waits, while nothing is asked of the last: Chromium forgets to, at times, if it is busy. */
async function newest() {
  const worker = navigator.serviceWorker;
  if (!worker?.controller) return;
  worker.addEventListener("controllerchange", () => location.reload()); // what is open is of the last version
  worker.addEventListener("message", ({ data }) => data.version && renew(data.version));
  worker.controller.postMessage("version"); // another may have taken over before anyone listened
  const waiting = (await worker.getRegistration())?.waiting;
  if (!waiting) return;
  await rest(QUIET);
  waiting.postMessage("now");
  await rest(PATIENCE);
}

/** Wait, but not for long, until the page is kept for the next time, so that the model is fetched once. */
async function kept() {
  const worker = navigator.serviceWorker;
  if (!worker) return;
  worker.addEventListener("message", ({ data }) => {
    if (data.kept) $("offline").textContent = "All of it is kept by now: it works without a network.";
  });
  const had = worker.controller;
  try {
    await worker.register("sw.js");
    if (!had) await Promise.race([new Promise((resolve) => worker.addEventListener("controllerchange", resolve, { once: true })), rest(PATIENCE)]);
  } catch {
    // without one the page works as long as there is a network
  }
}

function rest(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

/** Open the page anew if it is of another version than the worker; once, as a server may hold files of two. */
function renew(version) {
  const tried = "squeezevit version";
  if (version === document.querySelector("meta[name=version]").content || sessionStorage.getItem(tried) === version) return;
  sessionStorage.setItem(tried, version);
  location.reload();
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
  if (!state.photo && !state.early) await preview(blob);
  return blob;
}

// what visitors do

function listen() {
  $("share").addEventListener("input", () => {
    state.share = state.shares[$("share").value];
    busy();
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
  try {
    if (!state.engine) return await early(blob, name, credit, index);
    await take(blob, name, credit, index);
  } catch (error) {
    failed(error);
    if (BAD.includes(error.message)) await compute(); // of the photograph that is still there
  }
}

/** A photograph that is chosen before there is a model waits for it. */
async function early(blob, name, credit, index) {
  state.early = [blob, name, credit, index];
  try {
    await preview(blob);
  } catch {
    state.early = null;
    throw new Failure("unreadable");
  }
  $("about-photo").textContent = `${name}. The model is still on its way.`;
}

/** Photographs are read in the order of asking, so that the page and the model's thread always mean the same one. */
async function take(blob, name, credit = "", index = 0) {
  state.turn++;
  state.reading++;
  busy();
  const read = await state.engine.photograph(blob).finally(() => state.reading--);
  problem("");
  state.photo = { ...read, name, picture: picture(read.seen) };
  state.results.clear();
  [...$("samples").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
  const size = `${read.width.toLocaleString()} × ${read.height.toLocaleString()} pixels`;
  $("about-photo").textContent = `${[name, credit].filter(Boolean).join("; ")}. ${size}${read.shrunk ? ", reduced by the browser first" : ""}; the model sees its middle.`;
  emptied();
  await compute();
}

// what is computed

/** Until all is known there is nothing to save, and nothing to measure again. */
function busy() {
  for (const name of ["again", "save"]) $(name).disabled = true;
}

/** Run what is not known yet for this photograph and share, then let the models take turns for their times. */
async function compute() {
  if (!state.photo || !state.engine || state.reading) return; // what is being read is computed on when it is there
  const turn = ++state.turn;
  busy();
  const files = filesShown();
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
  if (!state.played && !calm.matches) play();
  await measure([...new Set(files)], turn);
}

async function measure(files, turn) {
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

function play() {
  pause();
  state.played = true;
  if (!state.photo) return;
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
