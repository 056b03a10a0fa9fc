"""A run is trained here: processes and device, pseudo-labels, the loop, checkpoints, evaluation."""
