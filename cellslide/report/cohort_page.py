"""A cohort as one self-contained HTML page: a row a slide, sorted and filtered by a small script of its own.

The page loads nothing from elsewhere; its links lead to the slides' folders beside it. Without scripts it is still a
table. Names of slides and words of errors are strangers' text: escaped, and quoted in links.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from cellslide.report.cohort_row import Row

MOST_CLASSES = 8
REPORT = "report.html"

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--dim:#57606a;--line:#d0d7de;--faint:#eaeef2;--ground:#fff;--head:#f6f8fa;
--link:#0550ae;--bad:#b42318;--warn:#a04100;--odd:#7d4e00;--mark:#d4a72c}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--dim:#9da7b3;--line:#3d444d;--faint:#21262d;--ground:#0d1117;
--head:#161b22;--link:#79b8ff;--bad:#ff7b72;--warn:#f0883e;--odd:#e3b341;--mark:#e3b341}}
*{box-sizing:border-box}
body{font:14px/1.4 system-ui,"DejaVu Sans",sans-serif;margin:0;padding:16px 20px;color:var(--ink);
background:var(--ground);display:flex;flex-direction:column;height:100vh;min-height:560px}
h1{font-size:20px;margin:0 0 8px;overflow-wrap:anywhere}.note{color:var(--dim);max-width:1100px;margin:4px 0}
.facts{display:flex;flex-wrap:wrap;gap:8px;margin:8px 0}.facts div{border:1px solid var(--line);border-radius:6px;
padding:4px 12px;background:var(--head)}.facts b{display:block;font-size:18px;font-variant-numeric:tabular-nums}
.find{display:flex;flex-wrap:wrap;gap:6px 14px;align-items:center;margin:8px 0}.find input[type=search]{font:inherit;
padding:4px 8px;width:280px;max-width:100%;border:1px solid var(--dim);border-radius:4px;color:inherit;
background:var(--ground)}
:focus-visible{outline:3px solid var(--link);outline-offset:1px}
.wide{overflow:auto;flex:1 1 auto;min-height:240px;border:1px solid var(--line)}
table{border-collapse:separate;border-spacing:0;font-size:12.5px}
th{position:sticky;top:0;z-index:1;background:var(--head);text-align:left;border-bottom:1px solid var(--dim)}
th button{font:inherit;font-weight:600;border:0;background:none;color:inherit;padding:5px 8px;cursor:pointer;
white-space:nowrap}
th[aria-sort=ascending] button:after{content:" \\25B2"}th[aria-sort=descending] button:after{content:" \\25BC"}
td{padding:3px 8px;border-bottom:1px solid var(--faint);vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.name{min-width:250px;max-width:320px;overflow-wrap:anywhere}td.name small a{white-space:nowrap}
td.words{min-width:200px;max-width:420px;overflow-wrap:anywhere}
tr.failed td:first-child{box-shadow:inset 4px 0 var(--bad)}tr.other td:first-child{box-shadow:inset 4px 0 var(--dim)}
tr.errors td:first-child{box-shadow:inset 4px 0 var(--warn)}tr.out td:first-child{box-shadow:inset 4px 0 var(--mark)}
tr.failed .status{color:var(--bad)}tr.errors .status{color:var(--warn)}tr.out .why{color:var(--odd)}
.why,.error{display:block}.error{color:var(--bad)}a{color:var(--link)}
@media (max-width:520px){body{padding:10px;height:auto}.wide{max-height:90vh}.facts div{padding:3px 8px}}
@media print{:root{--ink:#000;--dim:#444;--line:#bbb;--faint:#ddd;--ground:#fff;--head:#fff;--link:#000}
body{height:auto;padding:0}.wide{overflow:visible;border:0}.find{display:none}th{position:static}}
"""

SCRIPT = """
(function(){
var body=document.querySelector('tbody'),heads=[].slice.call(document.querySelectorAll('thead th'));
var find=document.getElementById('find'),only=document.getElementById('only'),shown=document.getElementById('shown');
var rows=[].slice.call(body.rows);
function texts_of(r){return [].map.call(r.cells,function(c){return c.textContent;}).join('\\n').toLowerCase();}
var texts=rows.map(texts_of);
function key(row,k,number){var cell=row.cells[k],v=cell.getAttribute('data-v');
if(v===null)v=cell.textContent;return number?(v===''?NaN:Number(v)):v.toLowerCase();}
function sort(th,k){var up=th.getAttribute('aria-sort')!=='ascending',number=th.hasAttribute('data-n');
heads.forEach(function(h){h.removeAttribute('aria-sort');});
th.setAttribute('aria-sort',up?'ascending':'descending');
var keyed=rows.map(function(r,i){return [key(r,k,number),i,r];});
keyed.sort(function(a,b){var x=a[0],y=b[0];
if(number){var nx=x!==x,ny=y!==y;if(nx||ny)return nx===ny?a[1]-b[1]:nx?1:-1;}
return x<y?(up?-1:1):x>y?(up?1:-1):a[1]-b[1];});
var all=document.createDocumentFragment();keyed.forEach(function(e){all.appendChild(e[2]);});
body.appendChild(all);filter();}
heads.forEach(function(th,k){th.firstChild.addEventListener('click',function(){sort(th,k);});});
var step=200,limit=step,more=document.getElementById('more');
function filter(){var text=find.value.toLowerCase(),n=0,k=0;
[].forEach.call(body.rows,function(r){var see=(!only.checked||r.className!=='')&&
(text===''||texts[r.place].indexOf(text)>=0);
if(see)n++;see=see&&n<=limit;if(see)k++;if(r.hidden===see)r.hidden=!see;});
shown.textContent=n+' of '+rows.length+' found'+(k<n?', the first '+k+' shown':'');more.hidden=k===n;}
function anew(){limit=step;filter();}
rows.forEach(function(r,i){r.place=i;});
find.addEventListener('input',anew);only.addEventListener('change',anew);
more.addEventListener('click',function(){limit+=step*5;filter();});filter();
})();
"""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the page: its heading, what it means, and whether it sorts by number."""

    name: str
    title: str
    number: bool = True


COLUMNS = (
    Column("slide", "Slide, with links to its files", False),
    Column("status", "How the slide ended", False),
    Column("nuclei", "Nuclei found"),
    Column("per mm²", "Nuclei per mm² of the area that was searched"),
    Column("tissue mm²", "Area that was searched"),
    Column("tiles", "Tiles that were searched"),
    Column("failed", "Tiles that could not be done"),
    Column("s", "Seconds of the last run that worked on the slide"),
    Column("µm/px", "Pixel size of level 0"),
)
TYPED = (Column("typed", "Cells that were typed"), Column("abstained", "Share of them of which no class was said"))
LAST = (
    Column("organ", "Organ that the typing was told", False),
    Column("ended", "When the slide ended (UTC)", False),
    Column("what stands out", "Why a slide failed, and what differs from the other slides", False),
)


def page(rows: Sequence[Row], why: Sequence[Sequence[str]], title: str) -> str:
    """Return the page for rows and, of each, why it stands out; its links are relative to the output folder."""
    classes = common_classes(rows)
    typed = any(row.typed is not None for row in rows)
    shares = tuple(Column(name, f"Share of {name} among the cells with a class") for name in classes)
    columns = (*COLUMNS, *(TYPED if typed else ()), *shares, *LAST)
    body = "\n".join(_row(row, words, typed, classes) for row, words in zip(rows, why, strict=True))
    head = "".join(_heading(column) for column in columns)
    name = html.escape(f"{title}: {len(rows):,} slides")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{name}</title>'
        f"<style>{STYLE}</style></head><body><h1>{name}</h1>{_facts(rows, why)}{_NOTE}{_FIND}"
        f'<div class="wide" tabindex="0" role="region" aria-label="Slides"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div><script>{SCRIPT}</script></body></html>\n"
    )


_NOTE = (
    '<p class="note">A slide stands out where a number lies more than 3.5 robust standard deviations (and a quarter) '
    "from the median of these slides: that is a reason to look, not an error. Click a heading to sort.</p>"
)
_FIND = (
    '<div class="find"><input type="search" id="find" placeholder="find a slide, an organ, an error" '
    'aria-label="find"><label><input type="checkbox" id="only"> only what failed or stands out</label>'
    '<span id="shown" class="note" role="status"></span>'
    '<button type="button" id="more" hidden>show 1,000 more</button></div>'
)


def common_classes(rows: Sequence[Row]) -> list[str]:
    """Return the classes with most cells over all rows, at most eight, in the order of their first mention."""
    total: dict[str, int] = {}
    for row in rows:
        for name, count in row.classes.items():
            total[name] = total.get(name, 0) + count
    most = sorted(total, key=lambda name: -total[name])[:MOST_CLASSES]
    return [name for name in total if name in most]


def _facts(rows: Sequence[Row], why: Sequence[Sequence[str]]) -> str:
    done = sum(row.status == "done" for row in rows)
    bad = sum(row.status in ("failed", "done_with_errors") for row in rows)
    facts = [("done", done), ("failed or with errors", bad), ("not finished", len(rows) - done - bad)]
    facts += [("stand out", sum(map(bool, why))), ("nuclei", sum(row.cells or 0 for row in rows))]
    shown = [f"<div><b>{n:,}</b>{name}</div>" for name, n in facts]
    shown.append(f"<div><b>{sum(row.tissue_mm2 or 0 for row in rows):,.1f}</b>mm² searched</div>")
    return f'<div class="facts">{"".join(shown)}</div>'


def _heading(column: Column) -> str:
    number = " data-n" if column.number else ""
    title, name = html.escape(column.title, quote=True), html.escape(column.name)
    return f'<th{number} title="{title}"><button type="button">{name}</button></th>'


def _row(row: Row, words: Sequence[str], typed: bool, classes: Sequence[str]) -> str:
    cells = [_name(row), f'<td class="status">{html.escape(row.status.replace("_", " "))}</td>']
    cells += [_number(row.cells, ",.0f"), _number(row.density, ",.0f"), _number(row.tissue_mm2, ",.2f")]
    cells += [_number(row.tiles, ",.0f"), _number(row.tiles_failed, ",.0f"), _number(row.seconds, ",.1f")]
    cells.append(_number(row.mpp, ".4g"))
    if typed:
        cells += [_number(row.typed, ",.0f"), _number(row.abstained_share, ".1%")]
    said = sum(row.classes.values())
    cells += [_number(row.classes.get(name, 0) / said if said else None, ".1%") for name in classes]
    cells += [f"<td>{html.escape(row.organ)}</td>", f'<td class="n">{html.escape(row.ended)}</td>']
    return f'<tr class="{_kind(row, words)}">{"".join(cells)}{_words(row, words)}</tr>'


def _kind(row: Row, words: Sequence[str]) -> str:
    kinds = {"failed": "failed", "done_with_errors": "errors", "done": "out" if words else ""}
    return kinds.get(row.status, "other")


def _name(row: Row) -> str:
    folder = quote(row.folder.encode("utf-8", "surrogateescape"), safe="")
    name = html.escape(row.slide)
    value = html.escape(row.slide, quote=True)
    if not row.files:
        return f'<td class="name" data-v="{value}">{name}</td>'
    links = " ".join(f'<a href="./{folder}/{quote(file)}">{html.escape(_short(file))}</a>' for file in row.files)
    # The name leads to what a reader wants first; the folder lists everything.
    first = REPORT if REPORT in row.files else ""
    return f'<td class="name" data-v="{value}"><a href="./{folder}/{first}">{name}</a><br><small>{links}</small></td>'


def _short(file: str) -> str:
    """Return what a link says of a file, short enough that all of a slide stand on one line."""
    return file.removeprefix("cells.").removesuffix(".html").removesuffix(".json").removesuffix(".geojson") or file


def _number(value: float | None, form: str) -> str:
    if value is None:
        return '<td class="n" data-v=""></td>'
    return f'<td class="n" data-v="{value:.10g}">{value:{form}}</td>'


def _words(row: Row, words: Sequence[str]) -> str:
    error = f'<span class="error">{html.escape(row.error)}</span>' if row.error else ""
    why = "".join(f'<span class="why">{html.escape(word)}</span>' for word in words)
    return f'<td class="words">{error}{why}</td>'
