// Canvases: the photograph with its token groups, maps of features, and the course of tokens over the blocks.

const SVG = "http://www.w3.org/2000/svg";
const FADE = 220; // milliseconds from one stage to the next
const calm = matchMedia("(prefers-reduced-motion: reduce)");

/** Of each patch what its group looks like: {size, colour} per patch; size 0 where it was dropped. seen: the photograph's pixels. */
export function looks(groups, seen, [rows, columns]) {
  const count = Math.max(...groups) + 1;
  const sums = Array.from({ length: count }, () => [0, 0, 0, 0]);
  const sizes = new Array(count).fill(0);
  for (let patch = 0; patch < groups.length; patch++) if (groups[patch] >= 0) sizes[groups[patch]]++;
  for (let y = 0; y < seen.height; y++) {
    const row = Math.floor((y * rows) / seen.height) * columns;
    for (let x = 0; x < seen.width; x++) {
      const sum = sums[groups[row + Math.floor((x * columns) / seen.width)]];
      if (!sum) continue;
      const at = 4 * (y * seen.width + x);
      for (let c = 0; c < 3; c++) sum[c] += seen.data[at + c];
      sum[3]++;
    }
  }
  const colours = sums.map(([r, g, b, n]) => `rgb(${[r, g, b].map((v) => Math.round(v / Math.max(n, 1))).join()})`);
  return { groups, sizes, colours };
}

/** The photograph as a canvas of its own pixels. */
export function picture(seen) {
  const canvas = new OffscreenCanvas(seen.width, seen.height);
  canvas.getContext("2d").putImageData(new ImageData(seen.data, seen.width, seen.height), 0, 0);
  return canvas;
}

/** Give a canvas as many pixels as the screen has there, a whole number for each patch. */
export function fit(canvas, [rows, columns]) {
  const wide = canvas.clientWidth || 224;
  const cell = Math.max(2, Math.round((wide * Math.min(devicePixelRatio, 2)) / columns));
  if (canvas.width !== cell * columns || canvas.height !== cell * rows) {
    canvas.width = cell * columns;
    canvas.height = cell * rows;
    canvas.style.aspectRatio = `${columns} / ${rows}`;
  }
  return cell;
}

/** Draw the photograph, or a stage of it where `look` is given, with one group lit; a change of `key` fades. */
export function show(canvas, photo, grid, look, key, lit = -1) {
  const cell = fit(canvas, grid);
  const next = new OffscreenCanvas(canvas.width, canvas.height);
  const pen = next.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(photo, 0, 0, next.width, next.height);
  if (look) regions(pen, look, grid, cell);
  if (look && lit >= 0) outline(pen, look.groups, lit, grid, cell);
  const before = canvas.dataset.key;
  canvas.dataset.key = key;
  if (before === undefined || before === key || calm.matches) canvas.getContext("2d").drawImage(next, 0, 0);
  else fade(canvas, next, key);
}

function fade(canvas, next, key) {
  const pen = canvas.getContext("2d");
  const old = new OffscreenCanvas(canvas.width, canvas.height);
  old.getContext("2d").drawImage(canvas, 0, 0);
  const start = performance.now();
  const step = (now) => {
    if (canvas.dataset.key !== key || canvas.width !== next.width) return; // something newer is drawn
    const part = Math.min(1, Math.max(0, (now - start) / FADE));
    pen.globalAlpha = 1;
    pen.drawImage(old, 0, 0);
    pen.globalAlpha = part;
    pen.drawImage(next, 0, 0);
    pen.globalAlpha = 1;
    if (part < 1) requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
}

function regions(pen, { groups, sizes, colours }, [rows, columns], cell) {
  const hatch = hatching(pen, cell);
  const merged = (patch) => groups[patch] < 0 || sizes[groups[patch]] > 1;
  for (let patch = 0; patch < groups.length; patch++) {
    if (!merged(patch)) continue;
    pen.fillStyle = groups[patch] < 0 ? hatch : colours[groups[patch]];
    pen.fillRect((patch % columns) * cell, Math.floor(patch / columns) * cell, cell, cell);
  }
  pen.beginPath();
  for (let patch = 0; patch < groups.length; patch++) {
    const x = (patch % columns) * cell;
    const y = Math.floor(patch / columns) * cell;
    const apart = (other) => groups[patch] !== groups[other] && (merged(patch) || merged(other));
    if (x > 0 && apart(patch - 1)) pen.moveTo(x, y), pen.lineTo(x, y + cell);
    if (y > 0 && apart(patch - columns)) pen.moveTo(x, y), pen.lineTo(x + cell, y);
  }
  pen.lineWidth = Math.max(1, cell / 16);
  pen.strokeStyle = "rgba(10, 14, 18, 0.42)";
  pen.stroke();
}

/** A light line around all patches of a group. */
function outline(pen, groups, lit, [rows, columns], cell) {
  const inside = (row, column) => row >= 0 && row < rows && column >= 0 && column < columns && groups[row * columns + column] === lit;
  pen.beginPath();
  for (let row = 0; row <= rows; row++) {
    for (let column = 0; column <= columns; column++) {
      const [x, y] = [column * cell, row * cell];
      if (inside(row, column) !== inside(row - 1, column)) pen.moveTo(x, y), pen.lineTo(x + cell, y);
      if (inside(row, column) !== inside(row, column - 1)) pen.moveTo(x, y), pen.lineTo(x, y + cell);
    }
  }
  pen.lineCap = "round";
  for (const [width, colour] of [[cell / 3, "rgba(10, 14, 18, 0.8)"], [cell / 6, "white"]]) {
    pen.lineWidth = width;
    pen.strokeStyle = colour;
    pen.stroke();
  }
}

function hatching(pen, cell) {
  const tile = new OffscreenCanvas(8, 8);
  const p = tile.getContext("2d");
  p.fillStyle = "#191d21";
  p.fillRect(0, 0, 8, 8);
  p.strokeStyle = "#3a424a";
  p.lineWidth = 1.4;
  p.beginPath();
  for (const d of [-8, 0, 8]) p.moveTo(d - 1, 9), p.lineTo(d + 9, -1);
  p.stroke();
  return pen.createPattern(tile, "repeat");
}

/** Tokens as colours, each patch that of its token; dropped ones hatched. map: bytes [K * 3]; groups: null where K is N. */
export function featureMap(canvas, map, groups, grid) {
  const cell = fit(canvas, grid);
  const pen = canvas.getContext("2d");
  const hatch = hatching(pen, cell);
  for (let patch = 0; patch < grid[0] * grid[1]; patch++) {
    const token = groups ? groups[patch] : patch;
    pen.fillStyle = token < 0 ? hatch : `rgb(${map[3 * token]},${map[3 * token + 1]},${map[3 * token + 2]})`;
    pen.fillRect((patch % grid[1]) * cell, Math.floor(patch / grid[1]) * cell, cell, cell);
  }
}

/** A staircase of tokens over the depth, and a line that says where one is: {svg, at(depth)}. */
export function staircase(patches, blocks, counts, depth) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 32");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("stairs");
  const x = (block) => (100 * (block + 0.5)) / depth;
  const y = (count) => 31 - (30 * count) / patches;
  let path = `M0 ${y(patches)}`;
  blocks.forEach((block, i) => (path += `H${x(block)}V${y(counts[i])}`));
  const area = element("path", { d: `${path}H100V32H0Z`, class: "area" });
  const line = element("path", { d: `${path}H100`, class: "edge" });
  const cursor = element("path", { class: "cursor" });
  svg.append(area, line, cursor);
  return { svg, at: (block) => cursor.setAttribute("d", `M${(100 * block) / depth} 0V32`) };
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
