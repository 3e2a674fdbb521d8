"""What is called from Python, and what the commands call: an image gives cells in memory, a path a table on disk.

models.py loads networks, slides.py finds and types nuclei, scores.py compares them with labelled ones, measure.py
counts them by region, xenium.py reads transcripts beside a slide, genes.py predicts genes, dataset.py makes data sets
of corrections. Everything heavy is imported inside the functions: to import this costs nothing.
"""

from cellslide.api.dataset import make_dataset, suggest_corrections
from cellslide.api.genes import evaluate_genes, predict_genes
from cellslide.api.measure import measure
from cellslide.api.models import Model, fetch_model, list_models, load_model, task_of
from cellslide.api.scores import calibrate, evaluate
from cellslide.api.slides import classify, embed, explain, import_cells, open_slide, read_cells, run, segment
from cellslide.api.xenium import xenium_check, xenium_label

__all__ = [
    "Model",
    "calibrate",
    "classify",
    "embed",
    "evaluate",
    "evaluate_genes",
    "explain",
    "fetch_model",
    "import_cells",
    "list_models",
    "load_model",
    "make_dataset",
    "measure",
    "open_slide",
    "predict_genes",
    "read_cells",
    "run",
    "segment",
    "suggest_corrections",
    "task_of",
    "xenium_check",
    "xenium_label",
]
