"""Learning without labels, from slides or tiles and the places of their nuclei: `cellslide pretrain`."""
