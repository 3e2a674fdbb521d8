"""Are compiled kernels to be had here? They need numba, and a folder that keeps what was compiled.

Modules named `*_kernels` import numba when they are imported and hold `@njit(cache=True, nogil=True)` functions; a
compiled function may call those of its own file only, since the cache sees changes of one file. Each has a form without
numba beside it that gives the same results, and `available()` picks. numba keeps compiled code in `$NUMBA_CACHE_DIR`,
else beside the source, else, where that cannot be written, in the user's cache folder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path

log = logging.getLogger(__name__)

PROBE = "cellslide.geometry.label_kernels"


_left_out = False


def available() -> bool:
    """Tell whether compiled kernels are to be used."""
    return not _left_out and why_not() is None


@contextmanager
def left_out() -> Iterator[None]:
    """Use the forms without compiled kernels inside, in all threads: to compare the two."""
    global _left_out
    before, _left_out = _left_out, True
    try:
        yield
    finally:
        _left_out = before


@cache
def why_not() -> str | None:
    """Return why there are no compiled kernels here, None where there are; the first call imports numba."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in {"", "0"}:
        return "NUMBA_DISABLE_JIT is set"
    try:
        import_module(PROBE)
    except ImportError as error:  # numba refuses a numpy newer than it knows with this, too
        reason = f"numba cannot be imported: {error}"
    except RuntimeError as error:  # without a cache every process would compile anew, for longer than kernels save
        reason = f"no folder for compiled code can be written, set NUMBA_CACHE_DIR: {error}"
    else:
        return None
    log.info("no compiled kernels: %s", reason)
    return reason


def cache_folder() -> Path:
    """Return the folder that keeps compiled code; call it only where kernels are available."""
    module = import_module(PROBE)
    return Path(module.measure.stats.cache_path)
