"""The machine that a run is on: the device to compute on, memory that is free, and the other processes of the same run. What depends on the kind
of model is not here, except that choosing a device puts that device's Mamba-2 in place.
"""
