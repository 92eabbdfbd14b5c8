// Lines over numbers, by uPlot.

const DASHED = [10, 5], DOTTED = [2, 4];
const DASHES = [undefined, DASHED, DOTTED];
const LEGEND_DASH = { 10: "dashed", 2: "dotted" };
const WHOLE = [1, 2, 5].flatMap((digit) => [1, 10, 100, 1e3, 1e4, 1e5].map((power) => digit * power))
  .sort((a, b) => a - b);

const charts = {};

// Names of lines that lie on one another wherever both are known, and somewhere are.
function coinciding(lines, tolerance) {
  const isKnown = (value) => value !== null && value !== undefined;
  const alike = ([, one], [, other]) => {
    const both = one.map((_, i) => i).filter((i) => isKnown(one[i]) && isKnown(other[i]));
    return both.length > 0 && both.every((i) => Math.abs(one[i] - other[i]) <= tolerance * Math.abs(other[i]));
  };
  const groups = [];
  for (const line of lines) {
    const group = groups.find(([first]) => alike(first, line));
    if (group) group.push(line);
    else groups.push([line]);
  }
  return groups.filter((group) => group.length > 1).map((group) => group.map(([name]) => name));
}

const together = (names) => `${names.slice(0, -1).join(", ")} and ${names.at(-1)} coincide`;

function lineChart(id, label) {
  const place = byId(id);
  const chart = { plot: null, lines: [], draw, table: () => [] };
  charts[id] = chart;
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
    chart.lines = series;
    chart.table = () => [
      [label, ...series.map((one) => one.label)],
      ...data[0].map((_, row) => data.map((values) => values[row])),
    ];
    const few = data[0].length < 40;
    // One point alone is no line: points that lie on one another are rings then.
    const size = (place) => (data[0].length > 1 ? 6 : 12 + 6 * (series.length - 1 - place));
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
          ...series.map((one, place) => ({
            label: one.label, width: 2, dash: one.dash, spanGaps: true,
            stroke: () => color(one.color),
            points: { show: few || undefined, size: size(place), fill: () => color(one.color), stroke: () => color("panel"), width: 1 },
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
