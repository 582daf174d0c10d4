"""One optimiser step, the epoch loop, and their run on Ray Train."""
