"use strict";
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const state = { run: 0, round: 0 };

  // --- helpers ---------------------------------------------------------------------

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

  // --- files -----------------------------------------------------------------------

  function save(name, url) {
    const link = element("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
  }

  function asImage(canvas) {
    // Charts have no background of their own.
    const copy = element("canvas", { width: canvas.width, height: canvas.height });
    const pen = copy.getContext("2d");
    pen.fillStyle = color("panel");
    pen.fillRect(0, 0, copy.width, copy.height);
    pen.drawImage(canvas, 0, 0);
    return copy.toDataURL("image/png");
  }

  function asTable(run) {
    const quoted = (value) => (value === null ? "" : /^[=+@-]|[",\n]/.test(value) && isNaN(value)
      ? `"'${String(value).replaceAll('"', '""')}"` : String(value));
    const columns = ["compute_s", "upload_s", "reported_s", "measured_upload_s", "share", "payload_bytes", "received_bytes", "sent_bytes"];
    const lines = [["round", "wireless_s", "device", "block", "status", ...columns]];
    run.round.forEach((round, index) => parts(run, index).forEach((part) => lines.push([
      round, run.wireless_s[index], run.devices[run.device[part]], run.block[part], run.statuses[run.status[part]],
      ...columns.map((name) => run[name][part]),
    ])));
    return lines.map((line) => line.map(quoted).join(",")).join("\n");
  }

  // --- line charts -----------------------------------------------------------------

  const DASHED = [10, 5], DOTTED = [2, 4];
  const LEGEND_DASH = { 10: "dashed", 2: "dotted" };
  const WHOLE = [1, 2, 5].flatMap((digit) => [1, 10, 100, 1e3, 1e4, 1e5].map((power) => digit * power))
    .sort((a, b) => a - b);

  function lineChart(id, label) {
    const place = byId(id);
    const chart = { plot: null, draw };
    place.setAttribute("tabindex", "0");
    place.setAttribute("role", "img");

    function draw(data, series, { onPoint = null, summary = "" } = {}) {
      if (chart.plot) chart.plot.destroy();
      place.setAttribute("aria-label", `${label}. ${summary}`);
      const axis = () => ({
        stroke: () => color("quiet"),
        grid: { stroke: () => color("grid"), width: 1 },
        ticks: { stroke: () => color("grid"), width: 1 },
        values: (_, splits) => splits.map((value) => format(value)),
      });
      const single = data[0].length < 40;
      // What stands in the legend while nothing is pointed at: each line's last value.
      const ends = data.map((values) => values.findLastIndex((value) => value !== null && value !== undefined));
      const restLegend = (plot) => { if (plot.cursor.idx === null || plot.cursor.idx === undefined) plot.setLegend({ idxs: ends }); };
      chart.plot = new uPlot(
        {
          width: place.clientWidth, height: 260,
          legend: { live: true, markers: { dash: (_, i) => LEGEND_DASH[series[i - 1]?.dash?.[0]] || "solid" } },
          hooks: { setCursor: [restLegend] },
          cursor: { drag: { x: true, y: false }, points: { size: 7 } },
          scales: { x: { time: false } },
          // There is no round 12.5.
          axes: [{ ...axis(), ...(label === "round" ? { incrs: WHOLE } : {}) }, { ...axis(), size: 62 }],
          series: [
            { label, value: (_, value) => format(value) },
            ...series.map((one) => ({
              label: one.label, width: 2, dash: one.dash, spanGaps: true,
              stroke: () => color(one.color), points: { show: single || undefined, size: data[0].length < 2 ? 10 : 5 },
              value: (_, value) => format(value),
            })),
          ],
        },
        data, place,
      );
      chart.plot.over.addEventListener("click", () => {
        if (onPoint && chart.plot.cursor.idx !== null) onPoint(chart.plot.cursor.idx);
      });
      chart.index = 0;
      chart.onPoint = onPoint;
      restLegend(chart.plot);
      // The legend switches series off and on, with the keyboard too.
      for (const head of place.querySelectorAll(".u-series th")) head.setAttribute("tabindex", "0");
    }

    place.addEventListener("keydown", (event) => {
      if (event.target.tagName === "TH") {
        if (event.key === "Enter" || event.key === " ") { event.target.click(); event.preventDefault(); }
        return;
      }
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || !chart.plot) return;
      event.preventDefault();
      const [x] = chart.plot.data;
      chart.index = Math.min(Math.max(chart.index + step, 0), x.length - 1);
      chart.plot.setCursor({ left: chart.plot.valToPos(x[chart.index], "x"), top: 10 });
      if (chart.onPoint) chart.onPoint(chart.index);
    });
    new ResizeObserver(() => {
      if (chart.plot && place.clientWidth) chart.plot.setSize({ width: place.clientWidth, height: 260 });
    }).observe(place);
    return chart;
  }

  const byTime = lineChart("by-time", "wireless time (s)");
  const byRound = lineChart("by-round", "round");
  const latency = lineChart("latency-chart", "round");
  const byteCount = lineChart("bytes-chart", "round");

  function drawLearning() {
    const metric = byId("metric").value;
    const series = runs.map((run, i) => ({ label: run.name, color: `run${i % 8}` }));
    const known = (run, x) => {
      const y = run.metrics[metric] || [];
      const at = run.round.map((_, i) => i).filter((i) => y[i] !== null && y[i] !== undefined);
      return [at.map((i) => run[x][i]), at.map((i) => y[i])];
    };
    const last = runs.map((run) => {
      const y = known(run, "round")[1];
      return `${run.name} ends at ${format(y.length ? y[y.length - 1] : null)}`;
    });
    const summary = `${metric}: ${last.join(", ")}`;
    // Two rounds can end at one time where one of them was skipped: the later one counts.
    byTime.draw(uPlot.join(runs.map((run) => increasing(known(run, "wireless_s")))), series, { summary });
    byRound.draw(uPlot.join(runs.map((run) => known(run, "round"))), series, { summary });
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
    ].slice(run.is_plan ? 1 : 0);
    const alike = (one, other) => run.round.every((_, i) => one[i] === null || other[i] === null ||
      Math.abs(one[i] - other[i]) <= 1e-3 * Math.abs(other[i]));
    const said = [];
    if (!run.is_plan && alike(run.observed_s, run.planned_s)) said.push("Observed and planned coincide.");
    if (alike(run.planned_s, run.bound_s)) said.push("Planned and bound coincide: no allocation would have been faster.");
    byId("coincide").textContent = said.join(" ");
    const summary = `${lines.map(([label]) => label).join(", ")} by round`;
    latency.draw([run.round, ...lines.map(([, values]) => values)],
      lines.map(([label, , look]) => ({ label, ...look })), { onPoint: showRound, summary });
  }

  // --- one round -------------------------------------------------------------------

  function showRound(index) {
    state.round = index;
    byId("slider").value = index;
    drawRound();
  }

  // A plan has no replies yet: what it holds counts as used.
  const accepted = (run, part) => ["accepted", "planned"].includes(run.statuses[run.status[part]]);

  function parts(run, index) {
    const [from, to] = [run.first[index], run.first[index + 1]];
    return Array.from({ length: to - from }, (_, i) => from + i);
  }

  function drawRound() {
    const run = runs[state.run];
    const index = state.round;
    const active = parts(run, index);
    const planned = run.planned_s[index];
    const title = `Round ${run.round[index]}`;
    byId("slider").setAttribute("aria-valuetext", title);
    const place = byId("timeline");
    if (run.skipped[index] !== null) {
      byId("round-title").textContent = `${title}: skipped, ${run.skipped[index]}`;
      place.replaceChildren();
      return;
    }
    const total = (part) => run.compute_s[part] + run.upload_s[part];
    const longest = Math.max(...active.map(total), ...active.map((p) => (run.reported_s[p] || 0) + run.upload_s[p]));
    const slowest = active.filter((part) => total(part) > Math.max(...active.map(total)) * (1 - 1e-5));
    const balanced = slowest.length > 1 && slowest.length === active.length;
    byId("round-title").textContent =
      `${title}: ${format(planned, "s")} planned` +
      (run.is_plan ? "" : `, ${format(run.observed_s[index], "s")} observed`) +
      (balanced ? "; all devices finish together, so none holds the others up" : "");
    const percent = (seconds) => `${(100 * seconds) / longest}%`;
    const bound = run.bound_s[index];
    place.replaceChildren(
      header("device", "block", "share", "", "total"),
      ...active.map((part) => {
        const used = accepted(run, part);
        const track = element("span", { class: "track" });
        const bar = (name, from, width) =>
          track.append(element("span", { class: name, style: `left:${percent(from)};width:${percent(width)}` }));
        bar(used ? "compute" : "lost", 0, run.compute_s[part]);
        bar(used ? "upload" : "lost", run.compute_s[part], run.upload_s[part]);
        if (run.reported_s[part] !== null) bar("reported", run.reported_s[part], 0);
        if (bound !== null) bar("bound", bound, 0);
        track.title = `compute ${format(run.compute_s[part], "s")}` +
          (run.reported_s[part] === null ? "" : ` (reported ${format(run.reported_s[part], "s")})`) +
          `, upload ${format(run.upload_s[part], "s")}` +
          (run.measured_upload_s[part] === null ? "" : ` (measured ${format(run.measured_upload_s[part], "s")})`);
        const alone = slowest.length === 1 && slowest[0] === part;
        return row(
          `${alone ? "slowest" : ""} ${used ? "" : "refused"}`,
          run.devices[run.device[part]], `${run.block[part]} (depth ${run.num_blocks - run.block[part]})`,
          `${format(100 * run.share[part])} %`, track,
          used ? format(total(part), "s") : run.statuses[run.status[part]],
        );
      }),
    );
  }

  function header(...names) {
    return element("div", { role: "row" }, ...names.map((name, i) =>
      element("span", { role: "columnheader", class: i === 2 || i === 4 ? "value" : "" }, name)));
  }

  function row(kind, name, second, third, track, value) {
    const cells = [[name, "name"], [second, ""], [third, "value"], [track, ""], [value, "value"]];
    return element("div", { role: "row", class: kind }, ...cells.map(([content, look]) => {
      if (typeof content !== "string") { content.setAttribute("role", "cell"); return content; }
      return element("span", { role: "cell", class: look, ...(look ? { title: content } : {}) }, content);
    }));
  }

  // --- memory ----------------------------------------------------------------------

  function drawMemory() {
    const run = runs[state.run];
    const most = new Map();
    const peaks = new Map();
    run.device.forEach((device, part) => {
      const peak = run.peak_bytes[part];
      if (peak !== null) peaks.set(device, Math.max(peak, peaks.get(device) || 0));
      const needed = run.needed_bytes[part];
      if (needed === null || run.memory_bytes[part] === null) return;
      const known = most.get(device);
      if (!known || needed > known.needed) most.set(device, { needed, part });
    });
    const place = byId("memory-bars");
    if (!most.size) { place.replaceChildren("This run's log holds no memory figures."); return; }
    const largest = Math.max(...[...most.values()].map(({ part, needed }) => Math.max(run.memory_bytes[part], needed)));
    // Those nearest to their limit come first.
    const used = ({ needed, part }) => needed / run.memory_bytes[part];
    const rows = [...most].sort((a, b) => used(b[1]) - used(a[1])).map(([device, { needed, part }]) => {
      const offered = run.memory_bytes[part];
      const track = element("span", { class: "track" });
      track.style.width = `${(100 * offered) / largest}%`;
      const over = needed > offered;
      track.append(element("span", { class: over ? "lost" : "upload", style: `left:0;width:${(100 * needed) / offered}%` }));
      track.title = `block ${run.block[part]} needs ${bytes(needed)}; the device offers ${bytes(offered)}`;
      const peak = peaks.get(device);
      if (peak !== undefined) {
        track.append(element("span", { class: "reported", style: `left:${Math.min((100 * peak) / offered, 99)}%` }));
        track.title += `; measured peak ${bytes(peak)}`;
      }
      return row(over ? "over" : "", run.devices[device], bytes(needed), `of ${bytes(offered)}`, track,
        `${format(+(100 * needed / offered).toPrecision(3))} %`);
    });
    place.replaceChildren(header("device", "needed", "offered", "", "used"), ...rows);
  }

  // --- bytes -----------------------------------------------------------------------

  function drawBytes() {
    const run = runs[state.run];
    const counts = [
      ["received_bytes", "up, received", "upload"],
      ["payload_bytes", "up, planned", "compute"],
      ["sent_bytes", "down", "bound"],
    ].filter(([name]) => run[name].some((value) => value !== null));
    byId("no-bytes").hidden = counts.length > 0;
    byId("bytes-figure").hidden = counts.length === 0;
    if (!counts.length) return;
    const megabytes = (name) => run.round.map((_, index) =>
      parts(run, index).reduce((sum, part) => sum + (run[name][part] || 0), 0) / 1e6);
    byteCount.draw(
      [run.round, ...counts.map(([name]) => megabytes(name))],
      counts.map(([, label, look]) => ({ label, color: look })),
      { onPoint: showRound, summary: "Megabytes by round" },
    );
  }

  // --- heat maps -------------------------------------------------------------------

  // A canvas of rows × columns cells; describe(row, column) says what a cell is.
  function heatMap(id, label) {
    const canvas = byId(id);
    const map = { rows: 0, columns: 0, at: [0, 0], draw, show };
    let options = null;
    const gutter = { left: 92, bottom: 20 };

    function draw(given) {
      options = given;
      [map.rows, map.columns] = [given.rows.length, given.columns.length];
      canvas.setAttribute("aria-label", `${label}. ${given.summary}`);
      paint();
    }

    function paint() {
      if (!options) return;
      const ratio = window.devicePixelRatio || 1;
      const width = canvas.parentElement.clientWidth;
      map.height = Math.min(Math.max(Math.floor(420 / map.rows), 7), 22);
      map.width = Math.min((width - gutter.left - 4) / map.columns, 26);
      const height = map.rows * map.height + gutter.bottom;
      Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
      [canvas.width, canvas.height] = [width * ratio, height * ratio];
      const pen = canvas.getContext("2d");
      pen.scale(ratio, ratio);
      pen.fillStyle = color("grid");
      pen.fillRect(gutter.left, 0, map.columns * map.width, map.rows * map.height);
      const gap = map.width > 5 && map.height > 5 ? 1 : 0;
      for (const cell of options.cells) {
        pen.fillStyle = cell.fill;
        pen.globalAlpha = cell.weight ?? 1;
        const [x, y] = [gutter.left + cell.column * map.width, cell.row * map.height];
        pen.fillRect(x, y, map.width - gap, map.height - gap);
        pen.globalAlpha = 1;
        if (cell.lost) {
          pen.strokeStyle = color("lost");
          pen.lineWidth = 2;
          pen.strokeRect(x + 1, y + 1, Math.max(map.width - gap - 2, 1), map.height - gap - 2);
        }
        if (cell.text && map.width > 14 && map.height > 11) {
          pen.fillStyle = color("text");
          pen.font = "10px system-ui, sans-serif";
          pen.textAlign = "center";
          pen.textBaseline = "middle";
          pen.fillText(cell.text, x + map.width / 2, y + map.height / 2);
        }
      }
      pen.fillStyle = color("quiet");
      pen.font = "11px system-ui, sans-serif";
      pen.textAlign = "right";
      pen.textBaseline = "middle";
      const every = Math.ceil(12 / map.height);
      shortened(options.rows, 14).forEach((name, i) => {
        if (i % every === 0) pen.fillText(name, gutter.left - 6, (i + 0.5) * map.height);
      });
      pen.textAlign = "center";
      const step = Math.max(1, Math.ceil(34 / map.width));
      options.columns.forEach((name, i) => {
        if (i % step === 0) pen.fillText(name, gutter.left + (i + 0.5) * map.width, map.rows * map.height + 10);
      });
      if (document.activeElement === canvas) {
        pen.strokeStyle = color("accent");
        pen.lineWidth = 2;
        pen.strokeRect(gutter.left + map.at[1] * map.width, map.at[0] * map.height, map.width, map.height);
      }
    }

    function show(row, column) {
      map.at = [row, column];
      byId("cell").textContent = options.describe(row, column);
      paint();
    }

    canvas.addEventListener("mousemove", (event) => {
      const row = Math.floor(event.offsetY / map.height);
      const column = Math.floor((event.offsetX - gutter.left) / map.width);
      if (row >= 0 && row < map.rows && column >= 0 && column < map.columns) {
        byId("cell").textContent = options.describe(row, column);
        map.at = [row, column];
      }
    });
    canvas.addEventListener("click", () => options.choose && options.choose(...map.at));
    canvas.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (event.key === "Enter" && options.choose) options.choose(...map.at);
      if (!move) return;
      event.preventDefault();
      const clip = (value, size) => Math.min(Math.max(value, 0), size - 1);
      show(clip(map.at[0] + move[0], map.rows), clip(map.at[1] + move[1], map.columns));
    });
    canvas.addEventListener("focus", paint);
    canvas.addEventListener("blur", paint);
    new ResizeObserver(paint).observe(canvas.parentElement);
    return map;
  }

  const byDevice = heatMap("by-device", "Block of each device by round");
  const meetings = heatMap("meetings", "Accepted updates by device and block");

  function drawMaps() {
    const run = runs[state.run];
    const cells = [];
    const said = new Map();
    const counts = new Map();
    run.round.forEach((round, index) => {
      for (const part of parts(run, index)) {
        const [row, block] = [run.device[part], run.block[part]];
        const lost = !accepted(run, part);
        cells.push({ row, column: index, fill: blockColor(run, block), lost });
        said.set(`${row} ${index}`, `${run.devices[row]}, round ${round}: block ${block}, depth ${run.num_blocks - block}` +
          (lost ? ` (${run.statuses[run.status[part]]})` : ""));
        if (!lost) counts.set(`${row} ${block}`, (counts.get(`${row} ${block}`) || 0) + 1);
      }
    });
    byDevice.draw({
      rows: run.devices, columns: run.round.map(String), cells,
      summary: `${run.devices.length} devices over ${run.round.length} rounds`,
      describe: (row, column) => said.get(`${row} ${column}`) || `${run.devices[row]}, round ${run.round[column]}: not asked`,
      choose: (_, column) => { showRound(column); byId("round").scrollIntoView(); },
    });
    const most = Math.max(1, ...counts.values());
    const blocks = Array.from({ length: run.num_blocks }, (_, i) => i);
    meetings.draw({
      rows: run.devices, columns: blocks.map(String),
      cells: [...counts].map(([key, count]) => {
        const [row, column] = key.split(" ").map(Number);
        return { row, column, fill: color("upload"), weight: 0.2 + 0.8 * (count / most), text: String(count) };
      }),
      summary: `${counts.size} of ${run.devices.length * run.num_blocks} pairs have met`,
      describe: (row, column) => `${run.devices[row]}, block ${column}: ${counts.get(`${row} ${column}`) || 0} accepted updates`,
    });
    const shown = blocks.length > 12 ? blocks.filter((b) => b % Math.ceil(blocks.length / 12) === 0) : blocks;
    byId("depths").replaceChildren("block, from the input on:", ...shown.flatMap((block) => [
      element("span", { class: "key", style: `background:${blockColor(run, block)}` }), String(block),
    ]));
  }

  // --- page ------------------------------------------------------------------------

  function drawRun() {
    const run = runs[state.run];
    for (const place of document.querySelectorAll(".of")) {
      place.textContent = runs.length > 1 ? `of ${run.name}` : "";
    }
    byId("slider").max = run.round.length - 1;
    state.round = Math.min(state.round, run.round.length - 1);
    drawLatency();
    showRound(state.round);
    drawMaps();
    drawMemory();
    drawBytes();
  }

  function repaint() {
    paintTheme();
    if (metrics.length) drawLearning();
    drawRun();
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
    Object.keys(run.metrics).filter((name) => run.metrics[name].some((value) => value !== null))))];
  // A quality metric first, then losses.
  metrics.sort((a, b) => a.includes("loss") - b.includes("loss"));
  byId("metric").replaceChildren(...metrics.map((name) => element("option", { value: name }, name)));
  byId("metric").addEventListener("change", drawLearning);
  for (const radio of document.querySelectorAll('input[name="run"]')) {
    radio.addEventListener("change", () => { state.run = Number(radio.value); drawRun(); });
  }
  byId("slider").addEventListener("input", () => showRound(Number(byId("slider").value)));
  const step = (by) => () => {
    const last = runs[state.run].round.length - 1;
    showRound(Math.min(Math.max(state.round + by, 0), last));
  };
  byId("previous").addEventListener("click", step(-1));
  byId("next").addEventListener("click", step(1));
  for (const figure of document.querySelectorAll("figure")) {
    const name = figure.querySelector("figcaption").textContent;
    const button = element("button", { type: "button", class: "save", "aria-label": `Save as an image: ${name}` }, "PNG");
    button.addEventListener("click", () => save(`${name}.png`, asImage(figure.querySelector("canvas"))));
    figure.querySelector("figcaption").append(button);
  }
  byId("table").addEventListener("click", () => {
    const run = runs[state.run];
    save(`${run.name}.csv`, URL.createObjectURL(new Blob([asTable(run)], { type: "text/csv" })));
  });
  if (metrics.length) drawLearning();
  drawRun();
  document.documentElement.dataset.ready = "yes";
})();
