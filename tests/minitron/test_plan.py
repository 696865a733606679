"""The plan before the work: its figures, what it says, and what it refuses."""
