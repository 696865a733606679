"""Where text comes from and what a record of it is: a data set's fields told apart as texts, conversations, questions with answers. It loads neither torch
nor transformers: what is written of a conversation is made in `minitron/generation/`.
"""
