"""What a run draws from: labels, prompts, and the pictures of an earlier stage."""
