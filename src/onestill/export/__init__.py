"""Students written as files that other programs open; one file for each format."""
