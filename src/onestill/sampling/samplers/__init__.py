"""What generates images: of a student in one step, of a teacher in many, of an exported pipeline; all called alike."""
