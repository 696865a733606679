"""Training a model to another one's distribution: losses, batches, schedule, optimisers, saved states, and one loop for one process or many.
It is given modules and batches of token ids and knows no settings, no stages and no checkpoints of a family.
"""
