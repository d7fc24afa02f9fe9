"""The training of a run: options, device, steps, checkpoints, run folder."""
