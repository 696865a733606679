"""What vLLM allots, takes by default and refuses when it starts, by its own rules (0.32.0; where older versions differ, it is said). What it shares with
other engines, such as parameters and sizes of caches, is a floor above.
"""
