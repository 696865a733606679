"""How much each unit and each layer matters, measured by forward passes: activations, leaving layers out, the order in which layers go, scores
kept for every later ranking.
"""
