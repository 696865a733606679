"""Models on disk: safetensors read and written piece by piece, also around the page cache; a model walked layer by layer, whole in memory or from
its files; a folder written with all that belongs to it and read back. What is done to the weights in between belongs to other rooms.
"""
