// Learning, latency and bytes: lines by round or time.

const learns = byId("learning") !== null;
const byTime = learns && lineChart("by-time", "wireless time (s)");
const byRound = learns && lineChart("by-round", "round");
const costs = byId("target") !== null && lineChart("cost-chart", "value");
const latency = lineChart("latency-chart", "round");
const byteCount = lineChart("bytes-chart", "round");

function drawLearning() {
  const metric = byId("metric").value;
  const series = runs.map((run, i) => ({ label: run.name, color: `run${i % 8}`, dash: DASHES[i % 3] }));
  const known = (run, x) => {
    const y = run.metrics[metric] || [];
    const at = run.round.map((_, i) => i).filter((i) => y[i] !== null && y[i] !== undefined);
    const start = run.start_metrics[metric];
    const before = start === null || start === undefined ? [] : [start];
    return [[...before.map(() => 0), ...at.map((i) => run[x][i])], [...before, ...at.map((i) => y[i])]];
  };
  const last = runs.map((run) => {
    const y = known(run, "round")[1];
    return `${run.name} ends at ${format(y.length ? y[y.length - 1] : null)}`;
  });
  const summary = `${metric}: ${last.join(", ")}`;
  // Two rounds can end at one time where one of them was skipped: the later one counts.
  byTime.draw(uPlot.join(runs.map((run) => increasing(known(run, "wireless_s")))), series, { summary });
  const rounds = uPlot.join(runs.map((run) => known(run, "round")));
  byRound.draw(rounds, series, { summary });
  const same = coinciding(runs.map((run, i) => [run.name, rounds[i + 1]]), 1e-3);
  byId("alike").textContent = same.map((names) => `Round by round ${together(names)}.`).join(" ");
}

// Where a metric falls the points come from its last one: a chart's numbers rise.
function drawCosts() {
  const metric = byId("metric").value;
  const cost = byId("cost").value;
  const unit = cost.endsWith("_bytes") ? 1e6 : 1;
  const tables = runs.map((run) => {
    const found = run.costs[metric] || { value: [], [cost]: [] };
    const known = found.value.map((_, i) => i).filter((i) => found[cost][i] !== null);
    known.sort((i, k) => found.value[i] - found.value[k]);
    return [known.map((i) => found.value[i]), known.map((i) => found[cost][i] / unit)];
  });
  const series = runs.map((run, i) => ({ label: run.name, color: `run${i % 8}`, dash: DASHES[i % 3] }));
  const label = byId("cost").selectedOptions[0].textContent;
  costs.draw(uPlot.join(tables), series, { summary: `${label} until ${metric} came to a value` });
}

function increasing([x, y]) {
  const kept = x.map((_, i) => i).filter((i) => i === x.length - 1 || x[i + 1] > x[i]);
  return [kept.map((i) => x[i]), kept.map((i) => y[i])];
}

function drawLatency() {
  const run = runs[state.run];
  const lines = [
    ["observed", run.observed_s, { color: "upload" }],
    ["planned", run.planned_s, { color: "compute", dash: DASHED }],
    ["bound", run.bound_s, { color: "bound", dash: DOTTED }],
  ].slice(run.is_plan ? 1 : 0).filter(([, values]) => values.some((value) => value !== null));
  byId("coincide").textContent = coinciding(lines, 1e-3).map((names) => together(names).replace(/^./, (first) => first.toUpperCase()) +
    (names.includes("planned") && names.includes("bound") ? "; no allocation would have been faster." : ".")).join(" ");
  const summary = `${lines.map(([label]) => label).join(", ")} by round`;
  latency.draw([run.round, ...lines.map(([, values]) => values)],
    lines.map(([label, , look]) => ({ label, ...look })), { onPoint: showRound, summary });
}

function drawBytes() {
  const run = runs[state.run];
  const counts = [
    ["received_bytes", "up, received", { color: "upload" }],
    ["payload_bytes", "up, planned", { color: "compute", dash: DASHED }],
    ["sent_bytes", "down", { color: "bound", dash: DOTTED }],
  ].filter(([name]) => run.bytes[name].some((value) => value !== null));
  byId("no-bytes").hidden = counts.length > 0;
  byId("bytes-figure").hidden = counts.length === 0;
  if (!counts.length) return;
  const lines = counts.map(([name, label]) => [label, run.bytes[name].map((value) => (value === null ? null : value / 1e6))]);
  byteCount.draw(
    [run.round, ...lines.map(([, values]) => values)],
    counts.map(([, label, look]) => ({ label, ...look })),
    { onPoint: showRound, summary: "Megabytes by round" },
  );
  byId("bytes-alike").textContent = coinciding(lines, 1e-2).map((names) => `Within 1 % of one another: ${names.join("; ")}.`).join(" ");
}
