"""What a model takes in memory, from its config.json alone: sizes, parameters, bytes of weights, caches and states, budgets of devices, and what
an engine such as vLLM will allot. Standard library only, so that it can be taken elsewhere; whatever needs arrays or tensors belongs in another package.
"""
