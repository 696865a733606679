"""Text and what becomes of it: where documents come from, reasoning and generated problems, rows of tokens, which rows a phase of training or a
measurement takes. Tokenising happens here alone.
"""
