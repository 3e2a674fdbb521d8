"""Networks on tiles and crops: device, micro-batches, engines, and memory shared with other processes."""
