// Rows and columns of cells on a canvas.

const LETTERS = "11px system-ui, sans-serif";

// A canvas of rows × columns cells; describe(row, column) says what a cell is.
function heatMap(id, label) {
  const canvas = byId(id);
  const map = { rows: 0, columns: 0, at: [0, 0], draw, show };
  let options = null;
  const gutter = { left: 0, bottom: 20 };

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
    const pen = canvas.getContext("2d");
    const names = shortened(options.rows, 16);
    pen.font = LETTERS;
    gutter.left = 10 + Math.max(0, ...names.map((name) => pen.measureText(name).width));
    map.height = Math.min(Math.max(Math.floor(420 / map.rows), 7), 22);
    map.width = Math.min((width - gutter.left - 4) / map.columns, 26);
    const height = map.rows * map.height + gutter.bottom;
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    [canvas.width, canvas.height] = [width * ratio, height * ratio];
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
    pen.font = LETTERS;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const every = Math.ceil(12 / map.height);
    names.forEach((name, i) => {
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
