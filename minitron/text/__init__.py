"""Text and what becomes of it: tokens, rows of them on disk, a tokenizer of one's own text, what is hidden or cut short, which rows a phase of training or a
measurement takes. Tokenising happens here alone.
"""
