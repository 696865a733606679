"""Choosing an architecture: the space that settings and config.json allow, the shortlist, zero-shot losses on views of the teacher, one candidate's short
distillation, the choice. Enumerating and choosing as arithmetic are in nas.
"""
