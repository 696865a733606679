"""Bytes that mamba-ssm's kernels take for themselves while they run, beside their inputs and results: a GPU's memory that no line of ours asks for.

Counted from the package's Python (2.3.2.post1, ops/triton/ssd_combined.py), whose launchers make these tensors with torch.empty; the tests hold it against
that code run by Triton's interpreter. M heads, P head dim, I = M·P, G groups, N state, L tokens of a chunk, E = I + 2·G·N.
"""

from dataclasses import dataclass

FLOAT32 = 4
CHUNK_TOKENS = 128  # config.json's chunk_size of every published Nemotron-H
BLOCK_TOKENS = 32  # the smallest tile along tokens of a kernel that sums by tile


@dataclass(frozen=True, slots=True)
class ScanMemory:
    """Of `rows` rows of `tokens` tokens each, in tensors of `width` bytes a number."""

    heads: int
    head_dim: int
    groups: int
    state: int
    rows: int
    tokens: int
    width: int
    chunk: int = CHUNK_TOKENS

    @property
    def all_tokens(self) -> int:
        return self.rows * self.tokens

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.groups * self.state

    @property
    def _padded(self) -> int:
        """Tokens in whole chunks, which what is made by chunk has."""
        return self.rows * -(-self.tokens // self.chunk) * self.chunk

    @property
    def _states(self) -> int:
        """Numbers of the states between chunks."""
        return self._padded // self.chunk * self.inner * self.state

    @property
    def _steps(self) -> int:
        """Bytes of a float32 [B, M, T]: the time steps, and their running sums."""
        return FLOAT32 * self.heads * self._padded

    @property
    def _squares(self) -> int:
        """Bytes of C·B within chunks, float32 [B, chunks, G, L, L]."""
        return FLOAT32 * self.groups * self.chunk * self._padded

    def scan(self) -> int:
        """mamba_chunk_scan_combined, beside its result [B, T, I]: time steps and sums, and states twice, or states, C·B and the result."""
        passing = (FLOAT32 + self.width) * self._states - self.width * self.inner * self.all_tokens
        return 2 * self._steps + max(passing, self.width * self._states + self._squares) + FLOAT32 * self.rows * self.inner * self.state

    def mixer(self) -> int:
        """mamba_split_conv1d_scan_combined forward, beside its result [B, T, D] and what it keeps: the convolution's result, the scan, the normed output."""
        normed = self.width * self._states + 2 * self._steps + self.width * self.inner * self.all_tokens
        return self.width * self.channels * self.all_tokens + max(self.scan(), normed + FLOAT32 * self.rows * self.inner * self.state)

    def mixer_keeps(self) -> int:
        """What it keeps for its backward pass beside its inputs: the scan's result, and the norm's scale by group."""
        return (self.width * self.inner + FLOAT32 * self.groups) * self.all_tokens

    def mixer_back(self) -> int:
        """Its backward pass, beside its inputs, what is kept and the gradient of in_proj's output: the convolution's result and its gradient, the scan's
        output once more and two gradients of it, time steps and C·B; and in the scan either states four times, or twice with B's and C's gradients and C·B's.
        """
        by_token = self.width * (2 * self.channels + 3 * self.inner + self.heads)
        passing = 3 * FLOAT32 * self._states  # two of float32, and two of the inputs' width or one of float32
        states = 2 * self.width * self._states
        sums = 4 + -(-self.chunk // BLOCK_TOKENS)  # of the time steps' gradient, one by tile
        later = states + 2 * FLOAT32 * self.groups * self.state * self.all_tokens
        later += max(2 * self._squares + 3 * self._steps, self._squares + sums * self._steps)
        return by_token * self.all_tokens + 2 * self._steps + self._squares + max(passing, later)
