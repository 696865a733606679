"""What a layer is made of: one file for each kind of mixer, with its parameters, its caches and states, and what it makes on its way.

Plain arithmetic, so sizes that are numpy integer arrays pass through and broadcast.
"""
