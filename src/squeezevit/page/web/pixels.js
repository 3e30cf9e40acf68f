// From a decoded photograph to the numbers a model takes, to the last bit what Pillow and NumPy make of the same pixels: separable
// resampling with weights in fixed point, rounded to bytes after each direction, then the middle, then mean and deviation.

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// of each filter how far it reaches, and its weight at a distance
const FILTERS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0)],
  bicubic: [2, (x) => cubic(Math.abs(x))],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};
const BITS = 22;

function cubic(x) {
  const a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? ((x - 5) * x + 8) * x * a - 4 * a : 0;
}

/** Width and height after resizing: `resize` is pixels of the shorter side, or [height, width]. */
export function resized(width, height, resize) {
  if (Array.isArray(resize)) return [resize[1], resize[0]];
  if (width <= height) return [resize, Math.floor((resize * height) / width)];
  return [Math.floor((resize * width) / height), resize];
}

/** The pixels that a model sees: RGBA bytes [width * height * 4] -> {data: RGBA, width, height} of the size `how.crop`. */
export function middle(rgba, width, height, how) {
  const [w, h] = resized(width, height, how.resize);
  const [rows, columns] = how.crop;
  const left = roundEven((w - columns) / 2);
  const top = roundEven((h - rows) / 2);
  const across = weights(width, w, left, columns, how.interpolation);
  const down = weights(height, h, top, rows, how.interpolation);
  const first = Math.min(...down.map((d) => d.from));
  const last = Math.max(...down.map((d) => d.from + d.by.length));
  const narrow = new Uint8ClampedArray((last - first) * columns * 4);
  for (let y = first; y < last; y++) {
    for (let x = 0; x < columns; x++) sum(rgba, 4 * (y * width + across[x].from), 4, across[x].by, narrow, 4 * ((y - first) * columns + x));
  }
  const data = new Uint8ClampedArray(rows * columns * 4);
  for (let y = 0; y < rows; y++) {
    const { from, by } = down[y];
    for (let x = 0; x < columns; x++) sum(narrow, 4 * ((from - first) * columns + x), 4 * columns, by, data, 4 * (y * columns + x));
  }
  return { data, width: columns, height: rows };
}

function sum(source, start, step, by, target, place) {
  for (let channel = 0; channel < 3; channel++) {
    let total = 1 << (BITS - 1);
    for (let i = 0, at = start + channel; i < by.length; i++, at += step) total += source[at] * by[i];
    target[place + channel] = total >> BITS; // clamped by the array
  }
  target[place + 3] = 255;
}

/** For `count` of the outputs, from number `first` on: which inputs are summed, and by what whole numbers. */
function weights(size, out, first, count, name) {
  const found = [];
  if (size === out) {
    for (let i = 0; i < count; i++) found.push({ from: first + i, by: [1 << BITS] });
    return found;
  }
  const scale = size / out;
  if (name === "nearest") {
    for (let i = 0; i < count; i++) found.push({ from: Math.min(size - 1, Math.floor((first + i + 0.5) * scale)), by: [1 << BITS] });
    return found;
  }
  const [reach, weight] = FILTERS[name];
  const wide = Math.max(scale, 1);
  for (let i = first; i < first + count; i++) {
    const centre = (i + 0.5) * scale;
    const from = Math.max(0, Math.trunc(centre - reach * wide + 0.5));
    const to = Math.min(size, Math.trunc(centre + reach * wide + 0.5));
    const by = [];
    for (let at = from; at < to; at++) by.push(weight((at - centre + 0.5) * (1 / wide)));
    const whole = by.reduce((a, b) => a + b, 0);
    found.push({ from, by: by.map((w) => fixed(whole === 0 ? w : w * (1 / whole))) });
  }
  return found;
}

function fixed(weight) {
  return Math.trunc((weight < 0 ? -0.5 : 0.5) + weight * (1 << BITS));
}

function roundEven(x) {
  const near = Math.round(x);
  return Math.abs(x % 1) === 0.5 && near % 2 !== 0 ? near - 1 : near;
}

/** RGBA bytes -> Float32Array [3 * height * width], red first. */
export function normalised({ data, width, height }, how) {
  const out = new Float32Array(3 * width * height);
  for (let channel = 0; channel < 3; channel++) {
    const mean = Math.fround(how.mean[channel]);
    const deviation = Math.fround(how.std[channel]);
    const of = Float32Array.from({ length: 256 }, (_, v) => Math.fround(Math.fround(Math.fround(v / 255) - mean) / deviation));
    for (let i = 0, place = channel * width * height; i < width * height; i++) out[place++] = of[data[4 * i + channel]];
  }
  return out;
}
