"""How many tokens' logits exist at once: what the chunked loss walks by and memory plans count with. Loads no torch."""

GPU_CHUNK_VALUES = 2**27  # logits of a chunk: 1,024 tokens of 131,072, four buffers of 512 MiB; fewer are bound by memory
CHUNK_VALUES = 2**25  # the most on a CPU
CPU_CHUNK_VALUES = 2**20  # what is aimed at there, so that chunks stay near the processor; but never fewer tokens than a product of matrices is quick with
CPU_CHUNK_TOKENS = 256


def chunk_tokens(vocabulary: int, *, on_cpu: bool) -> int:
    """Tokens whose logits exist at once."""
    if not on_cpu:
        return max(1, GPU_CHUNK_VALUES // vocabulary)
    return max(1, min(CHUNK_VALUES // vocabulary, max(CPU_CHUNK_TOKENS, CPU_CHUNK_VALUES // vocabulary)))
