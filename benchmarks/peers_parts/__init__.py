"""The parts of `benchmarks/peers.py`: teachers with their measures, and methods."""
