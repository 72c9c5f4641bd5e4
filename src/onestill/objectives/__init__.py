"""The losses that a student is trained with; one file each."""
