"""cellslide: a slide in, a table of its nuclei out.

The functions of `cellslide.api` and the records that they give are names of this package; each is imported when it is
first asked for, so that `import cellslide` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellslide.api import (
        Model,
        calibrate,
        classify,
        embed,
        evaluate,
        explain,
        fetch_model,
        import_cells,
        list_models,
        load_model,
        open_slide,
        read_cells,
        run,
        segment,
    )
    from cellslide.errors import CellslideError
    from cellslide.slides.slide import Slide
    from cellslide.store.cell_table import CellTable
    from cellslide.types import Cells

__version__ = "0.2.0"
__all__ = [
    "CellTable",
    "Cells",
    "CellslideError",
    "Model",
    "Slide",
    "calibrate",
    "classify",
    "embed",
    "evaluate",
    "explain",
    "fetch_model",
    "import_cells",
    "list_models",
    "load_model",
    "open_slide",
    "read_cells",
    "run",
    "segment",
]

_RECORDS = {
    "CellTable": "cellslide.store.cell_table",
    "Cells": "cellslide.types",
    "CellslideError": "cellslide.errors",
    "Slide": "cellslide.slides.slide",
}
# Functions that share their name with a room of the package: the room, called, is the function.
_ROOMS = frozenset(("classify", "embed", "evaluate"))


def __getattr__(name: str) -> Any:
    """Return a public name, imported now; raises AttributeError for any other."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(_RECORDS.get(name, f"{__name__}.api")), name)


def __dir__() -> list[str]:
    """Return the public names, also those that nobody has asked for."""
    return sorted({*globals(), *__all__})


class _CallableRoom(ModuleType):
    """A room of the package that is called as the function of `cellslide.api` with its name."""

    @property
    def __wrapped__(self) -> Any:
        return getattr(import_module("cellslide.api"), self.__name__.rpartition(".")[2])

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self.__wrapped__(*arguments, **settings)


class _Package(ModuleType):
    """The package itself: importing a room sets it here, whoever imports it, and that is when it becomes callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ROOMS and isinstance(value, ModuleType):
            value.__class__ = _CallableRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
