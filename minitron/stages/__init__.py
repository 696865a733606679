"""One file for each stage, and nothing else: what it needs, its version, the settings its results follow from, what it refuses before any work, and
a thin `run` that imports the room where the work is done. To add a stage is to add a file: its name is the stage's, its STAGE is the declaration.
Files here load no torch until they run.
"""
