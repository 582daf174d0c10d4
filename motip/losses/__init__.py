"""Detection and identity losses; torch, numpy and scipy only."""
