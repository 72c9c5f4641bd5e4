"""A run: its folder, from its settings to its report."""
