"""The plan before the work: what will be cut, what every stage will take in time, memory and disk, and what is refused because it cannot end well; from
settings and config.json alone. It loads no torch, and nothing is downloaded for it but a config.json.
"""
