"""What vLLM 0.32.0 printed on a CPU for tiny models of many kinds, 2,048 tokens in float32 from a pool of 1 GiB, against models made of parts by hand."""

from dataclasses import replace

import pytest

from memory_budget.model import Model
from memory_budget.parts.attention import Attention
from memory_budget.parts.feed_forward import FeedForward
from memory_budget.parts.latent import LatentAttention
from memory_budget.parts.mamba2 import Mamba2
from memory_budget.parts.part import Part
from memory_budget.units import GIB
from memory_budget.vllm.allotment import vllm_allotment, vllm_longest_context
from memory_budget.workload import Workload

HIDDEN = 128
FULL = Attention(hidden=HIDDEN, query_heads=4, key_value_heads=2, head_dim=32)
WINDOW = replace(FULL, window=64)
MAMBA = Mamba2(hidden=HIDDEN, heads=8, head_dim=32, groups=2, state=16, conv_kernel=4)
NEURONS = FeedForward(hidden=HIDDEN, neurons=256)
IN_FLOAT32 = Workload(context_tokens=2048, weights_dtype="float32", kv_dtype="float32")
ON_A_CPU = {"block_size": 128, "max_num_batched_tokens": 4096, "async_scheduling": False}


class Chunked(Attention):
    """Sees what lies in its own chunk of 256 tokens."""

    chunk = 256


class Recurrent(Part):
    """A state that is not Mamba-2's."""

    kind, letter = "mamba", "R"

    def __init__(self, state: int, conv: int) -> None:
        self.numbers = state, conv

    @property
    def state_numbers(self) -> int:
        return self.numbers[0]

    @property
    def conv_numbers(self) -> int:
        return self.numbers[1]


CHUNKED = Chunked(hidden=HIDDEN, query_heads=4, key_value_heads=2, head_dim=32)
LATENT = LatentAttention(hidden=HIDDEN, heads=4, query_rank=0, latent=64, plain_dim=32, rotated_dim=32, value_dim=32)  # keeps a row of 96 numbers for all heads
MAMBA1 = Recurrent(256 * 16, 256 * 3)
DELTA = Recurrent(4 * 32 * 32, 256 * 3)


def model_of(*layers: tuple[int, Part]) -> Model:
    return Model(model_type="tiny", vocab=512, hidden=HIDDEN, tied_embeddings=False, layers=layers, num_layers=4, norms=0)


PRINTED = {
    "llama": (model_of((4, FULL), (4, NEURONS)), {}, 524_288, 256.0),
    "mistral": (model_of((4, WINDOW), (4, NEURONS)), {}, 493_447, 240.94),
    "gemma3": (model_of((3, WINDOW), (1, FULL)), {}, 500_812, 244.54),
    "gemma3, no hybrid manager": (model_of((3, WINDOW), (1, FULL)), {"hybrid_manager": False}, 524_288, 256.0),
    "llama4": (model_of((3, CHUNKED), (1, FULL)), {}, 524_288, 256.0),
    "gemma2": (model_of((3, WINDOW), (2, FULL)), {}, 335_544, 163.84),
    "gpt-oss": (model_of((2, WINDOW), (2, FULL)), {}, 508_400, 248.24),
    "nemotron-h": (model_of((3, MAMBA), (1, FULL), (2, NEURONS)), {}, 1_766_022, 862.32),
    "nemotron-h, prefix caching": (model_of((3, MAMBA), (1, FULL)), {"prefix_caching": True}, 1_342_177, 655.36),
    "granite": (model_of((5, MAMBA), (1, FULL)), {}, 1_597_830, 780.19),
    "granite, prefix caching": (model_of((5, MAMBA), (1, FULL)), {"prefix_caching": True}, 1_082_401, 528.52),
    "falcon-h1": (model_of((4, MAMBA), (4, FULL)), {}, 493_447, 240.94),
    "jamba": (model_of((3, MAMBA1), (1, FULL)), {}, 1_766_022, 862.32),
    "mamba": (model_of((4, MAMBA1)), {}, 28_256_256, 13_797.0),
    "mamba2": (model_of((4, MAMBA)), {}, 27_183_104, 13_273.0),
    "falcon-h1, prefix caching": (model_of((4, MAMBA), (4, FULL)), {"prefix_caching": True}, 441_505, 215.58),
    "jamba, prefix caching": (model_of((3, MAMBA1), (1, FULL)), {"prefix_caching": True}, 1_525_201, 744.73),
    "deepseek": (model_of((3, LATENT)), {"block_size": 16}, 932_064, 455.11),
    "gemma4": (model_of((3, WINDOW), (1, replace(FULL, head_dim=64)), (1, replace(WINDOW, shares_cache=True))), {}, 390_167, 190.51),
    "zamba2": (model_of((6, MAMBA), (2, replace(FULL, key_value_heads=4, head_dim=64))), {}, 220_752, 107.79),
}


@pytest.mark.parametrize("name", PRINTED)
def test_what_vllm_printed(name):
    model, options, tokens, concurrency = PRINTED[name]
    allotment = vllm_allotment(model, IN_FLOAT32, pool_bytes=GIB, **ON_A_CPU | options)
    assert (allotment.kv_cache_tokens, round(allotment.max_concurrency, 2)) == (tokens, concurrency)


def test_an_unlike_state_takes_another_number_of_blocks():
    """Qwen3-Next in bf16, its states in float32: 32,768 blocks for 16 of attention and 3 groups of states, with prefix caching 2 each and not Mamba-2's 3."""
    workload = Workload(context_tokens=2048)
    model = model_of((3, DELTA), (1, FULL))
    plain, cached = (vllm_allotment(model, workload, pool_bytes=GIB, **ON_A_CPU, prefix_caching=caching) for caching in (False, True))
    assert (plain.kv_cache_tokens, cached.kv_cache_tokens) == (3_532_045, 3_050_402)


def test_a_window_takes_what_is_in_flight():
    """ceil(min(W − 1 + f, context) / B) + 1 blocks, by hand: 63 + 512 are 575 tokens, 5 blocks of 128, and one; twice in flight 63 + 1,024, 9 and one. vLLM
    printed 2,796,202 tokens for a request of 4,096 in 6 of 4,096 blocks, and 1,342,177 with a layer of four without a window."""
    workload = replace(IN_FLOAT32, context_tokens=4096)
    blocks = {in_flight: vllm_allotment(model_of((4, WINDOW)), workload, pool_bytes=GIB, block_size=128, max_num_batched_tokens=512,
                                        async_scheduling=in_flight).blocks_per_request for in_flight in (False, True)}  # fmt: skip
    assert blocks == {False: 6, True: 10}
    options = {"pool_bytes": GIB, **ON_A_CPU, "max_num_batched_tokens": 512}
    assert vllm_allotment(model_of((4, WINDOW)), workload, **options).kv_cache_tokens == 2_796_202
    assert vllm_allotment(model_of((3, WINDOW), (1, FULL)), workload, **options).kv_cache_tokens == 1_342_177


def test_a_chunk_takes_itself_and_what_is_in_flight():
    """256 + 512 of 4,096 tokens are 6 blocks of 128."""
    workload = replace(IN_FLOAT32, context_tokens=4096)
    allotment = vllm_allotment(model_of((4, CHUNKED)), workload, pool_bytes=GIB, **ON_A_CPU | {"max_num_batched_tokens": 512})
    assert allotment.blocks_per_request == 6


def test_without_the_hybrid_manager_windows_keep_the_whole_context_where_others_do():
    whole = vllm_allotment(model_of((4, FULL)), IN_FLOAT32, pool_bytes=GIB, **ON_A_CPU)
    assert vllm_allotment(model_of((3, WINDOW), (1, FULL)), IN_FLOAT32, pool_bytes=GIB, **ON_A_CPU, hybrid_manager=False) == whole
    alone = vllm_allotment(model_of((4, WINDOW)), IN_FLOAT32, pool_bytes=GIB, **ON_A_CPU, hybrid_manager=False)
    assert alone.blocks_per_request == 17 != whole.blocks_per_request


def test_layers_of_one_kind_and_unlike_sizes_share_a_group():
    model = model_of((2, FULL), (1, replace(FULL, key_value_heads=1)))
    allotment = vllm_allotment(model, IN_FLOAT32, pool_bytes=GIB, **ON_A_CPU)
    assert (allotment.num_groups, allotment.bytes_per_block, allotment.blocks_per_request) == (1, 65_536 * 2 + 32_768, 16)


def test_two_windows_are_two_kinds():
    allotment = vllm_allotment(model_of((2, WINDOW), (2, replace(WINDOW, window=128))), IN_FLOAT32, pool_bytes=GIB, **ON_A_CPU)
    assert (allotment.num_groups, allotment.bytes_per_block) == (2, 2 * 65_536)


def test_pages_that_do_not_divide_are_padded_and_latent_ones_refused():
    model = model_of((1, WINDOW), (1, replace(FULL, head_dim=48)))
    allotment = vllm_allotment(model, IN_FLOAT32, pool_bytes=GIB, **ON_A_CPU)
    assert (allotment.page_bytes, allotment.block_tokens, allotment.blocks_per_request) == (128 * 768, 128, 16 + 17)
    with pytest.raises(ValueError, match="must divide the largest page"):
        vllm_allotment(model_of((1, LATENT), (1, WINDOW)), IN_FLOAT32, pool_bytes=GIB, **ON_A_CPU)


def test_blocks_of_latent_attention_beside_states_are_multiples_of_128():
    model = model_of((3, MAMBA), (1, LATENT))
    assert vllm_allotment(model, IN_FLOAT32, pool_bytes=GIB).block_tokens == 128 != vllm_allotment(model_of((3, MAMBA), (1, FULL)), IN_FLOAT32, pool_bytes=GIB)


@pytest.mark.parametrize(("blocks", "starts"), [(16, False), (17, True)])
def test_one_block_is_kept_back(blocks, starts):
    """A sequence of 2,048 tokens takes 16 blocks of 262,144 bytes; vLLM 0.32.0 refuses a pool of 16."""
    allotment = vllm_allotment(model_of((4, FULL)), IN_FLOAT32, pool_bytes=blocks * 262_144, **ON_A_CPU)
    assert (allotment.max_concurrency >= 1, allotment.starts) == (True, starts)


def test_the_longest_context_is_the_last_that_starts():
    options = {"pool_bytes": 17 * 262_144, **ON_A_CPU}
    longest = vllm_longest_context(model_of((4, FULL)), IN_FLOAT32, **options)
    assert longest == 2048
    assert vllm_longest_context(model_of((4, FULL)), IN_FLOAT32, most=1000, **options) == 1000
    assert vllm_longest_context(model_of((4, FULL)), IN_FLOAT32, pool_bytes=262_144, **ON_A_CPU) == 0
    assert vllm_longest_context(model_of((4, MAMBA)), IN_FLOAT32, **options) is None


def test_older_versions_logged_the_tokens_of_one_group():
    """A hybrid of 8 groups with 136 blocks of 1,312 tokens: 136 // 8 · 1,312."""
    model = model_of((4, replace(FULL, key_value_heads=8, head_dim=128)), (27, Mamba2(hidden=4480, heads=128, head_dim=80, groups=8, state=128, conv_kernel=4)))
    allotment = vllm_allotment(model, Workload(), pool_bytes=136 * 21_495_808)
    assert (allotment.num_groups, allotment.num_blocks, allotment.older_kv_cache_tokens) == (8, 136, 22_304)
