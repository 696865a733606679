"""The machine that a run is on: the device to compute on, memory that is free, the other processes of the same run, and whether anyone else keeps its
cores busy. What depends on the kind of model is not here, except that choosing a device puts that device's Mamba-2 in place.
"""
