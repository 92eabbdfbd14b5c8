// The page: themes, choices, buttons.

function drawRun() {
  const run = runs[state.run];
  for (const place of document.querySelectorAll(".of")) {
    place.textContent = runs.length > 1 ? `of ${run.name}` : "";
  }
  byId("slider").max = run.detailed.length - 1;
  state.round = Math.min(state.round, run.round.length - 1);
  // A model that is spread over the devices has no blocks of theirs.
  for (const id of ["round", "who", "memory"]) {
    byId(id).hidden = document.querySelector(`nav [href="#${id}"]`).hidden = run.device.length === 0;
  }
  drawLatency();
  showRound(state.round);
  drawMaps();
  drawMemory();
  drawBytes();
}

function repaint() {
  paintTheme();
  drawMetric();
  drawRun();
}

function drawMetric() {
  if (metrics.length) drawLearning();
  if (metrics.length && costs) drawCosts();
}

const themes = { auto: "◐ auto", light: "☀ light", dark: "☾ dark" };
const system = matchMedia("(prefers-color-scheme: dark)");
let theme = "auto";
function paintTheme() {
  const dark = theme === "dark" || (theme === "auto" && system.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").textContent = themes[theme];
  byId("theme").setAttribute("aria-label", `Colours: ${theme}`);
}
byId("theme").addEventListener("click", () => {
  const names = Object.keys(themes);
  theme = names[(names.indexOf(theme) + 1) % names.length];
  repaint();
});
system.addEventListener("change", repaint);
paintTheme();

const metrics = [...new Set(runs.flatMap((run) =>
  Object.keys(run.metrics).filter((name) => name in run.start_metrics || run.metrics[name].some((value) => value !== null))))];
// A quality metric first, then losses.
metrics.sort((a, b) => a.includes("loss") - b.includes("loss"));
if (metrics.length) {
  byId("metric").replaceChildren(...metrics.map((name) => element("option", { value: name }, name)));
  byId("metric").addEventListener("change", drawMetric);
}
if (costs) byId("cost").addEventListener("change", drawCosts);
for (const radio of document.querySelectorAll('input[name="run"]')) {
  radio.addEventListener("change", () => { state.run = Number(radio.value); drawRun(); });
}
byId("slider").addEventListener("input", () => showRound(runs[state.run].detailed[Number(byId("slider").value)]));
const step = (by) => () => {
  const { detailed } = runs[state.run];
  const shown = Number(byId("slider").value) + by;
  showRound(detailed[Math.min(Math.max(shown, 0), detailed.length - 1)]);
};
byId("previous").addEventListener("click", step(-1));
byId("next").addEventListener("click", step(1));
const nameOf = (one) => one.closest("section").querySelector("h2").firstChild.textContent.trim();
for (const figure of document.querySelectorAll("figure")) {
  const caption = figure.querySelector("figcaption");
  const name = `${nameOf(figure)}, ${caption.textContent}`;
  const chart = charts[figure.querySelector(".chart")?.id];
  caption.append(saveButton("PNG", name, () =>
    save(`${name}.png`, asImage(figure.querySelector("canvas"), name, chart ? chart.lines : []))));
  if (chart) caption.append(saveButton("CSV", name, () => saveText(`${name}.csv`, "text/csv", asTable(chart.table()))));
}
for (const bars of document.querySelectorAll(".bars")) {
  const name = nameOf(bars);
  bars.previousElementSibling.append(saveButton("SVG", name, () => saveText(`${name}.svg`, "image/svg+xml", asDrawing(bars))));
}
byId("table").addEventListener("click", () => {
  const run = runs[state.run];
  saveText(`${run.name}.csv`, "text/csv", asTable(roundsOf(run)));
});
drawMetric();
drawRun();
document.documentElement.dataset.ready = "yes";
