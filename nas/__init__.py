"""Which architectures there are to choose from and which one to take: options of every axis, what fits, a diversified shortlist, a model of
throughput, the choice. Plain numbers and numpy arrays go in and out. Nothing here has seen a model: what is measured comes from minitron.
"""
