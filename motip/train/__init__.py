"""Training of one stage: optimiser step, epoch loop, checkpoints, and their run on Ray Train."""
