// Where one is and where to go next: the place in the address, odd nuclei in turn, search by id.

const NEAR_PX = 500; // Width of what is seen around a nucleus that was looked for, in µm it is multiplied by 0.25.
const LABELS = { uncertain: "least sure", disputed: "disputed by the paths", largest: "largest" };
const $ = (id) => document.getElementById(id);

export class Finder {
  // viewer: OpenSeadragon; seen: a function that gives what is seen; choose: called with the row of a nucleus;
  // trouble: called with words.
  constructor(facts, viewer, seen, choose, trouble) {
    Object.assign(this, { facts, viewer, seen, choose, trouble });
    this.lists = {};
    this.at = {};
    viewer.addHandler("open", () => this.go(location.hash, true));
    viewer.addHandler("animation-finish", () => this.note());
    addEventListener("hashchange", () => this.go(location.hash));
    for (const by of Object.keys(LABELS)) $(`next-${by}`).addEventListener("click", () => this.next(by));
    $("find").addEventListener("submit", (event) => { event.preventDefault(); this.find($("find-id").value); });
  }

  // Keep the place in the address, so that it can be sent to somebody or marked.
  note() {
    const seen = this.seen();
    if (!seen) return;
    const [x0, y0, x1, y1] = seen.box;
    history.replaceState(null, "", `#x=${Math.round((x0 + x1) / 2)}&y=${Math.round((y0 + y1) / 2)}&w=${Math.round(x1 - x0)}`);
  }

  // Go to a place as the address has it: centre and width in pixels of level 0.
  go(hash, at_once = false) {
    const asked = new URLSearchParams(hash.slice(1));
    const [x, y, w] = ["x", "y", "w"].map((name) => Number(asked.get(name)));
    if (asked.has("x") && asked.has("y") && [x, y].every(Number.isFinite)) this.show(x, y, w > 0 ? w : undefined, at_once);
  }

  show(x, y, width = (NEAR_PX * 0.25) / this.facts.mpp, at_once = false) {
    const port = this.viewer.viewport, size = port.getContainerSize();
    const height = (width * size.y) / size.x;
    port.fitBounds(port.imageToViewportRectangle(x - width / 2, y - height / 2, width, height), at_once);
  }

  async next(by) {
    this.lists[by] ??= await this.ask(`ranked.json?by=${by}`).then((found) => found?.cells);
    const cells = this.lists[by];
    if (!cells) return;
    if (!cells.length) return this.trouble(`No nucleus is ${LABELS[by]}.`, 4000);
    this.at[by] = ((this.at[by] ?? -1) + 1) % cells.length;
    const [row, x, y] = cells[this.at[by]];
    $("found").textContent = `${LABELS[by]}: ${this.at[by] + 1} of ${cells.length}`;
    this.show(x, y);
    this.choose(row);
  }

  async find(id) {
    if (!id.trim()) return;
    const found = await this.ask(`find.json?id=${encodeURIComponent(id.trim())}`);
    if (!found) return;
    const [row, x, y] = found.cells[0];
    $("found").textContent = "";
    this.show(x, y);
    this.choose(row);
  }

  async ask(address) {
    const answer = await fetch(address);
    if (answer.ok) return answer.json();
    this.trouble((await answer.text()).trim(), 6000);
    return null;
  }
}
