"""Hooks of mkdocs: pages made from the commands, the Python API and the notebooks; links to files beside the docs."""

from __future__ import annotations

import inspect
import json
import posixpath
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import cellslide
from cellslide.cli.main import COMMANDS, SECTIONS, cli

CHECKOUT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    pages = {"reference/commands.md": commands_page(), "reference/python.md": python_page()}
    for path in sorted((CHECKOUT / "examples" / "notebooks").glob("*.ipynb")):
        pages[f"notebooks/{path.stem}.md"] = notebook_page(path)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Lead links that leave the docs to the repository; raises FileNotFoundError for one that leads nowhere."""
    here = posixpath.dirname(page.file.src_uri)

    def led(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", here, match[1]))
        if target.startswith("docs/") and not (CHECKOUT / target).is_dir() and not target.endswith((".json", ".py")):
            return match[0]
        if target.startswith("examples/notebooks/") and target.endswith(".ipynb"):
            stem = posixpath.basename(target).removesuffix(".ipynb")
            return f"]({posixpath.relpath(f'notebooks/{stem}.md', here or '.')})"
        if not (CHECKOUT / target).exists():
            raise FileNotFoundError(f"{page.file.src_uri}: {match[1]}")
        return f"]({config.repo_url}/blob/main/{target}{match[2] or ''})"

    return LINK.sub(led, markdown)


def commands_page() -> str:
    """Return the page of all commands, in the sections of the help."""
    parts = [
        "# Commands\n\nEach has `--dry-run`, which checks the request and stops. `--help` shows the first options.\n"
    ]
    rest = [name for name in COMMANDS if not any(name in names for names in SECTIONS.values())]
    for section, names in (SECTIONS | {"This machine": (*SECTIONS["This machine"], *rest)}).items():
        parts.append(f"## {section}\n")
        for name in (name for name in names if name in COMMANDS):
            command = cli.get_command(click.Context(cli), name)
            assert command is not None
            parts += command_text(command, f"cellslide {name}", 3)
    return "\n".join(parts)


def command_text(command: click.Command, name: str, depth: int) -> list[str]:
    """Return what a command's help holds as Markdown, its own commands after it."""
    context = click.Context(command, info_name=name)
    usage = " ".join(command.collect_usage_pieces(context))
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    body = [f"```text\n{p[1:].strip(chr(10))}\n```" if p.startswith("\b") else _plain(p) for p in paragraphs]
    rows = [row for p in command.params if (row := p.get_help_record(context)) is not None]
    table = ["| option | what |", "| --- | --- |", *(f"| `{_cell(a)}` | {_cell(_plain(b))} |" for a, b in rows)]
    text = [f"{'#' * depth} {name}\n", f"```text\n{name} {usage}\n```\n", "\n\n".join(body) + "\n"]
    text += [*table, ""] if rows else []
    for sub in getattr(command, "commands", {}).values():
        text += command_text(sub, f"{name} {sub.name}", depth + 1)
    return text


def _plain(text: str) -> str:
    """Return text in which only backticks mean something to Markdown."""
    parts = " ".join(text.split()).split("`")
    return "`".join(part if k % 2 else re.sub(r"([<>*_\[\]#])", r"\\\1", part) for k, part in enumerate(parts))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def python_page() -> str:
    """Return the page of the names of `cellslide`."""
    parts = ["# Python\n\n[From Python](../python.md) shows how they are used together.\n"]
    for name in sorted(set(cellslide.__all__) - {"__version__"}, key=str.lower):
        found = getattr(cellslide, name)
        parts += _described(f"cellslide.{name}", found, 2)
        if inspect.isclass(found):
            for method, member in sorted(vars(found).items()):
                if not method.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    parts += _described(f"{name}.{method}", member, 3)
    return "\n".join(parts)


def _described(name: str, found: Any, depth: int) -> list[str]:
    is_call = not isinstance(found, property) and not (inspect.isclass(found) and issubclass(found, Exception))
    signature = f"{name}{inspect.signature(found)}" if is_call else name
    first, _, rest = inspect.cleandoc(found.__doc__ or "").partition("\n\n")
    return [f"{'#' * depth} {name}\n", f"```python\n{signature}\n```\n", _plain(first) + "\n",
            *([f"```text\n{rest}\n```\n"] if rest else [])]  # fmt: skip


def notebook_page(path: Path) -> str:
    """Return a notebook as Markdown: its texts, its code, and the outputs that it holds as text."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"
