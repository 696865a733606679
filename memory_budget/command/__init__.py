"""The command: its options, the questions it answers, and how answers are shown. `python -m memory_budget` is the door."""
