// How near reduced features stay to unreduced ones, and patch tokens as colours.

export function cosine(a, b, i = 0, j = 0, length = a.length) {
  let ab = 0;
  let aa = 0;
  let bb = 0;
  for (let k = 0; k < length; k++) {
    ab += a[i + k] * b[j + k];
    aa += a[i + k] ** 2;
    bb += b[j + k] ** 2;
  }
  return ab / Math.max(Math.sqrt(aa * bb), 1e-12);
}

/** Mean cosine of every patch's token with its unreduced one, over the patches that still have one. groups: null for all. */
export function patchCosine(tokens, groups, dense, channels) {
  let total = 0;
  let count = 0;
  for (let i = 0; i < dense.length / channels; i++) {
    const token = groups ? groups[i] : i;
    if (token < 0) continue;
    total += cosine(tokens, dense, token * channels, i * channels, channels);
    count++;
  }
  return total / Math.max(count, 1);
}

/** The three main directions of patch tokens [N * C], and how far tokens reach along each: {mean, directions, low, high}. */
export function principal(tokens, channels) {
  const count = tokens.length / channels;
  const mean = new Float64Array(channels);
  for (let i = 0; i < tokens.length; i++) mean[i % channels] += tokens[i] / count;
  const centred = Float64Array.from(tokens, (v, i) => v - mean[i % channels]);
  let directions = [0, 1, 2].map((d) => Float64Array.from({ length: channels }, (_, c) => Math.sin((c + 1) * (d + 1) * 1.7)));
  for (let step = 0; step < 60; step++) directions = orthogonal(directions.map((v) => applied(centred, v, channels)));
  const places = directions.map((v) => projected(tokens, mean, v, channels).sort());
  const at = (sorted, share) => sorted[Math.round(share * (sorted.length - 1))];
  return { mean, directions, low: places.map((p) => at(p, 0.02)), high: places.map((p) => at(p, 0.98)) };
}

/** Tokens [K * C] as bytes [K * 3] along the directions of `principal`. */
export function colours(tokens, { mean, directions, low, high }, channels) {
  const out = new Uint8ClampedArray((tokens.length / channels) * 3);
  directions.forEach((v, d) => {
    projected(tokens, mean, v, channels).forEach((p, i) => {
      out[3 * i + d] = (255 * (p - low[d])) / Math.max(high[d] - low[d], 1e-9);
    });
  });
  return out;
}

function projected(tokens, mean, direction, channels) {
  const out = new Float64Array(tokens.length / channels);
  for (let i = 0; i < tokens.length; i++) out[Math.floor(i / channels)] += (tokens[i] - mean[i % channels]) * direction[i % channels];
  return out;
}

/** (X^T X) v of centred tokens X [N, C]. */
function applied(centred, v, channels) {
  const out = new Float64Array(channels);
  for (let start = 0; start < centred.length; start += channels) {
    let along = 0;
    for (let c = 0; c < channels; c++) along += centred[start + c] * v[c];
    for (let c = 0; c < channels; c++) out[c] += along * centred[start + c];
  }
  return out;
}

/** Gram-Schmidt; each direction points to where its largest part is positive, so that colours do not depend on chance. */
function orthogonal(vectors) {
  const done = [];
  for (const v of vectors) {
    for (const other of done) {
      const along = v.reduce((sum, value, c) => sum + value * other[c], 0);
      for (let c = 0; c < v.length; c++) v[c] -= along * other[c];
    }
    const length = Math.sqrt(v.reduce((sum, value) => sum + value ** 2, 0)) || 1;
    const largest = v.reduce((best, value) => (Math.abs(value) > Math.abs(best) ? value : best), 0);
    done.push(v.map((value) => (value / length) * (largest < 0 ? -1 : 1)));
  }
  return done;
}
