"""Text from a model: prompts in its own chat template, a budget for its reasoning, and greedy or sampled tokens. `prompts` loads no torch: a client of
a server uses it too.
"""
