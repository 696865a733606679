"""Published ways to cut a Llama, implemented anew from their papers, small and plain, so that they can be measured beside the compensated cut.

Each takes a Base of real_sides.py, what to cut to and calibration batches (ids [B, T] without padding), and gives the student, float32 and trainable, which
computes as transformers' LlamaForCausalLM does, with the number of parameters that it stores.
"""
