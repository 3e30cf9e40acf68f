// The model's thread: decodes photographs, holds the sessions, and computes. One request at a time, in the order of asking.

import * as ort from "./ort/ort.wasm.min.mjs";
import { colours, cosine, patchCosine, principal } from "./features.js";
import { middle, normalised } from "./pixels.js";

const HERE = new URL("./", import.meta.url).href;
const MOST_PIXELS = 4e6; // a larger photograph is first reduced by the browser
const MOST_PROPORTION = 100; // of the sides of a photograph

let manifest;
let weights;
let room; // how many sessions may be open
let input; // the photograph as a tensor
let dense; // what the unreduced model says of it
const sessions = new Map(); // by file, the one used longest ago first

const tasks = { load, photograph, run, time };
let queue = Promise.resolve();
self.onmessage = ({ data: { id, task, given } }) => {
  queue = queue.then(async () => {
    try {
      self.postMessage({ id, done: await tasks[task](given) });
    } catch (error) {
      self.postMessage({ id, failed: String(error?.message ?? error) });
    }
  });
};
self.postMessage({ ready: true });

async function load(given) {
  manifest = given.manifest;
  room = given.room;
  ort.env.wasm.wasmPaths = `${HERE}ort/`;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  weights = await fetched(`model/${manifest.weights.file}`, manifest.weights.bytes);
  await session(manifest.dense.file);
  return { threads: ort.env.wasm.numThreads };
}

async function fetched(path, size) {
  const response = await fetch(HERE + path);
  if (!response.ok) throw new Error(`the server has no ${path} (${response.status})`);
  if (!size) return new Uint8Array(await response.arrayBuffer());
  const bytes = new Uint8Array(size);
  const reader = response.body.getReader();
  let at = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (at + part.value.length > size) throw new Error(`${path} is longer than the page says; reload the page`);
    bytes.set(part.value, at);
    at += part.value.length;
    self.postMessage({ loaded: at, of: size });
  }
  if (at < size) throw new Error(`${path} is shorter than the page says; reload the page`);
  return bytes;
}

async function session(file) {
  const open = sessions.get(file);
  if (open) sessions.delete(file);
  else while (sessions.size >= room) await closed(sessions.keys().next().value);
  const found = open ?? (await opened(file));
  sessions.set(file, found);
  return found;
}

async function opened(file) {
  const graph = await fetched(`model/${file}`);
  const externalData = [{ path: manifest.weights.file, data: weights }];
  return ort.InferenceSession.create(graph, { executionProviders: ["wasm"], externalData, logSeverityLevel: 3 });
}

async function closed(file) {
  const old = sessions.get(file);
  sessions.delete(file);
  await old.release();
}

async function photograph({ blob }) {
  const how = manifest.preprocessing;
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", imageOrientation: how.upright ? "from-image" : "none" });
  } catch (error) {
    throw new Error("unreadable");
  }
  const { width, height } = bitmap;
  if (Math.max(width, height) > MOST_PROPORTION * Math.min(width, height)) throw new Error("proportions");
  const shrink = Math.min(1, Math.sqrt(MOST_PIXELS / (width * height)));
  const [w, h] = [width, height].map((side) => Math.max(1, Math.round(side * shrink)));
  const context = new OffscreenCanvas(w, h).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white"; // behind what is transparent
  context.fillRect(0, 0, w, h);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, w, h);
  bitmap.close();
  const seen = middle(context.getImageData(0, 0, w, h).data, w, h, how);
  input = new ort.Tensor("float32", normalised(seen, how), [1, 3, seen.height, seen.width]);
  dense = undefined;
  return { seen, width, height, shrunk: shrink < 1 };
}

async function run({ file }) {
  const ready = await session(file);
  const out = await ready.run({ images: input });
  const groups = ready.outputNames.filter((name) => name.startsWith("groups_")).map((name) => Int32Array.from(out[name].data, Number));
  const features = Float32Array.from(out.out.data);
  const tokens = Float32Array.from(out.tokens.data);
  const channels = out.tokens.dims.at(-1);
  if (file === manifest.dense.file) dense = { features, tokens, basis: principal(tokens, channels) };
  const last = groups.at(-1) ?? null;
  return {
    features, groups, map: colours(tokens, dense.basis, channels),
    cosine: cosine(features, dense.features), patchCosine: patchCosine(tokens, last, dense.tokens, channels),
  };
}

/** Milliseconds of one forward; a session that was not open is warmed up first. */
async function time({ file }) {
  const warm = sessions.has(file);
  const ready = await session(file);
  if (!warm) await ready.run({ images: input });
  const start = performance.now();
  await ready.run({ images: input });
  return performance.now() - start;
}
