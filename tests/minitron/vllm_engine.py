"""Run by an interpreter that has vLLM, not by pytest: reads one model folder after another in one process, and tells the log-probabilities of a prompt.

A line in, JSON: {"folder", "ids", "options"}, the options being those of vllm.LLM; a line out, JSON: {"log_probabilities"}, nats of every id but the first,
or {"error"}. What vLLM itself prints goes to standard error.
"""

import json
import os
import sys
import traceback

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def log_probabilities(folder: str, ids: list[int], options: dict) -> list[float]:
    """Of a new engine in this process, which is gone afterwards."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(model=folder, enforce_eager=True, distributed_executor_backend="uni", **options)
    try:
        (got,) = engine.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0), use_tqdm=False)
        return [row[token].logprob for row, token in zip(got.prompt_logprobs[1:], ids[1:], strict=True)]
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()


def main() -> None:
    for line in sys.stdin:
        try:
            answer = {"log_probabilities": log_probabilities(**json.loads(line))}
        except Exception:  # to be told to who asked, so that the next folder has its turn
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
