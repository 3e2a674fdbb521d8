"""Network architectures: they know tensors, not slides or files. `models.registry` lists them.

Importing this package imports no torch; a builder does so when it is called.
"""

from cellslide.models.registry import architecture_of, build_model

__all__ = ["architecture_of", "build_model"]
