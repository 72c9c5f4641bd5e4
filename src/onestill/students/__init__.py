"""The student: a copy of the teacher's network that is told its target time, and what it is exported as."""
