"""Evaluation: protocols, HOTA/CLEAR/Identity, bootstrap comparison, stage-by-domain matrix, threshold search."""
