// One round, and memory: rows with a bar each.

function showRound(index) {
  state.round = index;
  const { detailed } = runs[state.run];
  byId("slider").value = Math.max(detailed.findLastIndex((shown) => shown <= index), 0);
  drawRound();
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
  if (!run.detailed.includes(index)) {
    byId("round-title").textContent = `${title}: ${format(planned, "s")} planned` +
      (run.is_plan ? "" : `, ${format(run.observed_s[index], "s")} observed`) + "; what each device did is in rounds.jsonl";
    place.replaceChildren();
    return;
  }
  const total = (part) => run.downlink_s[part] + run.compute_s[part] + run.turn_s[part] + run.upload_s[part];
  const longest = Math.max(...active.map(total), ...active.map((p) => run.downlink_s[p] + (run.reported_s[p] || 0) + run.turn_s[p] + run.upload_s[p]));
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
      const began = run.downlink_s[part];
      if (began) bar(used ? "downlink" : "lost", 0, began);
      bar(used ? "compute" : "lost", began, run.compute_s[part]);
      bar(used ? "upload" : "lost", began + run.compute_s[part] + run.turn_s[part], run.upload_s[part]);
      if (run.reported_s[part] !== null) track.append(mark("reported", percent(began + run.reported_s[part])));
      if (bound !== null) track.append(mark("bound", percent(bound)));
      track.title = (began ? `downlink ${format(began, "s")}, ` : "") + `compute ${format(run.compute_s[part], "s")}` +
        (run.reported_s[part] === null ? "" : ` (reported ${format(run.reported_s[part], "s")})`) +
        (run.turn_s[part] ? `, waits for its turn ${format(run.turn_s[part], "s")}` : "") +
        `, upload ${format(run.upload_s[part], "s")}` +
        (run.measured_upload_s[part] === null ? "" : ` (measured ${format(run.measured_upload_s[part], "s")})`);
      const alone = slowest.length === 1 && slowest[0] === part;
      return row(
        `${alone ? "slowest" : ""} ${used ? "" : "refused"}`,
        run.devices[run.device[part]], `${run.numbers[part]} (depth ${run.num_blocks - run.block[part]})`,
        `${format(100 * run.share[part])} %`, track,
        used ? format(total(part), "s") : run.statuses[run.status[part]],
      );
    }),
  );
}

// A line in a track, which ends where it stands: at the track's end it is seen, too.
function mark(name, place) {
  return element("span", { class: name, style: `left:max(0px, calc(${place} - 2px))` });
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

function drawMemory() {
  const run = runs[state.run];
  const place = byId("memory-bars");
  if (!run.memory.length) { place.replaceChildren("This run's log holds no memory figures."); return; }
  const largest = Math.max(...run.memory.map(([, needed, offered]) => Math.max(needed, offered)));
  // Those nearest to their limit come first.
  const used = ([, needed, offered]) => needed / offered;
  const rows = [...run.memory].sort((a, b) => used(b) - used(a)).map(([device, needed, offered, numbers, peak]) => {
    const track = element("span", { class: "track" });
    track.style.width = `${(100 * offered) / largest}%`;
    const over = needed > offered;
    track.append(element("span", { class: over ? "lost" : "upload", style: `left:0;width:${(100 * needed) / offered}%` }));
    track.title = `block ${numbers} needs ${bytes(needed)}; the device offers ${bytes(offered)}`;
    if (peak !== null) {
      track.append(mark("reported", `${Math.min((100 * peak) / offered, 100)}%`));
      track.title += `; measured peak ${bytes(peak)}`;
    }
    return row(over ? "over" : "", run.devices[device], bytes(needed), `of ${bytes(offered)}`, track,
      `${format(+(100 * needed / offered).toPrecision(3))} %`);
  });
  place.replaceChildren(header("device", "needed", "offered", "", "used"), ...rows);
}
