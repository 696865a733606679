"""A long row through few and many layers on the pretended device: how much the layers' activations take, by what is kept of them. Prints JSON.

python pretended_long_rows.py gives {way: {layers: [bytes at the peak beside weights and gradients, digest of the gradients]}}. The last way goes by blocks of
tokens, whose gradients are sums in another order: in place of the digest stands their difference from the others, relative, the larger one of a plain and
a packed row (whose attention has a mask of [T, T] without flash attention, so that its peak says nothing).
"""

import hashlib
import json

import torch
from pretended_cuda import ALLOCATOR
from pretended_torch import install

TOKENS, HIDDEN, VOCABULARY, FFN = 2048, 32, 64, 64
BLOCK, STARTS = 256, (300, 512, 515, 1900)  # tokens of a block, and where the row's documents but the first begin
WAYS = ((False, "all kept"), (True, "inputs on the device"), ("host", "inputs in main memory"))
PATTERNS = ("M-" * 2, "M-" * 6, "M-" * 12)


def measured(pattern: str, way: bool | str, *, packed: bool = False) -> tuple[int, torch.Tensor]:
    """The peak of one forward and backward pass beside what the model itself holds, and what its gradients are."""
    from distill.batches import mark_start
    from distill.engines.launch import Launch
    from distill.engines.opening import open_engine
    from distill.objectives import next_token_objective
    from distill.plan import TrainPlan
    from minitron.families.nemotron_h import FAMILY
    from minitron.mamba import dispatch
    from minitron.training.tiny_teacher import TINY_CONFIG

    dispatch.install()
    kinds = {"M": "linear_attention", "-": "mlp", "*": "full_attention"}
    config = {name: value for name, value in TINY_CONFIG.items() if name != "model_type"} | {
        "model_type": "nemotron_h", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "layers_block_type": [kinds[letter] for letter in pattern],
        "intermediate_size": FFN, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1,
        "ssm_state_size": 16, "conv_kernel": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = FAMILY.build(config).to("cuda:0")
    plan = TrainPlan(tokens=TOKENS, optimizer="adamw", learning_rate=1e-3, final_learning_rate_share=0.1, warmup_share=0.1, weight_decay=0.0, clip_norm=1.0,
                     gradient_checkpointing=way)  # fmt: skip
    engine = open_engine(Launch(), model, plan)
    model.train()
    rows = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    if packed:
        rows[0, list(STARTS)] = mark_start(rows[0, list(STARTS)])
    held = ALLOCATOR.allocated
    ALLOCATOR.reset_peak()
    engine.backward(engine.measure(next_token_objective, rows))
    gradients = [parameter.grad for parameter in model.parameters()]
    beside = ALLOCATOR.peak - held - sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    return beside, torch.cat([gradient.cpu().flatten() for gradient in gradients])


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    torch.set_num_threads(1)
    install()
    from minitron.mamba import block_sizes

    found, whole = {}, {}
    for way, title in WAYS:
        found[title] = {}
        for pattern in PATTERNS:
            peak, whole[pattern] = measured(pattern, way)
            found[title][len(pattern)] = peak, hashlib.sha256(whole[pattern].numpy().tobytes()).hexdigest()
    whole["packed"] = measured(PATTERNS[0], "host", packed=True)[1]
    block_sizes.LONG_TOKENS = block_sizes.BLOCK_TOKENS = BLOCK
    found["by blocks"] = {}
    for pattern in PATTERNS:
        peak, gradients = measured(pattern, "host")
        of_packed = measured(pattern, "host", packed=True)[1] if pattern == PATTERNS[0] else whole["packed"]
        found["by blocks"][len(pattern)] = peak, max(difference(gradients, whole[pattern]), difference(of_packed, whole["packed"]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
