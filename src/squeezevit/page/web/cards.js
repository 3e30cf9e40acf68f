// What the page builds from the manifest: a card, a map and a bar for each method.

import { staircase } from "./draw.js";

export const $ = (id) => document.getElementById(id);

export function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const number = (value, digits) => value.toLocaleString(undefined, { minimumFractionDigits: digits, maximumFractionDigits: digits });
export const percent = (share) => `${number(100 * share, Math.abs(100 * share - Math.round(100 * share)) < 0.05 ? 0 : 1)} %`;
export const times = (ratio) => `${number(ratio, ratio < 9.95 ? 1 : 0)} ×`;
export const milliseconds = (ms) => `${number(ms, ms < 10 ? 1 : 0)} ms`;
export const near = (cosine) => number(cosine, 3);
export const megabytes = (bytes) => `${number(bytes / 1e6, bytes < 1e7 ? 1 : 0)} MB`;

/** A method's card; `fill` and `clear` change what is in it. */
export class Card {
  constructor(method, manifest) {
    this.manifest = manifest;
    this.canvas = make("canvas", { role: "img", tabindex: 0, width: 224, height: 224, "aria-label": `${method.label}: not computed yet` });
    this.lens = make("p", { class: "lens", role: "status", hidden: "" });
    this.tokens = make("dd", { class: "tokens" });
    this.speed = make("dd");
    this.cosine = make("dd");
    this.answer = make("p", { class: "answer" });
    this.stairs = make("div", { class: "course" });
    this.element = make(
      "article", { class: "card" }, make("div", { class: "frame" }, this.canvas, this.lens),
      make("div", { class: "told" }, make("h3", {}, method.label), make("p", { class: "words" }, method.words)),
      make(
        "dl", {}, make("div", { class: "wide" }, make("dt", {}, "tokens"), this.tokens, this.stairs),
        make("div", {}, make("dt", {}, "speed"), this.speed), make("div", {}, make("dt", {}, "cosine"), this.cosine),
      ),
      this.answer,
    );
    coloured(this.element, method);
    this.method = method;
  }

  /** The graph that is shown from now on; null for the unreduced model. */
  course(graph) {
    const { patches, blocks, counts } = graph ?? { ...this.manifest.dense };
    this.graph = graph;
    this.course_ = staircase(patches, blocks, counts, this.manifest.depth);
    this.stairs.replaceChildren(this.course_.svg);
  }

  /** How many stages lie behind a depth, and how many tokens are left there. */
  at(depth) {
    const { patches, blocks, counts } = this.graph ?? this.manifest.dense;
    const stage = blocks.filter((block) => block < depth).length - 1;
    const left = stage < 0 ? patches : counts[stage];
    this.course_.at(depth);
    this.tokens.textContent = left === patches ? `${patches}` : `${patches} → ${left}`;
    return { stage, left };
  }

  /** Say what a patch under the pointer has become: the number of patches of its token, 0 where it was thrown away. */
  tell(size) {
    this.lens.hidden = size === null;
    if (size === null) return;
    this.lens.textContent = size === 0 ? "thrown away" : size === 1 ? "a token of its own" : `one token of ${size} patches`;
  }

  clear() {
    for (const dd of [this.speed, this.cosine]) dd.textContent = "–";
    this.answer.textContent = "";
    this.element.classList.add("waiting");
  }
}

export function coloured(node, method) {
  node.style.setProperty("--light", method.light);
  node.style.setProperty("--dark", method.dark);
  node.classList.add("coloured");
}

/** A figure with a map of features: {element, canvas, told}. */
export function featureFigure(label, method) {
  const canvas = make("canvas", { role: "img", width: 224, height: 224, "aria-label": `${label}: not computed yet` });
  const told = make("span", { class: "number" });
  const element = make("figure", {}, canvas, make("figcaption", {}, make("b", {}, label), " ", told));
  if (method) coloured(element, method);
  return { element, canvas, told };
}

/** A bar of times: {element, fill(times, longest)}. */
export function bar(label, method) {
  const best = make("span", { class: "best" });
  const usual = make("span", { class: "usual" });
  const told = make("span", { class: "number" });
  const element = make("div", { class: "bar" }, make("span", { class: "label" }, label), make("span", { class: "track" }, usual, best), told);
  if (method) coloured(element, method);
  const fill = (taken, longest) => {
    element.classList.toggle("waiting", taken.length === 0);
    if (!taken.length) return (told.textContent = "–");
    const [low, middle] = [Math.min(...taken), median(taken)];
    best.style.width = `${(100 * low) / longest}%`;
    usual.style.width = `${(100 * middle) / longest}%`;
    told.replaceChildren(make("b", {}, milliseconds(middle)), ` fastest ${milliseconds(low)}`);
  };
  return { element, fill };
}

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

/** The likeliest classes, where the model names them. */
export function answer(logits, classes) {
  if (!classes || classes.length !== logits.length) return "";
  const most = Math.max(...logits);
  const odds = Array.from(logits, (v) => Math.exp(v - most));
  const all = odds.reduce((a, b) => a + b, 0);
  const best = odds.map((v, i) => [v / all, classes[i]]).sort((a, b) => b[0] - a[0]).slice(0, 2);
  return best.map(([share, name]) => `${name} ${number(100 * share, 0)} %`).join(", ");
}
