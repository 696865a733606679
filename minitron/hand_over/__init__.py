"""Making model folders for others out of finished ones: the merge of checkpoints, the export with its card, and what vLLM, llama.cpp, transformers and
others ask of such a folder.
"""
