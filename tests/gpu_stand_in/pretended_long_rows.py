"""A long row through few and many layers on the pretended device: how much the layers' activations take, by what is kept of them. Prints JSON.

python pretended_long_rows.py gives {way: {layers: [bytes at the peak beside weights and gradients, digest of the gradients]}}.
"""

import hashlib
import json

import torch
from pretended_cuda import ALLOCATOR
from pretended_torch import install

TOKENS, HIDDEN, VOCABULARY = 2048, 32, 64
WAYS = ((False, "all kept"), (True, "inputs on the device"), ("host", "inputs in main memory"))


def measured(pattern: str, way: bool | str) -> tuple[int, str]:
    """The peak of one forward and backward pass beside what the model itself holds, and what its gradients are."""
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
        "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1,
        "ssm_state_size": 16, "conv_kernel": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = FAMILY.build(config).to("cuda:0")
    plan = TrainPlan(tokens=TOKENS, optimizer="adamw", learning_rate=1e-3, final_learning_rate_share=0.1, warmup_share=0.1, weight_decay=0.0, clip_norm=1.0,
                     gradient_checkpointing=way)  # fmt: skip
    engine = open_engine(Launch(), model, plan)
    model.train()
    rows = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    held = ALLOCATOR.allocated
    ALLOCATOR.reset_peak()
    engine.backward(engine.measure(next_token_objective, rows))
    gradients = [parameter.grad for parameter in model.parameters()]
    beside = ALLOCATOR.peak - held - sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    return beside, hashlib.sha256(b"".join(gradient.cpu().numpy().tobytes() for gradient in gradients)).hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    install()
    print(json.dumps({title: {len(pattern): measured(pattern, way) for pattern in ("M-" * 2, "M-" * 6, "M-" * 12)} for way, title in WAYS}))


if __name__ == "__main__":
    main()
