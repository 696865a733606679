"""Every setting, typed and checked, and what follows from settings and config.json alone: which teacher it is, the options of every axis, budget and
workload. Loads no torch and does no work; a rule that needs more than settings belongs to the stage that needs it.
"""
