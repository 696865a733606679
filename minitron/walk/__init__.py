"""The walk through the stages: what a stage is, which there are, their keys and the store of their results, the two laps, the terminal and the
trackers. It knows stages only by what they declare and never imports one by name; it loads no torch, so that a run that finds everything done is quick.
"""
