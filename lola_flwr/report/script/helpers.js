// The data, and what all parts of the page use.

const runs = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const state = { run: 0, round: 0 };

// Text goes in as text: what devices call themselves is never markup.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const color = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function format(value, unit = "") {
  if (value === null || value === undefined) return "–";
  const digits = Math.abs(value) >= 1000 ? value.toFixed(0) : String(+value.toPrecision(4));
  return unit ? `${digits} ${unit}` : digits;
}

function bytes(value) {
  if (value === null) return "–";
  for (const [factor, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (value >= factor) return `${+(value / factor).toPrecision(3)} ${unit}`;
  }
  return `${value} B`;
}

// Viridis, from the block nearest the input (dark) to the last one (bright).
const STOPS = [[88, 24, 110], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];
function scale(fraction) {
  const place = Math.min(Math.max(fraction, 0), 1) * (STOPS.length - 1);
  const low = Math.min(Math.floor(place), STOPS.length - 2);
  const mixed = STOPS[low].map((c, i) => Math.round(c + (STOPS[low + 1][i] - c) * (place - low)));
  return `rgb(${mixed.join(",")})`;
}
const blockColor = (run, block) => scale(run.num_blocks > 1 ? block / (run.num_blocks - 1) : 0.5);

// Names cut to a length, and yet different: their ends where their beginnings are alike.
function shortened(names, length) {
  const cuts = [(name) => name, (name) => `${name.slice(0, length - 1)}…`, (name) => `…${name.slice(1 - length)}`];
  const cut = cuts.map((of) => names.map((name) => (name.length > length ? of(name) : name)))
    .find((tried) => tried.every((name) => name.length <= length) && new Set(tried).size === names.length);
  return cut || names.map((name, i) => `${name.slice(0, length - 5)}… ${i + 1}`);
}

// A plan has no replies yet: what it holds counts as used.
const accepted = (run, part) => ["accepted", "planned"].includes(run.statuses[run.status[part]]);

function parts(run, index) {
  const [from, to] = [run.first[index], run.first[index + 1]];
  return Array.from({ length: to - from }, (_, i) => from + i);
}
