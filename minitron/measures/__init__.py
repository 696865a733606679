"""What is measured of a finished model: held-out loss, distance to the teacher, speed, long context, lm-eval's tasks, accuracy by thinking
budget; each kept by itself, so that nothing is measured twice.
"""
