"""The pipeline: the door (run.py) and its rooms, one folder each. What a room is for stands in its own __init__.py, who may use whom in
docs/architecture.md. Here beside the door lies nothing else.
"""
