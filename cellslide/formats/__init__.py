"""Files made from a finished table: GeoJSON, Parquet, CSV, label maps, h5ad, TissUUmaps; and their check."""
