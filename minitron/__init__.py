"""The pipeline: its two doors (run.py for the command line, api.py for Python) and its rooms, one folder each. What a room is for stands in its own
__init__.py, who may use whom in docs/architecture.md. Here beside the doors lies nothing else.
"""
