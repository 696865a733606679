"""Text from a model: its tokenizer, prompts and conversations in its own chat template, a budget for its reasoning, and greedy or sampled tokens. What deals
with templates loads no torch: a client of a server uses it too.
"""
