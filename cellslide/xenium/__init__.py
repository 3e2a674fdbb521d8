"""A Xenium experiment beside its H&E slide: bundle, alignment, the check of both, and labels by marker genes."""
