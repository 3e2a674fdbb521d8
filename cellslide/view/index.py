"""The page that lists the slides of a folder, where there are more than one."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote


def index_page(root: Path, names: Sequence[str], pages: Sequence[str] = ()) -> str:
    """Return a page with a link to each slide, and to `pages` of the folder.

    Names are strangers' text: escaped, and quoted in links.
    """
    items = "\n".join([*(_item("files/", page, "") for page in pages), *(_item("s/", name, "/") for name in names)])
    title = html.escape(_shown(root.name))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}: {len(names):,} slides</title><link rel="stylesheet" href="static/view.css"></head>'
        f'<body class="list"><h1>{title}: {len(names):,} slides</h1><ul>\n{items}\n</ul></body></html>\n'
    )


def _item(before: str, name: str, after: str) -> str:
    place = f"{before}{quote(name, safe='', errors='surrogateescape')}{after}"
    return f'<li><a href="{place}">{html.escape(_shown(name))}</a></li>'


def _shown(name: str) -> str:
    return name.encode("utf-8", "replace").decode("utf-8")
