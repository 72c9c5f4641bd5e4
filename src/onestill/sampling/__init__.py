"""From seeds to images: samplers, ways of exploring them, and pictures."""
