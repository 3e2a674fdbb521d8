"""Genes that were not measured, predicted from H&E tiles and transcripts (early fusion, Martinelli et al. 2026)."""
