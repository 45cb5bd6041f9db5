const data = JSON.parse(by("data").textContent), drifts = JSON.parse(by("drifts").textContent);
const controls = { layer: by("layer"), opacity: by("opacity") };
const SCALE = Math.max(1, Math.ceil(640 / data.width));  // of a canvas over the picture: sharp borders
// what the slider runs over: the layers with maps, and those that something leaves after
const steps = [...new Set([...data.layers, ...data.sites].map(of => of.index))].sort((a, b) => a - b);
const KINDS = [["photo", "photograph"], ["shift", data.score], ["attention", data.attention], ["kept", "what is left"]]
  .filter(([kind]) => kind !== "attention" || data.attention).filter(([kind]) => kind !== "kept" || data.sites.length);
const number = value => Number(value.toPrecision(4)).toString();
const panels = [], means = new Map();

const channels = data.palette.map(text => [1, 3, 5].map(at => parseInt(text.slice(at, at + 2), 16)));
function colour(share) {  // between the palette's colours
  const at = Math.min(Math.max(share, 0), 1) * (channels.length - 1), low = Math.min(Math.floor(at), channels.length - 2);
  return channels[low].map((from, c) => Math.round(from + (at - low) * (channels[low + 1][c] - from)));
}

function current(kind) {  // the layer's maps, or the last site up to it; undefined where there is none
  const index = steps[+controls.layer.value];
  return kind === "kept" ? data.sites.findLast(site => site.index <= index) : data.layers.find(layer => layer.index === index);
}

function grid(kind) {
  return current(kind) || (kind === "kept" ? data.sites[0] : data.layers[0]);
}

function values(panel) {  // of the map that a panel shows; undefined where there is none
  const of = current(panel.kind);
  if (panel.kind === "kept") return of && of.stands[panel.image];
  return (of && of[panel.kind] && of[panel.kind][panel.image]) || undefined;
}

function rectangle(panel, cell) {
  const { rows, columns } = grid(panel.kind), r = Math.floor(cell / (columns.length - 1)), c = cell % (columns.length - 1);
  return [columns[c], rows[r], columns[c + 1] - columns[c], rows[r + 1] - rows[r]];
}

function draw(panel) {
  if (!panel.canvas) return;
  const canvas = panel.canvas.getContext("2d"), map = values(panel), opacity = controls.opacity.value / 100;
  const paint = (cell, rgb, alpha) => {
    canvas.fillStyle = `rgb(${rgb.join(" ")})`;
    canvas.globalAlpha = alpha;
    canvas.fillRect(...rectangle(panel, cell));
    canvas.globalAlpha = 1;
  };
  canvas.setTransform(SCALE, 0, 0, SCALE, 0, 0);
  canvas.clearRect(0, 0, data.width, data.height);
  if (panel.kind === "kept") {
    panel.caption.textContent = map ? amount(current("kept"), "left") : `all ${data.patches} left`;
    if (map) {
      const sizes = counts(map);
      map.forEach((stands, cell) => {
        if (stands < 0) paint(cell, data.cover, opacity);
        else if (sizes.get(stands) > 1) paint(cell, mean(panel, map, stands), opacity);
      });
      borders(panel, canvas, map, sizes);
    }
  } else {
    panel.caption.textContent = panel.name + (map ? "" : panel.kind === "attention" ? " (none: no attention op here)" : " (none asked for)");
    if (map) map.values.forEach((value, cell) => {
      if (value !== null) paint(cell, colour((value - map.low) / (map.high - map.low || 1)), opacity);
    });
    panel.ends.replaceChildren(...(map ? [number(map.low), `≥ ${number(map.high)}`] : []).map(text => make("span", { textContent: text })));
  }
  if (panel.cell !== null) for (const cell of together(panel)) outline(canvas, ...rectangle(panel, cell));
  read(panel);
}

function amount(site, words) {
  return data.merges ? `${site.left} tokens ${words} of ${site.of} ${data.patches}` : `${site.left} of ${site.of} ${data.patches} ${words}`;
}

function counts(stands) {
  const found = new Map();
  for (const cell of stands) found.set(cell, (found.get(cell) || 0) + 1);
  return found;
}

function mean(panel, stands, group) {  // the colour of the picture over the patches that became one token
  const key = `${panel.image} ${current("kept").index} ${group}`;
  if (!means.has(key)) {
    const sum = [0, 0, 0, 0];
    stands.forEach((cell, at) => {
      if (cell !== group) return;
      const pixels = panel.pixels().getImageData(...rectangle(panel, at)).data;
      for (let i = 0; i < pixels.length; i += 4) for (let c = 0; c < 4; c++) sum[c] += pixels[i + c];
    });
    means.set(key, sum.slice(0, 3).map(c => Math.round(255 * c / sum[3])));
  }
  return means.get(key);
}

function borders(panel, canvas, stands, sizes) {  // around what became one token
  const { columns } = grid("kept"), width = columns.length - 1, group = cell => sizes.get(stands[cell]) > 1 && stands[cell] >= 0;
  const lines = new Path2D();
  stands.forEach((mine, cell) => {
    const [x, y, w, h] = rectangle(panel, cell);
    const split = other => (group(cell) || group(other)) && stands[other] !== mine;
    if ((cell + 1) % width && split(cell + 1)) { lines.moveTo(x + w, y); lines.lineTo(x + w, y + h); }
    if (cell + width < stands.length && split(cell + width)) { lines.moveTo(x, y + h); lines.lineTo(x + w, y + h); }
  });
  [["#000", 7], ["#fff", 4]].forEach(([style, wide]) => {  // seen on every colour
    canvas.strokeStyle = style;
    canvas.lineWidth = wide / SCALE;
    canvas.stroke(lines);
  });
}

function outline(canvas, x, y, w, h) {
  [["#fff", 1], ["#000", 3]].forEach(([style, inside]) => {
    canvas.strokeStyle = style;
    canvas.lineWidth = 2 / SCALE;
    canvas.strokeRect(x + inside / SCALE, y + inside / SCALE, w - 2 * inside / SCALE, h - 2 * inside / SCALE);
  });
}

function together(panel) {  // the cell that is pointed at, and those that are one token with it
  const stands = panel.kind === "kept" ? values(panel) : undefined;
  if (!stands || stands[panel.cell] < 0) return [panel.cell];
  return [...stands.keys()].filter(cell => stands[cell] === stands[panel.cell]);
}

function read(panel) {  // what stands at the cell under the pointer, or that the arrow keys chose
  const map = values(panel), width = grid(panel.kind).columns.length - 1;
  panel.reading.textContent = "";
  if (panel.cell === null || (panel.kind !== "kept" && !map)) return;
  const place = `row ${Math.floor(panel.cell / width)}, column ${panel.cell % width}: `;
  if (panel.kind === "kept") {
    const size = together(panel).length;
    panel.reading.textContent = place + (map && map[panel.cell] < 0 ? "has left" : size > 1 ? `one token with ${size - 1} more` : "left");
    return;
  }
  const value = map.values[panel.cell], drawn = map.values.filter(v => v !== null);
  if (value !== null) panel.reading.textContent = `${place}${number(value)}, rank ${1 + drawn.filter(v => v > value).length} of ${drawn.length}`;
}

function choose(panel, cell) {  // in all panels of that picture that have the same patches
  const shape = kind => String([grid(kind).rows, grid(kind).columns]);
  for (const other of panels.filter(other => other.canvas && other.image === panel.image)) {
    other.cell = shape(other.kind) === shape(panel.kind) ? cell : null;
    draw(other);
  }
}

function point(panel, event) {
  const box = panel.canvas.getBoundingClientRect(), { rows, columns } = grid(panel.kind);
  const find = (edges, at) => edges.findLastIndex(edge => edge <= at);
  const r = find(rows, (event.clientY - box.top) / box.height * data.height);
  const c = find(columns, (event.clientX - box.left) / box.width * data.width);
  const inside = r >= 0 && c >= 0 && r < rows.length - 1 && c < columns.length - 1;
  choose(panel, inside ? r * (columns.length - 1) + c : null);
}

function step(panel, event) {
  const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!move) return;
  event.preventDefault();
  const { rows, columns } = grid(panel.kind), width = columns.length - 1, last = [rows.length - 2, width - 1];
  if (panel.cell === null) return choose(panel, 0);
  const [r, c] = [Math.floor(panel.cell / width), panel.cell % width].map((at, side) => Math.min(Math.max(at + move[side], 0), last[side]));
  choose(panel, r * width + c);
}

function show() {
  const index = steps[+controls.layer.value], site = current("kept"), layer = current("shift");
  by("layer-name").textContent = `${data.unit} ${index}`;
  controls.layer.setAttribute("aria-valuetext", by("layer-name").textContent);
  by("opacity-name").textContent = `${controls.opacity.value}%`;
  let left = "";
  if (data.sites.length) {
    const before = data.sites.findLast(s => s.index < index);
    left = site ? amount(site, "are left") : "nothing has left yet";
    if (site && site.index === index && data.unit === "block")  // each stage of a CNN has cells of its own
      left = `${(before ? before.left : site.of) - site.left} ${data.patches} ${!data.merges ? "leave" : data.leaves ? "leave or merge into others" : "merge into others"} here, ${left}`;
  }
  by("now").textContent = [layer && layer.where, left].filter(Boolean).join(": ");
  for (const panel of panels) {
    panel.cell = null;
    panel.figure.hidden = !by(`show-${panel.kind}`).checked;
    draw(panel);
  }
}

controls.layer.max = steps.length - 1;
controls.layer.value = data.sites.length ? steps.indexOf(data.sites.at(-1).index) : 0;
if (data.sites.length)  // a mark where something leaves
  controls.layer.after(make("datalist", { id: "cuts" }, ...data.sites.map(site => make("option", { value: steps.indexOf(site.index) }))));
for (const [kind, name] of KINDS)
  by("shown").append(make("label", {}, make("input", { type: "checkbox", id: `show-${kind}`, checked: true }), name));
by("images").className = data.images.length === 1 ? "one" : "";
data.images.forEach((image, index) => {
  const drift = drifts[index] === null ? [] : [make("p", { className: "over", textContent: `drift of the output ${number(drifts[index])}` })];
  const section = make("section", {}, make("header", {}, make("h3", { textContent: image.name }), ...drift));
  for (const [kind, name] of KINDS) {
    const photo = make("img", { src: image.source, alt: kind === "photo" ? `The photograph ${image.name}` : "", className: kind === "shift" || kind === "attention" ? "grey" : "" });
    const caption = make("figcaption", { textContent: name }), view = make("div", { className: "view" }, photo);
    const figure = make("figure", {}, caption, view);
    figure.dataset.kind = kind;
    const panel = { kind, name, image: index, figure, caption, canvas: null, cell: null };
    if (kind !== "photo") {
      panel.canvas = make("canvas", { width: data.width * SCALE, height: data.height * SCALE, tabIndex: 0 });
      panel.canvas.setAttribute("role", "img");
      panel.canvas.setAttribute("aria-label", `${name} over ${image.name}; arrow keys read single ${data.patches}`);
      panel.reading = make("p", { className: "reading" });
      panel.reading.setAttribute("aria-live", "polite");
      view.append(panel.canvas);
      if (kind !== "kept") {
        panel.ends = make("div", { className: "ends" });
        const bar = make("div", { className: "scale" });
        bar.style.background = `linear-gradient(to right, ${data.palette.join(", ")})`;
        figure.append(bar, panel.ends);
      }
      figure.append(panel.reading);
      panel.canvas.addEventListener("pointermove", event => point(panel, event));
      panel.canvas.addEventListener("pointerleave", () => choose(panel, null));
      panel.canvas.addEventListener("keydown", event => step(panel, event));
      panel.pixels = () => {
        if (!panel.source) {
          panel.source = make("canvas", { width: data.width, height: data.height }).getContext("2d", { willReadFrequently: true });
          panel.source.drawImage(photo, 0, 0);
        }
        return panel.source;
      };
    }
    panels.push(panel);
    section.append(figure);
  }
  by("images").append(section);
});
if (data.width < 200) document.documentElement.style.setProperty("--rendering", "pixelated");
by("controls").addEventListener("input", show);
by("controls").addEventListener("submit", event => event.preventDefault());
Promise.all([...document.images].map(image => image.decode().catch(() => {}))).then(show);
