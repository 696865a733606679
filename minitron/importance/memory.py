"""What scoring will hold, counted from the architecture before anything is loaded.

Weights and states of the residual stream are exact counts; what a layer makes on its way is an estimate (checkpoints/forward_memory.py).
"""

from dataclasses import dataclass

from memory_budget.architecture import Architecture
from memory_budget.parameters import count_parameters, count_total_parameters, layer_parameters
from memory_budget.units import GIB
from minitron.checkpoints.forward_memory import layer_bytes_per_token
from minitron.machine.memory_plan import MemoryPlan
from minitron.settings.run import Placement, ScoringSettings

FLOAT32 = 4
SPARE_SHARE = 0.15  # of what is free: left to the allocator's rounding


@dataclass(frozen=True, slots=True)
class ScoringNeeds:
    """What scoring's memory follows from beside its settings: the model, tokens of a row, bytes of a stored number, processes that share the rows."""

    architecture: Architecture
    row_tokens: int
    bytes_per_number: int
    processes: int = 1

    def plan(self, scoring: ScoringSettings, block_tokens: int) -> MemoryPlan:
        """The depth sweep with blocks of so many tokens, or the walk for width where that holds more."""
        fixed, per_token = self._weights(scoring), self.architecture.hidden * self.bytes_per_number
        width = {**fixed, "states": (scoring.block_tokens + self._batch_tokens(scoring)) * per_token,
                 "a layer's own": self._batch_tokens(scoring) * layer_bytes_per_token(self.architecture, self.bytes_per_number)}  # fmt: skip
        depth = {**fixed, **self._of_depth(scoring), "branches": block_tokens * self._branch_bytes_per_token()}
        parts = max((width, depth), key=lambda one: sum(one.values()))
        advice = "Set scoring.placement=stream, or lower scoring.branch_tokens, scoring.block_tokens, scoring.layer_samples or scoring.reuse_gib"
        return MemoryPlan("score", parts, advice)

    def depth_block_tokens(self, scoring: ScoringSettings, available_bytes: int) -> int:
        """Tokens of a block of the depth sweep: scoring.block_tokens, or as many whole rows as fit, one at least."""
        fixed = sum(self._weights(scoring).values()) + sum(self._of_depth(scoring).values())
        fitting = int((available_bytes * (1 - SPARE_SHARE) - fixed) // self._branch_bytes_per_token())
        return max(self.row_tokens, min(scoring.block_tokens, fitting) // self.row_tokens * self.row_tokens)

    def _weights(self, scoring: ScoringSettings) -> dict[str, int]:
        if scoring.placement is Placement.device:
            return {"weights": self.bytes_per_number * count_total_parameters(self.architecture)}
        layers = [layer_parameters(self.architecture, letter).total for letter in set(self.architecture.pattern)]
        return {"weights": self.bytes_per_number * (2 * max(layers) + count_parameters(self.architecture)["head"])}

    def _of_depth(self, scoring: ScoringSettings) -> dict[str, int]:
        rows, at_once = -(-scoring.layer_samples // self.processes), max(scoring.branch_tokens, self.row_tokens)
        per_token, branches = self.architecture.hidden * self.bytes_per_number, 1 + self.architecture.num_layers
        return {
            "full states": rows * self.row_tokens * per_token,
            "kept for the next round": int(scoring.reuse_gib * GIB),
            "a layer's own": at_once * layer_bytes_per_token(self.architecture, self.bytes_per_number),
            "logits": scoring.logits_tokens * (4 * FLOAT32 * self.architecture.vocab + branches * per_token),
        }

    def _branch_bytes_per_token(self) -> int:
        """Of one token of a block: the intact state, one for every layer that may go, and the copy that they begin from."""
        return (2 + self.architecture.num_layers) * self.architecture.hidden * self.bytes_per_number

    def _batch_tokens(self, scoring: ScoringSettings) -> int:
        return scoring.batch * self.row_tokens
