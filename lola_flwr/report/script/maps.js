// Who trains what.

const byDevice = heatMap("by-device", "Block of each device by round");
const meetings = heatMap("meetings", "Accepted updates by device and block");

function drawMaps() {
  const run = runs[state.run];
  const cells = [];
  const partAt = new Map();
  const fills = Array.from({ length: run.num_blocks }, (_, block) => blockColor(run, block));
  const counts = new Map(run.meetings.map(([row, block, count]) => [`${row} ${block}`, count]));
  run.detailed.forEach((index, column) => {
    for (const part of parts(run, index)) {
      const [row, block] = [run.device[part], run.block[part]];
      const lost = !accepted(run, part);
      cells.push({ row, column, fill: fills[block], lost });
      partAt.set(row * run.detailed.length + column, part);
    }
  });
  byDevice.draw({
    rows: run.devices, columns: run.detailed.map((index) => String(run.round[index])), cells,
    summary: `${run.devices.length} devices over ${run.detailed.length} rounds`,
    describe: (row, column) => {
      const part = partAt.get(row * run.detailed.length + column);
      const where = `${run.devices[row]}, round ${run.round[run.detailed[column]]}`;
      return part === undefined ? `${where}: not asked` :
        `${where}: block ${run.numbers[part]}, depth ${run.num_blocks - run.block[part]}` +
        (accepted(run, part) ? "" : ` (${run.statuses[run.status[part]]})`);
    },
    choose: (_, column) => { showRound(run.detailed[column]); byId("round").scrollIntoView(); },
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
