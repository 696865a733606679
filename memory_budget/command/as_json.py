"""Answers as JSON: the contract's keys."""

from typing import Any

from memory_budget.command.answer import Answer
from memory_budget.command.questions import at_every_format, cards, curve, smallest_card
from memory_budget.parameters import count_active_parameters, count_parameters, count_total_parameters


def as_json(answer: Answer) -> dict[str, Any]:
    """max_* are null where there is no limit; what hangs on a cache that is not known is null too. `notes` is there where there are some."""
    known, report, budget_bytes = answer.model.cache_known, answer.report.as_dict(), answer.budget.bytes
    if not known:
        report |= dict.fromkeys(("kv_cache", "ssm_state", "conv_state", "total"))
    result = {
        "model_type": answer.model.model_type,
        "parameters": count_total_parameters(answer.model),
        "active_parameters": count_active_parameters(answer.model),
        "parameters_by_kind": count_parameters(answer.model),
        "bytes": report,
        "budget_bytes": budget_bytes,
        "fits": answer.report.total <= budget_bytes if known else None,
        "headroom_bytes": budget_bytes - answer.report.total if known else None,
        "max_context_tokens": answer.max_context if known else None,
        "max_batch": answer.max_batch if known else None,
    }
    if answer.vllm is not None:
        result["vllm"] = answer.vllm.allotment.as_dict() | {"refuses": list(answer.vllm.refusals), "reserve_bytes_estimate": answer.vllm.reserve_bytes}
    if answer.gguf is not None:
        result["llamacpp"] = answer.gguf.buffers(answer.counted, answer.workload)
    if answer.notes:
        result["notes"] = answer.notes
    return result


def questions_as_json(answer: Answer, *, with_cards: bool, with_formats: bool, with_curve: bool) -> dict[str, Any]:
    """What --cards, --formats and --plot add."""
    result: dict[str, Any] = {}
    if with_cards:
        card = smallest_card(answer)
        result |= {"smallest_card": card.name if card else None, "cards": cards(answer)}
    if with_formats:
        known = answer.model.cache_known
        result["formats"] = {
            name: {
                "weights": one.report.weights,
                "total": one.report.total if known else None,
                "fits": one.report.total <= one.budget.bytes if known else None,
                "max_context_tokens": one.max_context if known else None,
            }
            for name, one in at_every_format(answer).items()
        }
    if with_curve:
        result["curve"] = [{"context_tokens": context, **parts} for context, parts in curve(answer)]
    return result
