// Nuclei over the slide, on a canvas of their own: outlines, points, or how many there are on a grid.

const RADIUS_UM = 3, LEAST_RADIUS_PX = 2;
// Lines grow with the nuclei up to this, or a crowd of small ones would be paint.
const LINE_PX = 1.75, LINE_UM = 0.9, LEAST_LINE_PX = 0.8;

export class Overlay {
  // host: the element of the viewer; facts: what facts.json says.
  constructor(host, facts) {
    this.facts = facts;
    this.canvas = document.createElement("canvas");
    this.canvas.className = "overlay";
    this.canvas.setAttribute("aria-hidden", "true");
    host.append(this.canvas);
    this.on = true;
    this.filled = false;
    this.paths = null;
    this.regions = { tissue: [], artefacts: [] };
    this.layers = { tissue: false, artefacts: false };
  }

  fit(width, height) {
    const ratio = window.devicePixelRatio || 1;
    const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== w || this.canvas.height !== h) [this.canvas.width, this.canvas.height] = [w, h];
    this.ratio = ratio;
  }

  // Join the outlines of each mark into one path; again whenever cells or decisions change.
  build(cells) {
    this.paths = null;
    const d = cells.data;
    if (!cells.marks || !d.ring) return;
    this.paths = this.facts.classes.concat(0, 0).map(() => new Path2D());
    const scored = cells.scored();
    for (let i = 0; i < d.n; i++) {
      if (!scored(i)) continue;
      const path = this.paths[cells.marks[i]];
      for (let v = d.start[i]; v < d.start[i + 1]; v++) {
        if (v === d.start[i]) path.moveTo(d.ring[2 * v], d.ring[2 * v + 1]);
        else path.lineTo(d.ring[2 * v], d.ring[2 * v + 1]);
      }
      path.closePath();
    }
  }

  // view: {scale, x, y}, screen = slide * scale + (x, y); marks: [{color, shown, dashed}]; chosen: index of a cell or -1.
  draw(cells, view, marks, chosen) {
    const c = this.canvas.getContext("2d");
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.drawRegions(c, view);
    const d = cells.data;
    if (!d || !this.on) return;
    const s = view.scale * this.ratio;
    const at = [(d.box[0] * view.scale + view.x) * this.ratio, (d.box[1] * view.scale + view.y) * this.ratio];
    if (d.form === "density") return this.grid(c, d, s, at, marks);
    if (this.paths) this.outlines(c, s, at, marks);
    else this.points(c, cells, s, at, marks);
    if (chosen >= 0) this.ring(c, d, s, at, chosen);
  }

  // Regions in pixels of level 0: the tissue as a line, what is no clean tissue dashed and shaded.
  drawRegions(c, view) {
    const s = view.scale * this.ratio;
    c.setTransform(s, 0, 0, s, view.x * this.ratio, view.y * this.ratio);
    const shown = [];
    if (this.layers.tissue) shown.push(...this.regions.tissue.map((rings) => ({ rings, color: "#0550ae", dash: [], fill: false })));
    if (this.layers.artefacts) shown.push(...this.regions.artefacts.map(({ rings }) => ({ rings, color: "#b35900", dash: [8, 5], fill: true })));
    for (const { rings, color, dash, fill } of shown) {
      const path = new Path2D();
      for (const ring of rings) ring.forEach(([x, y], i) => (i ? path.lineTo(x, y) : path.moveTo(x, y)));
      c.strokeStyle = c.fillStyle = color;
      c.lineWidth = (2 * this.ratio) / s;
      c.setLineDash(dash.map((length) => (length * this.ratio) / s));
      if (fill) { c.globalAlpha = 0.2; c.fill(path, "evenodd"); c.globalAlpha = 1; }
      c.stroke(path);
    }
    c.setLineDash([]);
    c.setTransform(1, 0, 0, 1, 0, 0);
  }

  outlines(c, s, at, marks) {
    c.setTransform(s, 0, 0, s, at[0], at[1]);
    c.lineJoin = "round";
    const px = this.ratio / s;
    const line = Math.min(LINE_PX, Math.max(LEAST_LINE_PX, (LINE_UM / this.facts.mpp / px))) * px;
    this.paths.forEach((path, k) => {
      if (!marks[k].shown) return;
      // A pale edge first: dark lines are lost on dark nuclei.
      c.setLineDash([]);
      [c.strokeStyle, c.lineWidth] = ["rgba(255,255,255,.55)", 1.8 * line];
      c.stroke(path);
      c.setLineDash(marks[k].dashed ? [4 * px, 3 * px] : []);
      [c.strokeStyle, c.lineWidth] = [marks[k].color, line];
      c.stroke(path);
      if (marks[k].hatched) {
        c.fillStyle = hatch(c, marks[k].color, 1 / s);
        c.fill(path);
      } else if (this.filled && !marks[k].dashed) {
        [c.fillStyle, c.globalAlpha] = [marks[k].color, 0.3];
        c.fill(path);
        c.globalAlpha = 1;
      }
    });
  }

  points(c, cells, s, at, marks) {
    const d = cells.data, scored = cells.scored();
    const r = Math.max(LEAST_RADIUS_PX * this.ratio, (RADIUS_UM / this.facts.mpp) * s * 0.5);
    marks.forEach((mark, k) => {
      if (!mark.shown) return;
      const path = new Path2D();
      for (let i = 0; i < d.n; i++) {
        if (cells.marks[i] !== k || !scored(i)) continue;
        const x = d.xy[2 * i] * s + at[0], y = d.xy[2 * i + 1] * s + at[1];
        if (x < -r || y < -r || x > this.canvas.width + r || y > this.canvas.height + r) continue;
        path.moveTo(x + r, y);
        path.arc(x, y, r, 0, 2 * Math.PI);
      }
      c.globalAlpha = mark.dashed ? 0.6 : 1;
      c.fillStyle = mark.color;
      c.fill(path);
      [c.strokeStyle, c.lineWidth] = ["rgba(255,255,255,.8)", this.ratio * 0.75];
      if (r > 2.5 * this.ratio) c.stroke(path);
    });
    c.globalAlpha = 1;
  }

  // A square of the grid has the colour of the class that most of its shown cells are of, the denser the stronger. Cells
  // without a class colour a square only where there are no others.
  grid(c, d, s, at, marks) {
    const image = new ImageData(d.cols, d.rows), size = d.rows * d.cols;
    const groups = [false, true].map((dashed) => marks.map((m, k) => k).filter((k) => marks[k].shown && marks[k].dashed === dashed));
    const picked = groups.map((group) => strongest(d.counts, size, group));
    const most = Math.max(1, ...picked.map(({ most }) => most)), colors = marks.map((m) => channels(m.color));
    for (let b = 0; b < size; b++) {
      const found = picked.find(({ best }) => best[b] >= 0);
      if (!found) continue;
      image.data.set([...colors[found.best[b]], 50 + 165 * Math.sqrt(found.total[b] / most)], 4 * b);
    }
    const small = new OffscreenCanvas(d.cols, d.rows);
    small.getContext("2d").putImageData(image, 0, 0);
    c.imageSmoothingEnabled = false;
    c.drawImage(small, at[0], at[1], d.cols * d.bin * s, d.rows * d.bin * s);
  }

  // A double ring about the nucleus that was chosen.
  ring(c, d, s, at, chosen) {
    c.setTransform(1, 0, 0, 1, 0, 0);
    const x = d.xy[2 * chosen] * s + at[0], y = d.xy[2 * chosen + 1] * s + at[1];
    const r = Math.max(12 * this.ratio, (9 / this.facts.mpp) * s);
    for (const [color, width] of [["#000", 4], ["#ffd400", 2]]) {
      c.beginPath();
      c.arc(x, y, r, 0, 2 * Math.PI);
      [c.strokeStyle, c.lineWidth] = [color, width * this.ratio];
      c.setLineDash([]);
      c.stroke();
    }
  }
}

// Of each square of the grid the mark of `group` with most cells (-1: none) and how many the group has there.
function strongest(counts, size, group) {
  const best = new Int16Array(size).fill(-1), total = new Uint32Array(size);
  let most = 0;
  for (let b = 0; b < size; b++) {
    let top = 0;
    for (const k of group) {
      const n = counts[k * size + b];
      total[b] += n;
      if (n > top) [top, best[b]] = [n, k];
    }
    if (total[b] > most) most = total[b];
  }
  return { best, total, most };
}

// Slanting lines in a colour; `px` is a pixel of the canvas in the units of the path.
function hatch(c, color, px) {
  const small = new OffscreenCanvas(8, 8), p = small.getContext("2d");
  p.strokeStyle = color;
  p.lineWidth = 1.5;
  for (const x of [-4, 4, 12]) {
    p.moveTo(x - 4, 8);
    p.lineTo(x + 4, 0);
  }
  p.stroke();
  const pattern = c.createPattern(small, "repeat");
  pattern.setTransform(new DOMMatrix().scale(px));
  return pattern;
}

function channels(color) {
  const value = parseInt(color.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}
