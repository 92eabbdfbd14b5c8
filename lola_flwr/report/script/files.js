// What can be saved: images, drawings and tables.

function save(name, url) {
  const link = element("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

const saveText = (name, type, text) => save(name, URL.createObjectURL(new Blob([text], { type })));

function saveButton(kind, name, act) {
  const button = element("button", { type: "button", class: "save", "aria-label": `Save as ${kind}: ${name}` }, kind);
  button.addEventListener("click", act);
  return button;
}

// A chart under its name and its lines' names; it has no background of its own.
function asImage(canvas, name, lines) {
  const ratio = window.devicePixelRatio || 1;
  const [left, high] = [12, 20];
  const head = 8 + high * (1 + lines.length);
  const copy = element("canvas", { width: canvas.width, height: canvas.height + head * ratio });
  const pen = copy.getContext("2d");
  pen.fillStyle = color("panel");
  pen.fillRect(0, 0, copy.width, copy.height);
  pen.drawImage(canvas, 0, head * ratio);
  pen.scale(ratio, ratio);
  pen.textBaseline = "middle";
  pen.lineWidth = 2;
  pen.font = "13px system-ui, sans-serif";
  pen.fillStyle = color("text");
  pen.fillText(name, left, 4 + high / 2);
  lines.forEach((line, place) => {
    const y = 4 + high * (place + 1.5);
    pen.strokeStyle = color(line.color);
    pen.setLineDash(line.dash || []);
    pen.beginPath();
    pen.moveTo(left, y);
    pen.lineTo(left + 28, y);
    pen.stroke();
    pen.fillText(line.label, left + 36, y);
  });
  return copy.toDataURL("image/png");
}

// Rows with bars as a drawing: every box where it stands, every text in its box.
function asDrawing(place) {
  const NS = "http://www.w3.org/2000/svg";
  const frame = place.getBoundingClientRect();
  const [width, height] = [place.scrollWidth, place.scrollHeight];
  const drawing = document.createElementNS(NS, "svg");
  const add = (tag, attributes, text = "") => {
    const made = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    drawing.append(made);
  };
  drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const box = (rect, fill) => add("rect", {
    x: rect.left - frame.left, y: rect.top - frame.top + place.scrollTop,
    width: Math.max(rect.width, 2), height: rect.height, fill,
  });
  add("rect", { width, height, fill: color("panel") });
  const inside = document.createRange();
  for (const cell of place.querySelectorAll("[role=cell], [role=columnheader]")) {
    const rect = cell.getBoundingClientRect();
    if (!rect.width) continue;
    if (cell.classList.contains("track")) {
      box(rect, color("grid"));
      for (const bar of cell.children) box(bar.getBoundingClientRect(), color(bar.className));
      continue;
    }
    inside.selectNodeContents(cell);
    // What takes several lines gets one, of smaller letters.
    const long = [...inside.getClientRects()].reduce((sum, line) => sum + line.width, 0);
    const look = getComputedStyle(cell);
    const right = look.textAlign === "right";
    add("text", {
      x: (right ? rect.right : rect.left) - frame.left,
      y: rect.top - frame.top + place.scrollTop + rect.height / 2,
      "text-anchor": right ? "end" : "start", "dominant-baseline": "central",
      "font-family": "system-ui, sans-serif", "font-weight": look.fontWeight, fill: look.color,
      "font-size": parseFloat(look.fontSize) * Math.min(1, rect.width / Math.max(long, 1)),
    }, cell.textContent);
  }
  return new XMLSerializer().serializeToString(drawing);
}

function asTable(lines) {
  // A text that a spreadsheet would take for a formula stays text.
  const quoted = (value) => (value === null || value === undefined ? "" : /^[=+@-]|[",\n]/.test(value) && isNaN(value)
    ? `"${/^[=+@-]/.test(value) ? "'" : ""}${String(value).replaceAll('"', '""')}"` : String(value));
  return lines.map((line) => line.map(quoted).join(",")).join("\n");
}

function roundsOf(run) {
  const columns = ["downlink_s", "compute_s", "turn_s", "upload_s", "reported_s", "measured_upload_s", "share", "payload_bytes", "received_bytes", "sent_bytes"];
  const lines = [["round", "wireless_s", "device", "block", "status", ...columns]];
  run.round.forEach((round, index) => parts(run, index).forEach((part) => lines.push([
    round, run.wireless_s[index], run.devices[run.device[part]], run.numbers[part], run.statuses[run.status[part]],
    ...columns.map((name) => run[name][part]),
  ])));
  return lines;
}
