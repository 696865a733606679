"""What forward passes compute, counted from an architecture: products of matrices, and the numbers that layers make between them. Loads no torch."""

from memory_budget.architecture import WINDOWED, Architecture
from memory_budget.parameters import count_active_parameters, count_total_parameters
from minitron.machine.pace import Work
from minitron.mamba.block_sizes import SCAN_TOKENS
from nas.throughput import attention_flops, head_flops, layer_flops_per_token, reached_experts

MAMBA_PASSES = 2.8  # over a number that a Mamba-2 mixer keeps, for one over any other's: its scan goes by short chunks
EXPERT_CALLS = 0.4  # of a sublayer, for each expert that has a token: 100 µs
LOGIT_PASSES = 3  # over the logits of a token: made, compared, summed up


def forward_work(model: Architecture, tokens: float, length: int, *, batches: float = 1) -> Work:
    """All layers of a model over `tokens` tokens in rows of `length`, walked in so many batches; no logits."""
    kept = sum(layer_numbers(model, letter, length, by_blocks=True) * (MAMBA_PASSES if letter == "M" else 1) for letter in model.pattern)
    numbers = kept + seen_numbers(model, length) * model.num_attention_heads  # attention's scores
    products = layer_flops_per_token(model) + attention_flops(model, seen_numbers(model, length)) + _scan_flops(model)
    return Work(products=tokens * products, numbers=tokens * numbers, calls=batches * _calls(model, tokens / max(1, batches)))


def _calls(model: Architecture, tokens: float) -> float:
    """Of a batch's sublayers, with so many tokens; experts that it reaches are called one by one."""
    reached = model.num_layers_of("E") * reached_experts(model, tokens) if "E" in model.pattern else 0
    return model.num_sublayers + EXPERT_CALLS * reached


def head_work(model: Architecture, tokens: float, passes: float = LOGIT_PASSES) -> Work:
    """Logits of so many tokens, and what is made of them."""
    return Work(products=tokens * head_flops(model), numbers=tokens * passes * model.vocab)


def load_work(model: Architecture, width: int) -> Work:
    """A model of `width` bytes a number read from disk and put together."""
    return Work(read=width * count_total_parameters(model), calls=10 * model.num_sublayers)


def decode_work(model: Architecture, tokens: float, width: int) -> Work:
    """Tokens one at a time: each passes all weights by, but the experts it is not sent to."""
    return Work(calls=tokens * _calls(model, 1), decoded=tokens * width * count_active_parameters(model))


def seen_numbers(model: Architecture, length: int) -> float:
    """Keys that a token is multiplied with in all attention layers together, on average over a row of `length`: half of the row in a causal layer, but under
    a window's mask all of it, since torch computes what the mask leaves out (on a CPU at 2,048 tokens 1.8 times the causal time, whatever the window)."""
    masked = model.num_layers_of(WINDOWED) if has_mask(model, WINDOWED, length) else 0
    return length * (model.num_layers_of("*") + masked) / 2


def has_mask(model: Architecture, letter: str, length: int) -> bool:
    """Whether a layer goes by a mask [T, T]: within a window that does not hold the row and the token after it (transformers' masking_utils)."""
    return letter == WINDOWED and 0 < model.window <= length


def layer_numbers(model: Architecture, letter: str, length: int, *, by_blocks: bool) -> int:
    """Numbers a token of a row of `length` that one layer keeps for its backward pass on a CPU: its norm's input and output, those of a second norm, and its
    mixer's own."""
    if letter == "M":  # in_proj's output, the scan's, the gated norm's; by blocks also the convolution's and the states between chunks
        mixer = model.mamba_inner + model.mamba_conv_channels + model.mamba_num_heads + 2 * model.mamba_inner
        if by_blocks:
            mixer += model.mamba_conv_channels + model.mamba_inner * model.mamba_state_size // SCAN_TOKENS
    elif has_mask(model, letter, length):  # queries, keys and values for each, their weighted sum, and the mask as it is added to the scores
        mixer = 4 * model.num_attention_heads * model.attention_head_dim + length
    elif letter in ("*", WINDOWED):  # queries, keys, values, their weighted sum
        mixer = 2 * (model.num_attention_heads + model.num_key_value_heads) * model.attention_head_dim
    elif letter == "E":
        mixer = _experts_numbers(model, by_blocks=by_blocks)
    elif model.ffn_gated:  # gate, its activation, up, their product
        mixer = 4 * model.ffn
    else:  # up's output, and unless it goes by blocks its relu and the square
        mixer = model.ffn if by_blocks else 3 * model.ffn
    return 2 * (1 + model.post_norms) * model.hidden + mixer


def _experts_numbers(model: Architecture, *, by_blocks: bool) -> int:
    """Of a token: the router's scores of all experts, and what is made of them; for each expert that it is sent to what that reads, its neurons (gate, its
    activation, up and their product; or relu and the square) and its output; the experts' sum where it is a latent; the shared expert's neurons as an FFN's."""
    width = model.moe_latent or model.hidden
    routed = model.moe_experts_per_token * ((4 if model.ffn_gated else 2) * model.moe_ffn + 2 * width)
    shared = (4 if model.ffn_gated else 1 if by_blocks else 3) * model.moe_shared_ffn
    return 2 * model.moe_num_experts + routed + model.moe_latent + shared


def passing_numbers(model: Architecture, letter: str, length: int) -> float:
    """Numbers a token that one layer makes on its way on a CPU where nothing is kept for a backward pass. Of experts the router's, then their sum and what
    the busiest one has, then the shared one's; of other layers as many as they would keep."""
    if letter != "E":
        return layer_numbers(model, letter, length, by_blocks=True)
    reads, of_neuron = model.moe_latent or model.hidden, 4 if model.ffn_gated else 3
    busiest = reads + busiest_share(model) * (3 * reads + of_neuron * model.moe_ffn)
    shared = model.hidden + (of_neuron if model.ffn_gated else 1) * model.moe_shared_ffn
    return 2 * (1 + model.post_norms) * model.hidden + model.moe_latent + max(model.hidden + 6 * model.moe_num_experts, busiest, shared)


def busiest_share(model: Architecture) -> float:
    """Of a layer's tokens, those that are sent to its busiest expert: taken to be four times what an even router would send there."""
    return min(1.0, 4 * model.moe_experts_per_token / model.moe_num_experts)


def _scan_flops(model: Architecture) -> int:
    """Of a token in every Mamba-2 layer: into the state and out of it, and within chunks (SSD, arXiv 2405.21060, §6)."""
    inner, groups = model.mamba_inner, model.mamba_num_groups * model.mamba_state_size
    return model.num_layers_of("M") * (4 * inner * model.mamba_state_size + 2 * SCAN_TOKENS * (groups + inner))
