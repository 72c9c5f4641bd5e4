"""Evaluation: features, metrics, speed and the report that carries its protocol."""
