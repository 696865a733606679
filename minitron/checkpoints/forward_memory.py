"""What forward passes of whole models hold on a GPU, counted from architectures before anything is loaded.

Weights are exact counts. What a layer makes on its way is counted from the tensors that live at once in its forward pass, named below. (On a CPU, where
Mamba-2 and feed-forward layers go by blocks, it is less, and nothing is refused by it.)
"""

from collections.abc import Sequence
from dataclasses import replace

from memory_budget.architecture import WINDOWED, Architecture
from memory_budget.parameters import count_total_parameters, expert_parameters, layer_parameters
from minitron.checkpoints.forward_work import busiest_share, has_mask
from minitron.machine.memory_plan import MemoryPlan
from minitron.mamba import block_sizes
from minitron.mamba.kernel_memory import ScanMemory

FLOAT32 = 4
KEPT_BYTES = 2**27  # of a streamed layer's experts, as stored: so many stay for the next tokens, which spares small models from reading anew
ATTENTION = ("*", WINDOWED)


def forward_memory(stage: str, models: Sequence[tuple[Architecture, int]], *, tokens: int, logits_tokens: int, advice: str) -> MemoryPlan:
    """Models of an architecture and bytes per number each, all there at once, one of them at work on so many tokens.

    `logits_tokens` are those whose float32 logits are there at once, of model and teacher, with as much again for what is made of them.
    """
    largest = max(models, key=lambda model: layer_bytes(*model, 1, tokens))
    parts = {
        "weights": sum(width * count_total_parameters(architecture) for architecture, width in models),
        "states": sum(tokens * architecture.hidden * width for architecture, width in models),
        "a layer's own": layer_bytes(*largest, 1, tokens),
        "logits": 4 * FLOAT32 * min(logits_tokens, tokens) * largest[0].vocab,
    }
    return MemoryPlan(stage, parts, advice)


def layer_bytes(model: Architecture, width: int, rows: int, tokens: int, *, autocast: bool = False, tapped: bool = False) -> int:
    """The most that one layer holds on its way in eval mode on a GPU, on so many rows of so many tokens, `width` bytes a number: its input and the norm's
    output, which a mixer's callers hold to its end, and the mixer's own, or what the norm makes where that is more. `tapped`: importance is read on the way.
    """
    copies = 2 if width == FLOAT32 else 3  # in float32: the input, where that is narrower, and the normed one without and with the norm's weight
    states, normed = rows * tokens * model.hidden * width, copies * FLOAT32 - width
    if tokens <= block_sizes.LONG_TOKENS:
        kinds = [_mixer_bytes(model, letter, width, rows, tokens, autocast=autocast, tapped=tapped) for letter in set(model.pattern)]
        return 2 * states + max(normed * model.hidden * rows * tokens, *kinds)
    block = block_sizes.largest_block(tokens)  # of the parts' outputs there are those, and once more when they are joined; of heads a sum in float32
    kinds = [2 * states, states + normed * model.hidden * rows * block]
    for letter in set(model.pattern):
        if letter in ATTENTION:
            one = _mixer_bytes(model, letter, width, rows, tokens, autocast=autocast, tapped=tapped) // model.num_key_value_heads
            kinds.append(FLOAT32 * model.hidden * rows * tokens + states + one)
        else:  # experts see the whole row
            kinds.append(states + _mixer_bytes(model, letter, width, rows, tokens if letter == "E" else block, autocast=autocast, tapped=tapped))
    return 2 * states + max(kinds)


def walked_bytes(model: Architecture, width: int, rows: int, tokens: int, all_rows: int, *, tapped: bool = False) -> int:
    """`layer_bytes` of a walk through the layers (placement.run_layer), which gives so many rows at a time to each, but all at once to one with experts."""
    kinds = [(letter, all_rows if letter == "E" else rows) for letter in set(model.pattern)]
    return max(layer_bytes(replace(model, pattern=letter), width, at_once, tokens, tapped=tapped) for letter, at_once in kinds)


def streamed_bytes(model: Architecture, width: int) -> int:
    """Of a model that is read layer by layer the layer at work and the next, `width` bytes a number, at the most; of experts those that are kept, the one at
    work and the next (checkpoints/streamed_experts.py)."""

    def of_layer(letter: str) -> int:
        layer = layer_parameters(model, letter).total * width
        if letter != "E":
            return 2 * layer
        each = expert_parameters(model) * width
        routed = each * model.moe_num_experts
        return 2 * (layer - routed) + min(KEPT_BYTES, routed) + 2 * each

    return max(map(of_layer, set(model.pattern)))


def score_bytes(model: Architecture, letter: str, width: int, rows: int, tokens: int) -> int:
    """Attention's scores [B, Q, T, T] where torch makes them: in float32 with keys shared by heads, for which it has no fused kernel on a GPU (sdp_utils.cpp:
    flash attention wants 16 bits, memory-efficient attention as many keys as queries, which transformers makes of them where there is a mask)."""
    shared = model.num_attention_heads != model.num_key_value_heads and not has_mask(model, letter, tokens)
    return FLOAT32 * model.num_attention_heads * rows * tokens**2 if width == FLOAT32 and shared else 0


def _mixer_bytes(model: Architecture, letter: str, width: int, rows: int, tokens: int, *, autocast: bool, tapped: bool) -> int:
    """Mamba-2: in_proj's output, the convolution's, the scan's, and what the scan's kernel takes, or in transformers' gated norm of scan and gate three
    float32 [T, I] at once (two where the scan gives float32). Attention: queries, keys, values, their weighted sum, and what comes of it; a mask, as
    it is made, of a byte each, and as it is added, with keys and values for every query head.
    Feed-forward: up's output, its relu and the square, which autocast makes of a float32 copy. A tap: magnitudes of what it reads, and again in float32.
    Experts: the router's float32 copy of what it reads and six numbers an expert; then the sum in float32, and of the busiest expert what it reads, its
    neurons, its output and that weighted; then the shared expert beside the sum.
    """
    all_tokens = rows * tokens
    taps = 0 if not tapped else width if width == FLOAT32 else width + FLOAT32  # bytes of a number that is read
    if letter == "M":  # its tap reads before the convolution, when there is less
        scan = ScanMemory(model.mamba_num_heads, model.mamba_head_dim, model.mamba_num_groups, model.mamba_state_size, rows, tokens, width)
        outputs = 2 * model.mamba_inner + 2 * model.mamba_conv_channels + model.mamba_num_heads
        gated_norm = (2 if width == FLOAT32 else 3) * FLOAT32 * model.mamba_inner * all_tokens
        return all_tokens * width * outputs + max(scan.scan(), gated_norm)
    if letter in ATTENTION:
        queries, keys = (heads * model.attention_head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
        scores = 13 * score_bytes(model, letter, width, rows, tokens) // FLOAT32  # before and after the softmax, which copies and masks them
        masks = all_tokens * ((width + 1) * tokens + 2 * queries * width) if has_mask(model, letter, tokens) else 0
        return all_tokens * 2 * (queries + keys) * width + max(all_tokens * max(model.hidden * width, queries * taps), scores, masks)
    if model.ffn_gated:  # gate, its activation and up, or the product in the first one's stead
        of_neuron = max(3 * width, width + taps)
    else:
        squared = FLOAT32 if autocast and width < FLOAT32 else width
        of_neuron = max(2 * width + squared + (squared if squared != width else 0), width + taps)
    if letter == "-":
        return all_tokens * model.ffn * of_neuron
    reads = model.moe_latent or model.hidden
    router = model.hidden * (FLOAT32 if width < FLOAT32 else 0) + 6 * FLOAT32 * model.moe_num_experts
    busiest = FLOAT32 * reads + busiest_share(model) * (reads * (2 * width + FLOAT32) + model.moe_ffn * of_neuron)
    shared = model.hidden * width + model.moe_shared_ffn * of_neuron
    return int(all_tokens * (model.moe_latent * width + max(router, busiest, (FLOAT32 + width) * reads, shared)))
