"""Run by an interpreter that has vLLM, not by pytest: reads one model folder after another in one process, and tells the log-probabilities of a prompt.

A line in, JSON: {"folder", "ids", "options"}, the options being those of vllm.LLM, and plain_experts, which is this file's; without ids only the caches are
asked for, and kv_cache_memory_bytes takes the place of VLLM_CPU_KVCACHE_SPACE. A line out, JSON: {"log_probabilities", "cache_tokens", "concurrency",
"context", "limits"}, nats of every id but the first, what vLLM logs of its caches, and its --max-model-len and [--max-num-batched-tokens, --max-num-seqs] as
it settled them; or {"error"}. What vLLM itself prints goes to standard error.
"""

import json
import os
import sys
import traceback
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def read(folder: str, ids: list[int], options: dict) -> dict:
    """Of a new engine in this process, which is gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engine, space = None, os.environ["VLLM_CPU_KVCACHE_SPACE"]
    experts = plain_experts() if options.pop("plain_experts", False) else nullcontext()
    if "kv_cache_memory_bytes" in options:
        del os.environ["VLLM_CPU_KVCACHE_SPACE"]
    try:
        with experts:
            engine = LLM(model=folder, enforce_eager=True, distributed_executor_backend="uni", **options)
            config = engine.llm_engine.vllm_config
            caches, limits = config.cache_config, config.scheduler_config
            return {"log_probabilities": log_probabilities(engine, ids) if ids else [], "cache_tokens": caches.kv_cache_size_tokens,
                    "concurrency": caches.kv_cache_max_concurrency, "context": config.model_config.max_model_len,
                    "limits": [limits.max_num_batched_tokens, limits.max_num_seqs]}  # fmt: skip
    finally:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = space
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
            del engine
        cleanup_dist_env_and_memory()


@contextmanager
def plain_experts():
    """For experts that are not gated vLLM 0.32.0 has no kernel on a CPU: FusedMoEConfig refuses them there, and CPUUnquantizedExperts does not take them. Plain
    products stand in for that kernel; all else is vLLM's: how tensors are named and loaded, the router, the shared expert, and what multiplies their sum."""
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts as Kernel

    def apply(_self, output, hidden_states, w1, w2, topk_weights, topk_ids, **_more):
        output.zero_()
        for expert, (up_FD, down_DF) in enumerate(zip(w1, w2, strict=True)):
            tokens, places = (topk_ids == expert).nonzero(as_tuple=True)
            inner = (hidden_states[tokens] @ up_FD.T).relu().square()
            output.index_add_(0, tokens, inner @ down_DF.T * topk_weights[tokens, places, None])

    yes = staticmethod(lambda *_: True)
    stand_ins = {
        (config, "current_platform"): SimpleNamespace(is_cuda_alike=lambda: True, fp8_dtype=config.current_platform.fp8_dtype),
        (Kernel, "_supports_no_act_and_mul"): yes, (Kernel, "_supports_activation"): yes,
        (Kernel, "process_weights_after_loading"): lambda *_: None, (Kernel, "apply"): apply,
    }  # fmt: skip
    own = {(owner, name): vars(owner)[name] for owner, name in stand_ins}
    try:
        for (owner, name), value in stand_ins.items():
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name), value in own.items():
            setattr(owner, name, value)


def log_probabilities(engine, ids: list[int]) -> list[float]:
    from vllm import SamplingParams

    (got,) = engine.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0), use_tqdm=False)
    return [row[token].logprob for row, token in zip(got.prompt_logprobs[1:], ids[1:], strict=True)]


def main() -> None:
    for line in sys.stdin:
        try:
            answer = read(**json.loads(line))
        except Exception:  # to be told to who asked, so that the next folder has its turn
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
