"""Noise processes, what a network predicts on them, and the trajectory of the signal."""
