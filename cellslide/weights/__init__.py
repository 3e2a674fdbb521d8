"""Which weights exist, where they lie on this machine, and how they become a model.

Nothing here downloads, save `fetch`, which `cellslide weights fetch` calls after the licence was accepted.
"""

from cellslide.weights.cache import cache_dir, file_sha256, find_file, verify_file
from cellslide.weights.classifier import LoadedClassifier, load_classifier
from cellslide.weights.fetch import add_weights, fetch
from cellslide.weights.load import LoadedModel, load_model
from cellslide.weights.manifest import Manifest, Source, WeightsEntry

__all__ = [
    "LoadedClassifier",
    "LoadedModel",
    "Manifest",
    "Source",
    "WeightsEntry",
    "add_weights",
    "cache_dir",
    "fetch",
    "file_sha256",
    "find_file",
    "load_classifier",
    "load_model",
    "verify_file",
]
