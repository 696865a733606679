"""Which layers share vLLM's block numbers, and the pages that their blocks are made of.

Source: vllm/v1/core/kv_cache_utils.py (get_kv_cache_groups), vllm/v1/kv_cache_interface.py (blocks of a request) and vllm/platforms/interface.py
(_align_hybrid_block_size) of vLLM 0.32.0, for layouts of the cache that are not block-outermost: those that it prefers on every platform.
"""

from dataclasses import dataclass, replace

from memory_budget.model import Model
from memory_budget.parts.latent import LatentAttention
from memory_budget.parts.mamba2 import Mamba2
from memory_budget.parts.part import Part
from memory_budget.workload import BYTES_PER_NUMBER, Workload

STATES_WITHOUT_PREFIX_CACHING = 1
STATES_WITH_PREFIX_CACHING = 2  # the running one and the previous one
CHECKPOINT_STATES = 1  # of Mamba-2 with prefix caching: the state at a prefill's last block boundary (versions before it: none)
LATENT_BLOCK_MULTIPLE = 128  # vLLM makes the blocks of a hybrid with latent attention a multiple of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One layer's part of a block. Layers whose pages are equal may share a group.

    kind: full, window, chunk or state · bytes: with what it is padded by · own_bytes: without · tokens: of a block, 0 for a state ·
    window: tokens that a query sees at most · states: blocks of a request · latent: a row a token, which cannot be padded (MLA).
    """

    kind: str
    bytes: int
    own_bytes: int
    tokens: int = 0
    window: int = 0
    states: int = 0
    latent: bool = False

    def blocks_of_request(self, context_tokens: int, in_flight_tokens: int) -> int:
        """Blocks that a request of so many tokens takes in a group of such layers.

        Within a window the last window − 1 tokens and all that are in flight, that is scheduled and not yet settled, and one block more, as a window need not
        begin where a block does, be it more than the whole context takes; within a chunk those of the chunk and all in flight.
        """
        if self.kind == "state":
            return self.states
        if self.kind == "full":
            return _ceil_divide(context_tokens, self.tokens)
        if self.kind == "chunk":
            return _ceil_divide(min(self.window + in_flight_tokens, context_tokens), self.tokens)
        return _ceil_divide(min(self.window - 1 + in_flight_tokens, context_tokens), self.tokens) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """bytes_per_block: of the pool, all layers of the largest group · pages: (how many groups, of layers with what pages)."""

    bytes_per_block: int
    pages: tuple[tuple[int, Page], ...]

    @property
    def number(self) -> int:
        return sum(number for number, _ in self.pages)

    def blocks_of_request(self, context_tokens: int, in_flight_tokens: int) -> int:
        """Blocks that a request takes, all groups together."""
        return sum(number * page.blocks_of_request(context_tokens, in_flight_tokens) for number, page in self.pages)


def layer_groups(model: Model, workload: Workload, *, block_size: int, prefix_caching: bool, hybrid_manager: bool) -> Groups:
    """The groups that vLLM makes of a model's layers. Raises ValueError where no layer keeps anything or pages cannot be made equal."""
    pages = _pages(model, workload, block_size, prefix_caching)
    if not pages:
        raise ValueError(f"{model.model_type} has neither attention nor Mamba layers: there is no cache for vLLM to allot")
    if not hybrid_manager and any(page.kind == "full" for page, _ in pages):
        pages = [(replace(page, kind="full", window=0) if page.window else page, count) for page, count in pages]
    if _are_of_one_type([page for page, _ in pages]):
        largest = max((page for page, _ in pages), key=lambda page: page.bytes)
        return Groups(bytes_per_block=sum(page.bytes * count for page, count in pages), pages=((1, largest),))
    return _equal_groups(_equal_pages(pages))


def _are_of_one_type(pages: list[Page]) -> bool:
    """Whether all layers need the same blocks, and so share one group, whatever their pages: all full, all of one window, or states of one size."""
    if len({(page.kind, page.window, page.states) for page in pages}) > 1:
        return False
    return pages[0].kind != "state" or len({page.bytes for page in pages}) == 1


def _equal_pages(pages: list[tuple[Page, int]]) -> list[tuple[Page, int]]:
    """All with the largest page: attention by more tokens to a block where that comes out even, else by padding."""
    most = max(page.bytes for page, _ in pages)
    return [(_as_large(page, most), count) for page, count in pages]


def _as_large(page: Page, size: int) -> Page:
    if page.kind != "state" and size % page.bytes == 0:
        return replace(page, bytes=size, own_bytes=size, tokens=page.tokens * (size // page.bytes))
    if page.latent:
        raise ValueError(f"a page of latent attention ({page.bytes:,} bytes) must divide the largest page of the model ({size:,} bytes): vLLM pads none")
    return replace(page, bytes=size)


def _equal_groups(pages: list[tuple[Page, int]]) -> Groups:
    """As many layers to a group as the rarest kind has, or as the commonest has where that is below 1.5 times as many."""
    counts: dict[Page, int] = {}
    for page, count in pages:
        counts[page] = counts.get(page, 0) + count
    fewest, most = min(counts.values()), max(counts.values())
    size = most if most < 1.5 * fewest else fewest
    return Groups(bytes_per_block=size * pages[0][0].bytes, pages=tuple((_ceil_divide(count, size), page) for page, count in counts.items()))


def _pages(model: Model, workload: Workload, block_size: int, prefix_caching: bool) -> list[tuple[Page, int]]:
    """Page and number of the layers of every kind that keep something; with attention and states, blocks are so many tokens that a page holds a state."""
    number = BYTES_PER_NUMBER[workload.kv_dtype]
    keeping = [(part, count) for count, part in model.layers if part.kept_tokens != 0 and count]
    recurrent = [(part, count) for count, part in model.layers if _state_bytes(part, workload) and count]
    tokens, padded = block_size, 0
    if keeping and recurrent:
        token_bytes = max(part.cache_numbers_per_token for part, _ in keeping) * number
        least = max(block_size, LATENT_BLOCK_MULTIPLE) if any(_is_latent(part) for part, _ in keeping) else block_size
        tokens = least * max(1, _ceil_divide(max(_state_bytes(part, workload) for part, _ in recurrent), least * token_bytes))
        padded = tokens * token_bytes
    pages = []
    for part, count in keeping:
        size = tokens * part.cache_numbers_per_token * number
        window, chunk = getattr(part, "window", 0), getattr(part, "chunk", 0)
        kind = "window" if window else "chunk" if chunk else "full"
        pages.append((Page(kind=kind, bytes=size, own_bytes=size, tokens=tokens, window=window or chunk, latent=_is_latent(part)), count))
    for part, count in recurrent:
        own = _state_bytes(part, workload)
        states = STATES_WITH_PREFIX_CACHING + CHECKPOINT_STATES * isinstance(part, Mamba2) if prefix_caching else STATES_WITHOUT_PREFIX_CACHING
        pages.append((Page(kind="state", bytes=padded or own, own_bytes=own, states=states), count))
    return pages


def _is_latent(part: Part) -> bool:
    """Whether one row serves all heads."""
    return isinstance(part, LatentAttention)


def _state_bytes(part: Part, workload: Workload) -> int:
    """Of one sequence in one layer; a convolution's state is in the model's number format."""
    return part.state_numbers * BYTES_PER_NUMBER[workload.ssm_dtype] + part.conv_numbers * BYTES_PER_NUMBER[workload.compute_dtype]


def _ceil_divide(number: int, divisor: int) -> int:
    return -(-number // divisor)
