"""What a person reads of a run: summary.json, made from what is done, and the page and plots that are made from summary.json and nothing else. Loads
no torch.
"""
