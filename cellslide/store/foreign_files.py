"""The gate for files that a stranger wrote or named: plain files of a bounded size, and texts that cannot swell.

What comes through is plain values; what does not is one of our errors, whatever is wrong with it.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import yaml

from cellslide.errors import CellslideError, SlideError, short

MOST_TEXT_BYTES = 64 << 20
MOST_DEPTH = 60
MOST_NODES = 100_000


def is_plain(path: Path) -> bool:
    """Tell whether a path is a file or a folder: no pipe, socket or device, which would be waited for."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # also a name with a NUL byte in it
        return False
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def read_text(path: Path, error: type[CellslideError] = SlideError, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """Return the text of a plain file of at most `most_bytes`; raises `error` for anything else."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise error(f"{path}: not a plain file")
        # Read by its bound and not by its size, which may be a lie.
        with path.open("rb") as stream:
            content = stream.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise error(f"{path}: more than {most_bytes >> 20} MB")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{path}: no text in UTF-8 ({short(failure)})") from failure
    except ValueError as failure:
        raise error(f"{path}: cannot be read ({short(failure)})") from failure


def parse_json(text: str | bytes, where: object, error: type[CellslideError] = SlideError) -> Any:
    """Return what a JSON text holds; raises `error` for one that is none or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as failure:
        raise error(f"{where}: nested too deeply") from failure
    except ValueError as failure:
        raise error(f"{where}: not valid JSON ({short(failure)})") from failure


def read_json(path: Path, error: type[CellslideError] = SlideError) -> Any:
    """Return what a plain JSON file holds; raises `error` for anything else."""
    return parse_json(read_text(path, error), path, error)


class _PlainLoader(yaml.SafeLoader):
    """YAML as people write it, without endless nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise yaml.YAMLError("nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def parse_yaml(text: str, where: object, error: type[CellslideError]) -> Any:
    """Return what a YAML text holds, plain values only; raises `error` for anything else, and for what swells."""
    try:
        loader = _PlainLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            # Aliases make gigabytes of a few bytes; what they come to is known before anything is made of them.
            if _expanded(node, {}) > MOST_NODES:
                raise yaml.YAMLError(f"its aliases come to more than {MOST_NODES:,} values; write them out")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError, AttributeError, KeyError) as failure:
        raise error(f"{where}: not valid YAML ({short(failure)})") from failure


def _expanded(node: Any, known: dict[int, int]) -> int:
    """Return how many values a node stands for; a node within itself ends in RecursionError."""
    if id(node) not in known:
        parts = node.value if isinstance(node, (yaml.SequenceNode, yaml.MappingNode)) else ()
        below = (item for part in parts for item in (part if isinstance(part, tuple) else (part,)))
        known[id(node)] = 1 + sum(_expanded(item, known) for item in below)
    return known[id(node)]


def read_yaml(path: Path, error: type[CellslideError]) -> Any:
    """Return what a plain YAML file holds; raises `error` for anything else."""
    return parse_yaml(read_text(path, error), path, error)
