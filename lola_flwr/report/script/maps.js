// Who trains what.

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
      said.set(`${row} ${index}`, `${run.devices[row]}, round ${round}: block ${run.numbers[part]}, depth ${run.num_blocks - block}` +
        (lost ? ` (${run.statuses[run.status[part]]})` : ""));
      if (lost) continue;
      for (const trained of run.blocks[part]) counts.set(`${row} ${trained}`, (counts.get(`${row} ${trained}`) || 0) + 1);
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
    describe: (row, column) => `${run.devices[row]}, block ${column}: ${counts.get(`${row} ${column}`) || 0} ${run.is_plan ? "times" : "accepted updates"}`,
  });
  const shown = blocks.length > 12 ? blocks.filter((b) => b % Math.ceil(blocks.length / 12) === 0) : blocks;
  byId("depths").replaceChildren("block, from the input on:", ...shown.flatMap((block) => [
    element("span", { class: "entry" },
      element("span", { class: "key", style: `background:${blockColor(run, block)}` }), String(block)),
  ]));
}
