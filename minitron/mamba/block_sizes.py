"""How many tokens a layer takes at once: of long rows, and on a CPU. Loads no torch."""

from itertools import pairwise

LONG_TOKENS = 65_536  # longer rows go in parts
BLOCK_TOKENS = 32_768  # large enough that a GPU does not wait for launches, a multiple of every scan's chunk
SCAN_TOKENS = 32  # of a chunk of the scan on a CPU: more means more work inside chunks and steeper decays over them, fewer more states between them


def largest_block(tokens: int) -> int:
    """Tokens of the longest block of a long row."""
    return max(block_sizes(tokens, BLOCK_TOKENS))


def block_sizes(tokens: int, block_tokens: int) -> list[int]:
    """Of the blocks: all but the last of `block_tokens`, which takes a rest shorter than half of that with it."""
    ends = [*range(block_tokens, tokens - block_tokens // 2, block_tokens), tokens]
    return [end - start for start, end in pairwise([0, *ends])]
