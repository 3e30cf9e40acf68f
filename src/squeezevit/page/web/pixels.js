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
  const data = new Uint8ClampedArray(rows * columns * 4);
  if (downFirst(width, height, w, h)) {
    const [first, last] = reach(across);
    const low = new Uint8ClampedArray(rows * (last - first) * 4);
    downwards(rgba, width, 0, first, down, low, last - first);
    sideways(low, last - first, first, 0, across, data, rows);
  } else {
    const [first, last] = reach(down);
    const narrow = new Uint8ClampedArray((last - first) * columns * 4);
    sideways(rgba, width, 0, first, across, narrow, last - first);
    downwards(narrow, columns, first, 0, down, data, columns);
  }
  return { data, width: columns, height: rows };
}

/** Pillow begins with the columns where that leaves less to do; bytes are rounded in between, so the order matters. */
function downFirst(width, height, w, h) {
  return h < height && height - h > 2 * (width - w);
}

/** From the first to behind the last of the inputs that are summed. */
function reach(weights) {
  return [Math.min(...weights.map((d) => d.from)), Math.max(...weights.map((d) => d.from + d.by.length))];
}

/** Resample along rows of `wide` pixels: `count` rows from number `top` on; `skipped` of the inputs at the left are not there. */
function sideways(source, wide, skipped, top, across, target, count) {
  for (let y = 0; y < count; y++) {
    across.forEach(({ from, by }, x) => sum(source, 4 * ((top + y) * wide + from - skipped), 4, by, target, 4 * (y * across.length + x)));
  }
}

/** Resample along columns, `count` of them from number `left` on; `skipped` of the inputs at the top are not there. */
function downwards(source, wide, skipped, left, down, target, count) {
  down.forEach(({ from, by }, y) => {
    for (let x = 0; x < count; x++) sum(source, 4 * ((from - skipped) * wide + left + x), 4 * wide, by, target, 4 * (y * count + x));
  });
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
    for (let i = 0, at = scale / 2; i < first + count; i++, at += scale) {
      if (i >= first) found.push({ from: Math.min(size - 1, Math.floor(at)), by: [1 << BITS] });
    }
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
