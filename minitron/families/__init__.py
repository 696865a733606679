"""One file for each family of models that can be cut, and the contract that they fulfil: a table of tensors and their axes, names, how to load and
build, where activations are read. Everything that knows a tensor's name is here; reading such a table is too, and what transformer blocks have in common.
"""
