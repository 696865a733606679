"""The cut: which units stay, cutting tensors by a family's table, views of a sorted teacher, and what makes a cut keep the function (rotation,
directions, refits). From disk to disk, or in memory for candidates.
"""
