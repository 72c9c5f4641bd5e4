"""The loop, what is trained, its checkpoints, and what it shows."""
