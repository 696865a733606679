"""What scoring computes: one pass for widths, and for layers a sweep of branches after each removal. Loads no torch."""

from memory_budget.architecture import Architecture
from memory_budget.parameters import expert_parameters
from minitron.checkpoints.forward_work import forward_work, head_work, load_work
from minitron.machine.pace import Work
from minitron.settings.run import Criterion, Placement, ScoringSettings


def scoring_work(model: Architecture, scoring: ScoringSettings, *, length: int, fewest_layers: int, width: int) -> Work:
    """Of a model of `width` bytes a number on rows of `length` tokens, whose layers go down to `fewest_layers`.

    In a round every layer that may go is left out of a branch of its own, which begins where the layer was: half of as many passes as there are layers. A
    streamed model is read for each block of tokens, and in a round its experts for each scoring.branch_tokens.
    """
    tokens, streams = scoring.samples * length, scoring.placement is Placement.stream
    work = load_work(model, width) * (-(-tokens // scoring.block_tokens) if streams else 1)
    work += forward_work(model, tokens, length, batches=scoring.samples / scoring.batch) * 1.5  # as much again is read and summed up
    removals = model.num_layers - fewest_layers
    if scoring.criterion is Criterion.block_influence or not removals:
        return work
    rounds = removals if scoring.criterion.name.startswith("iterative_") else 1
    tokens = scoring.layer_samples * length
    intact = forward_work(model, tokens, length, batches=scoring.layer_samples / scoring.batch)
    experts = Work(read=width * model.num_layers_of("E") * model.moe_num_experts * expert_parameters(model) if "E" in model.pattern else 0)
    heads = head_work(model, tokens, passes=2 if scoring.criterion.name.endswith("mse") else 5)
    for gone in range(rounds):
        kept = model.num_layers - gone
        share = kept / model.num_layers
        work += intact * (share * (1 + kept / 2) * _walked_again(scoring, gone)) + heads * (1 + kept)
        if streams:
            work += load_work(model, width) * share + experts * (share * max(1.0, (1 + kept / 2) * tokens / scoring.branch_tokens))
    return work


def _walked_again(scoring: ScoringSettings, gone: int) -> float:
    """The share of a round's branches that is computed: states saved before the layer that went last are gone on from (scoring.reuse_gib)."""
    return 1.0 if gone == 0 or not scoring.reuse_gib else 0.75
