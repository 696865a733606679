"""What llama.cpp allots: the lines "model", "KV", "RS" and "compute buffer size" that it logs when it loads a model.

Sources, of ggml-org/llama.cpp as in llama-cpp-python 0.3.36: src/llama-context.cpp (contexts are made a multiple of 256), src/llama-kv-cache.cpp,
src/llama-kv-cache-iswa.cpp (windows), src/llama-memory-recurrent.cpp and src/llama-hparams.cpp (`n_embd_r`, `n_embd_s`); the sum over all devices.

    C = 256·ceil(context / 256)                                       cells of a sequence
    w = min(C, 256·ceil(min(C, window + U) / 256))                    cells of a layer with a window, for types whose windows llama.cpp knows; U = ubatch
    KV = batch·sum over attention layers of cells·(row of K·H keys + row of K·H values), rows in the caches' types
    RS = batch·sum over recurrent layers of 4·(convolution's numbers + state's numbers)
"""

from memory_budget.architecture import Architecture
from memory_budget.gguf_tensors import F32_BYTES, fallbacks, gguf_bytes
from memory_budget.gguf_types import BLOCKS, PLAIN, check_cache_type, row_bytes
from memory_budget.model import Model, as_model
from memory_budget.parts.attention import Attention
from memory_budget.parts.experts import Experts
from memory_budget.parts.feed_forward import FeedForward
from memory_budget.parts.part import Part

CELLS = 256  # contexts are made multiples of it
DEFAULT_UBATCH = 512
# Of the other types llama.cpp keeps the whole context in every layer (src/models: swa_type); Phi-3's windows it turns off.
WINDOWED_TYPES = ("gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gpt_oss", "cohere2", "olmo3", "exaone4", "llama4",
                  "llama4_text", "smallthinker")  # fmt: skip


def llamacpp_allotment(
    counted: Architecture | Model,
    *,
    context: int,
    batch: int = 1,
    ubatch: int = DEFAULT_UBATCH,
    quant: str = "F16",
    kv_type_k: str = "f16",
    kv_type_v: str = "f16",
    flash_attention: bool = True,
    unified: bool = False,
    full_windows: bool = False,
    importance: bool = False,
) -> dict[str, int]:
    """Bytes by buffer: model, kv, recurrent, compute_estimate. Scalars only.

    context: tokens of each sequence · batch: sequences at once (-np), so that llama.cpp's own -c is context·batch · ubatch: tokens of a forward pass (-ub) ·
    quant: the file's type, such as Q4_K_M · kv_type_k, kv_type_v: the caches' (-ctk, -ctv) · flash_attention: on unless turned off (-fa off) · unified: one
    cache for all sequences (--kv-unified) · full_windows: whole contexts in layers with windows too (--swa-full; the default of llama-cpp-python) ·
    importance: whether the file was quantised with an importance matrix.

    The model's bytes are those of its tensors. llama.cpp holds more where it keeps a tensor twice: a tied embedding whose output side is offloaded to a GPU,
    and, of a mapped file (its default), what it repacks for the CPU's instructions ("CPU_REPACK"). The compute buffer is an estimate: see compute_estimate.
    Raises ValueError for types and sizes that llama.cpp would refuse.
    """
    for name, value in (("context", context), ("batch", batch), ("ubatch", ubatch)):
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    model = as_model(counted)
    types = _cache_types(model, kv_type_k, kv_type_v, flash_attention=flash_attention)
    streams, cells = (1, padded(context * batch)) if unified else (batch, padded(context))
    tokens = min(ubatch, streams * cells)
    kept = {window: window * (batch if unified else 1) + tokens for window in _windows(model)}
    window_cells = {window: padded(min(cells, number)) if not full_windows else cells for window, number in kept.items()}
    return {
        "model": gguf_bytes(counted, quant, importance=importance),
        "kv": streams * sum(number * window_cells.get(_window(model, part), cells) * _token_bytes(part, *types) for number, part in model.layers),
        "recurrent": batch * sum(number * (part.conv_numbers + part.state_numbers) * F32_BYTES for number, part in model.layers),
        "compute_estimate": compute_estimate(model, tokens=tokens, cells=(cells, *window_cells.values()), sequences=batch, flash_attention=flash_attention),
    }


def llamacpp_notes(counted: Architecture | Model, *, quant: str = "F16", importance: bool = False) -> tuple[str, ...]:
    """What a person should know of that allotment, a sentence each: tensors that fall back to another type, windows that llama.cpp does not use."""
    model = as_model(counted)
    windowed = sum(number for number, part in model.layers if getattr(part, "window", 0) and not _window(model, part))
    unused = (f"llama.cpp keeps the whole context in the {windowed} layers with a window: it uses none for {model.model_type}",) if windowed else ()
    return *fallbacks(counted, quant, importance=importance), *unused


def padded(tokens: int) -> int:
    """The multiple of 256 that holds so many tokens."""
    return -(-tokens // CELLS) * CELLS


def _window(model: Model, part: Part) -> int:
    """The window that llama.cpp keeps the mixer's cache to; 0 for none."""
    return getattr(part, "window", 0) if model.model_type in WINDOWED_TYPES else 0


def _windows(model: Model) -> set[int]:
    return {window for _, part in model.layers if (window := _window(model, part))}


def _cache_rows(part: Part) -> tuple[int, int]:
    """Numbers of a token's row of keys and of its row of values. A latent is kept as keys alone."""
    numbers = part.cache_numbers_per_token
    return (numbers // 2, numbers // 2) if isinstance(part, Attention) else (numbers, 0)


def _token_bytes(part: Part, type_k: str, type_v: str) -> int:
    keys, values = _cache_rows(part)
    return row_bytes(type_k, keys) + row_bytes(type_v, values)


def _cache_types(model: Model, kv_type_k: str, kv_type_v: str, *, flash_attention: bool) -> tuple[str, str]:
    """The types by their names in BLOCKS. Raises ValueError as llama.cpp refuses them (src/llama-context.cpp, `llama_init_from_model`)."""
    types = check_cache_type(kv_type_k, "kv_type_k"), check_cache_type(kv_type_v, "kv_type_v")
    if types[1] not in PLAIN and not flash_attention:
        raise ValueError(f"kv_type_v ({kv_type_v}) is quantised, which llama.cpp allows with flash attention alone")
    for _, part in model.layers:
        if not part.cache_numbers_per_token:
            continue
        width = part.head_dim if isinstance(part, Attention) else part.cache_numbers_per_token
        for name, setting in zip(types, ("kv_type_k", "kv_type_v"), strict=True):
            if width % BLOCKS[name][0]:
                raise ValueError(f"{setting} ({name.lower()}) has blocks of {BLOCKS[name][0]}, which must divide a head's {width} numbers")
    return types


def compute_estimate(model: Model, *, tokens: int, cells: tuple[int, ...], sequences: int, flash_attention: bool) -> int:
    """An estimate of the compute buffer: what a forward pass of so many tokens holds at once, at most, for a CPU alone; cells: of each of the model's caches.

    Numbers are F32. The input's embedding is there all along. Beside it come, until the last mixer, a mask of every cache (tokens·cells numbers, F16 with flash
    attention) and at most what the largest mixer holds; then the logits of all tokens, the most by far in a model with a large vocabulary. The sums follow
    the graphs of src/models and src/llama-graph.cpp and the gaps that ggml-alloc leaves in them; make llamacpp-check holds them to 10 %.
    """
    recurrent = any(part.state_numbers for _, part in model.layers)
    masked = sum(cells) if any(part.cache_numbers_per_token for _, part in model.layers) else 0
    mask = tokens * masked * (F32_BYTES // 2 if flash_attention else F32_BYTES)
    output = tokens * (model.vocab + (2 + recurrent) * model.hidden) * F32_BYTES
    mixing = max(_live_numbers(part, model.hidden, tokens, max(cells), sequences, flash_attention) for _, part in model.layers)
    return max(output, mask + (tokens * model.hidden + mixing) * F32_BYTES)


def _live_numbers(part: Part, hidden: int, tokens: int, cells: int, sequences: int, flash_attention: bool) -> int:
    """The most numbers that a mixer and the stream hold at once."""
    if isinstance(part, Attention):
        queries, keys = part.query_heads * part.head_dim, part.key_value_heads * part.head_dim
        scores = 0 if flash_attention else part.query_heads * cells + 2 * keys
        return tokens * (3 * hidden + max(queries * (1 + part.output_gate) + 2 * keys, 2 * queries + scores))
    if isinstance(part, FeedForward):  # gate, up and their product
        return tokens * (3 * hidden + part.neurons * (3 if part.gated else 1))
    if isinstance(part, Experts):
        gates = 3 if part.gated else 1
        outputs = part.width if not part.gated or part.width > 2 * part.neurons else 0  # else they find room where gate and up were
        return tokens * (3 * hidden + max(part.experts_per_token * (gates * part.neurons + outputs), part.shared_neurons * gates))
    channels = getattr(part, "conv_channels", 0)
    if channels:  # Mamba-2 and delta nets: projections, the convolution's inputs and outputs, the scan's outputs with the states behind them
        *projections, (_, _, inner) = part.parameters().matrices
        projected = sum(copies * outputs for copies, outputs, _ in projections)
        return tokens * (2 * hidden + projected + 2 * channels + inner) + sequences * (part.state_numbers + 2 * part.conv_numbers)
    return tokens * 3 * hidden + part.activation_bytes(tokens, 1)
