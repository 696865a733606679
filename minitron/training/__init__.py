"""Training runs of the pipeline: the tiny teacher, the cache of the teacher's outputs, the student's distillation, and what they will hold in memory and
take in time, planned before anything is loaded. The loop itself is in distill.
"""
