// What is wrong, marked by hand: nuclei deleted, retyped, added, squares that were checked as a whole; and a ruler.
// Saved as GeoJSON that `cellslide dataset --corrections` and QuPath read. Places are pixels of level 0.

const $ = (id) => document.getElementById(id);
const COLORS = { deleted: "#d1242f", retyped: "#8250df", added: "#1a7f37" };
const CHECKED = "#1a7f37", RULER = "#ffd400", LEAST_PX = 4;

export class Corrector {
  // chosen: a function that gives what is known of the chosen nucleus, or null; seen: what is seen; count: nuclei by mark
  // in a box, or null; draw: called when there is something new to draw; trouble: called with words.
  constructor(facts, viewer, { chosen, seen, count, draw, trouble }) {
    Object.assign(this, { facts, viewer, chosen, seen, count, draw, trouble });
    this.changes = []; // {what, id, x, y, name}, the last of one nucleus holds.
    this.squares = []; // [x0, y0, x1, y1]
    this.done = []; // What undo takes back: the list that grew.
    this.tool = null;
    this.drag = null;
    const names = facts.classes.map((c) => new Option(c.name, c.name));
    $("class-of").append(...(names.length ? names : [new Option("no class", "")]));
    $("delete-it").addEventListener("click", () => this.mark("deleted"));
    $("retype-it").addEventListener("click", () => this.mark("retyped"));
    for (const tool of ["add", "check", "ruler"]) $(`tool-${tool}`).addEventListener("click", () => this.take(tool));
    $("undo").addEventListener("click", () => this.undo());
    viewer.addHandler("canvas-press", (event) => { this.from = this.place(event.position); });
    viewer.addHandler("canvas-drag", (event) => this.pull(event));
    viewer.addHandler("canvas-release", () => this.letGo());
    this.words();
  }

  take(tool) {
    this.tool = this.tool === tool ? null : tool;
    this.drag = null;
    for (const name of ["add", "check", "ruler"]) $(`tool-${name}`).setAttribute("aria-pressed", String(this.tool === name));
    this.draw();
  }

  place({ x, y }) {
    const seen = this.seen();
    return [(x - seen.x) / seen.scale, (y - seen.y) / seen.scale];
  }

  // A click of the viewer while a tool is taken; tells whether it was for the tool.
  click(position) {
    if (this.tool !== "add") return this.tool !== null;
    const [x, y] = this.place(position);
    this.push(this.changes, { what: "added", id: "", x, y, name: $("class-of").value });
    return true;
  }

  mark(what) {
    const obs = this.chosen();
    if (!obs) return this.trouble("Choose a nucleus first.", 4000);
    const name = what === "retyped" ? $("class-of").value : obs.class ?? "";
    this.push(this.changes, { what, id: obs.uuid, x: obs.x, y: obs.y, name });
  }

  pull(event) {
    if (this.tool !== "check" && this.tool !== "ruler") return;
    event.preventDefaultAction = true;
    this.drag = [...this.from, ...this.place(event.position)];
    this.draw();
    this.say();
  }

  letGo() {
    if (this.tool !== "check" || !this.drag) return;
    const [a, b, c, d] = this.drag, { width, height } = this.facts;
    const inside = (v, most) => Math.min(Math.max(v, 0), most);
    const box = [inside(Math.min(a, c), width), inside(Math.min(b, d), height), inside(Math.max(a, c), width), inside(Math.max(b, d), height)];
    this.drag = null;
    if ((box[2] - box[0]) * this.seen().scale >= LEAST_PX && (box[3] - box[1]) * this.seen().scale >= LEAST_PX) this.push(this.squares, box);
  }

  push(list, item) {
    list.push(item);
    this.done.push(list);
    this.words();
    this.draw();
  }

  undo() {
    this.done.pop()?.pop();
    this.words();
    this.draw();
  }

  // The change of each nucleus that holds; added ones all do.
  held() {
    const last = new Map();
    this.changes.forEach((change, k) => last.set(change.id || `added ${k}`, change));
    return [...last.values()];
  }

  um(px) {
    const um = px * this.facts.mpp;
    return um >= 1000 ? `${(um / 1000).toPrecision(4)} mm` : `${um.toPrecision(3)} µm`;
  }

  // What a square holds, or how long the ruler is.
  say() {
    const [a, b, c, d] = this.drag ?? this.squares.at(-1) ?? [];
    if (this.drag && this.tool === "ruler") { $("measured").textContent = this.um(Math.hypot(c - a, d - b)); return; }
    if (a === undefined) { $("measured").textContent = ""; return; }
    const box = [Math.min(a, c), Math.min(b, d), Math.max(a, c), Math.max(b, d)], counts = this.count(box);
    const names = [...this.facts.classes.map((one) => one.name), "abstained", "no class"];
    const mm2 = ((box[2] - box[0]) * (box[3] - box[1]) * this.facts.mpp ** 2) / 1e6;
    const held = counts ? names.map((name, k) => [name, counts[k]]).filter(([, n]) => n).map(([name, n]) => `${name} ${n}`).join(", ") || "no nucleus" : "zoom in to count";
    $("measured").textContent = `${this.um(box[2] - box[0])} × ${this.um(box[3] - box[1])}, ${mm2.toPrecision(3)} mm²: ${held}`;
  }

  words() {
    const held = this.held();
    const parts = Object.keys(COLORS).map((what) => [what, held.filter((one) => one.what === what).length]).filter(([, n]) => n);
    $("corrected").textContent = [...parts.map(([what, n]) => `${n} ${what}`), ...(this.squares.length ? [`${this.squares.length} checked`] : [])].join(", ");
    $("undo").disabled = !this.done.length;
    const link = $("save");
    link.hidden = !this.done.length;
    link.download = `${this.facts.slide}.geojson`;
    link.href = `data:application/geo+json,${encodeURIComponent(JSON.stringify(this.geojson()))}`;
    this.say();
  }

  geojson() {
    const [dx, dy] = this.facts.origin, at = (v) => Math.round(100 * v) / 100;
    const point = ({ what, id, x, y, name }) => ({
      type: "Feature", ...(id ? { id } : {}), geometry: { type: "Point", coordinates: [at(x - dx), at(y - dy)] },
      properties: { objectType: "detection", correction: what, ...(name ? { classification: { name } } : {}) },
    });
    const square = ([x0, y0, x1, y1]) => ({
      type: "Feature",
      geometry: { type: "Polygon", coordinates: [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]].map(([x, y]) => [at(x - dx), at(y - dy)])] },
      properties: { objectType: "annotation", classification: { name: "checked" } },
    });
    return { type: "FeatureCollection", features: [...this.squares.map(square), ...this.held().map(point)] };
  }

  // Over all else on the overlay's canvas; view: screen = slide * scale + (x, y).
  paint(canvas, ratio, view) {
    const c = canvas.getContext("2d"), s = view.scale * ratio, to = (x, y) => [x * s + view.x * ratio, y * s + view.y * ratio];
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.lineWidth = 2.5 * ratio;
    const frames = this.drag && this.tool === "check" ? [...this.squares, this.drag] : this.squares;
    c.strokeStyle = CHECKED;
    for (const [a, b, x, y] of frames) c.strokeRect(...to(a, b), (x - a) * s, (y - b) * s);
    for (const { what, x, y } of this.held()) {
      const [px, py] = to(x, y), r = Math.max(7 * ratio, (5 / this.facts.mpp) * s);
      c.strokeStyle = COLORS[what];
      c.beginPath();
      if (what === "deleted") { c.moveTo(px - r, py - r); c.lineTo(px + r, py + r); c.moveTo(px + r, py - r); c.lineTo(px - r, py + r); }
      else c.arc(px, py, r, 0, 2 * Math.PI);
      c.stroke();
    }
    if (!this.drag || this.tool !== "ruler") return;
    for (const [color, width] of [["#000", 5], [RULER, 2.5]]) {
      [c.strokeStyle, c.lineWidth] = [color, width * ratio];
      c.beginPath();
      c.moveTo(...to(this.drag[0], this.drag[1]));
      c.lineTo(...to(this.drag[2], this.drag[3]));
      c.stroke();
    }
  }
}
