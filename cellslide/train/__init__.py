"""Training of segmentation models: recipe, data, targets, losses, and one LightningModule a model."""
