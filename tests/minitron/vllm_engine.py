"""Run by an interpreter that has vLLM, not by pytest: reads one model folder after another in one process, and tells the log-probabilities of a prompt.

A line in, JSON: {"folder", "ids", "options"}, the options being those of vllm.LLM; a line out, JSON: {"log_probabilities", "cache_tokens", "concurrency"},
nats of every id but the first and what vLLM logs of its caches; or {"error"}. What vLLM itself prints goes to standard error.
"""

import json
import os
import sys
import traceback

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def read(folder: str, ids: list[int], options: dict) -> dict:
    """Of a new engine in this process, which is gone afterwards."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(model=folder, enforce_eager=True, distributed_executor_backend="uni", **options)
    try:
        (got,) = engine.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0), use_tqdm=False)
        found, caches = zip(got.prompt_logprobs[1:], ids[1:], strict=True), engine.llm_engine.vllm_config.cache_config
        return {"log_probabilities": [row[token].logprob for row, token in found], "cache_tokens": caches.kv_cache_size_tokens,
                "concurrency": caches.kv_cache_max_concurrency}  # fmt: skip
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()


def main() -> None:
    for line in sys.stdin:
        try:
            answer = read(**json.loads(line))
        except Exception:  # to be told to who asked, so that the next folder has its turn
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
