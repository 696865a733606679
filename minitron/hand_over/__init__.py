"""Making model folders for others out of finished ones: the merge of checkpoints, the export with its card, and what vLLM, llama.cpp and transformers
ask of such a folder.
"""
