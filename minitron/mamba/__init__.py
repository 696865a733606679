"""How a Mamba-2 layer is computed: the scan, the mixer and the feed-forward layers in plain torch for a CPU, packed rows, and what is asked of a GPU's
fused kernels. Numbers in, numbers out: nothing here knows settings, stages or checkpoints.
"""
