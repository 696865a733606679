"""What scoring will hold on a GPU, counted from the architecture before anything is loaded.

Weights and states of the residual stream are exact counts; what a layer makes on its way is counted tensor by tensor (checkpoints/forward_memory.py).
"""

from dataclasses import dataclass

from memory_budget.architecture import Architecture
from memory_budget.parameters import count_parameters, count_total_parameters
from memory_budget.units import GIB
from minitron.checkpoints.forward_memory import streamed_bytes, walked_bytes
from minitron.machine.memory_plan import MemoryPlan
from minitron.settings.run import Criterion, Placement, ScoringSettings

FLOAT32, INT64 = 4, 8
SPARE_SHARE = 0.15  # of what is free: left to the allocator's rounding
# Float32 [N, V] at once while branches' logits are compared with the full model's: both and their product, or the logarithms and a float64 sum's copy too.
LOGITS_AT_ONCE = {"mse": 3, "loss": 3, "kl": 7}


@dataclass(frozen=True, slots=True)
class ScoringNeeds:
    """What scoring's memory follows from beside its settings: the model, tokens of a row, bytes of a stored number, processes that share the rows."""

    architecture: Architecture
    row_tokens: int
    bytes_per_number: int
    processes: int = 1

    def plan(self, scoring: ScoringSettings, block_tokens: int) -> MemoryPlan:
        """The moment that holds most, with blocks of so many tokens in the depth sweep."""
        parts = max(self.moments(scoring, block_tokens).values(), key=lambda one: sum(one.values()))
        advice = "Set scoring.placement=stream, or lower scoring.branch_tokens, scoring.block_tokens, scoring.layer_samples or scoring.reuse_gib"
        return MemoryPlan("score", parts, advice)

    def moments(self, scoring: ScoringSettings, block_tokens: int) -> dict[str, dict[str, int]]:
        """Bytes by part: of the walk for width, of the depth sweep's layers, and of its comparison of logits. A criterion of the width walk needs no sweep.

        "ids" are those of the rows, as they come and as the model takes them, and every token's length in the walk for width.
        """
        tokens = self.width_tokens(scoring)
        width = {"weights": self._layer_weights(scoring), "ids": tokens * (2 * INT64 + FLOAT32), "states": tokens * self._per_token,
                 "a layer's own": self._own(scoring.batch, tokens // self.row_tokens, tapped=True)}  # fmt: skip
        if scoring.criterion is Criterion.block_influence:
            return {"width": width}
        branches = self.architecture.num_layers
        tokens = self._share(scoring.layer_samples) * self.row_tokens
        kept = {"ids": (tokens + block_tokens) * INT64, "full states": tokens * self._per_token,
                "kept for the next round": int(scoring.reuse_gib * GIB)}  # fmt: skip
        # Of one token of a block: the intact state, one for every layer that may go, and, until the layers end, the copy that they begin from.
        sweep = {"weights": self._layer_weights(scoring), **kept, "branches": (2 + branches) * block_tokens * self._per_token,
                 "a layer's own": self._own(max(1, scoring.branch_tokens // self.row_tokens), block_tokens // self.row_tokens)}  # fmt: skip
        logits = {"weights": self._head_weights(scoring), **kept, "branches": (1 + branches) * block_tokens * self._per_token, "logits": self._logits(scoring)}
        return {"width": width, "sweep": sweep, "logits": logits}

    def depth_block_tokens(self, scoring: ScoringSettings, available_bytes: int) -> int:
        """Tokens of a block of the depth sweep: scoring.block_tokens, or as many whole rows as fit, one at least."""
        parts = [parts for name, parts in self.moments(scoring, 0).items() if name != "width"]
        fixed = max((sum(part.values()) for part in parts), default=0)
        fitting = int((available_bytes * (1 - SPARE_SHARE) - fixed) // ((2 + self.architecture.num_layers) * self._per_token + INT64))
        return max(self.row_tokens, min(scoring.block_tokens, fitting) // self.row_tokens * self.row_tokens)

    @property
    def _per_token(self) -> int:
        """Bytes of one token's residual."""
        return self.architecture.hidden * self.bytes_per_number

    def _share(self, samples: int) -> int:
        """Rows of this process."""
        return -(-samples // self.processes)

    def width_tokens(self, scoring: ScoringSettings) -> int:
        """Tokens of a block of the width walk, whole rows."""
        return min(max(1, scoring.block_tokens // self.row_tokens), self._share(scoring.samples)) * self.row_tokens

    def _own(self, rows: int, all_rows: int, *, tapped: bool = False) -> int:
        """What a layer makes on its way beside its input, which is one of the states."""
        made = walked_bytes(self.architecture, self.bytes_per_number, rows, self.row_tokens, max(rows, all_rows), tapped=tapped)
        return made - rows * self.row_tokens * self._per_token

    def _logits(self, scoring: ScoringSettings) -> int:
        criterion = scoring.criterion.name.removeprefix("iterative_")
        matrices, branches = LOGITS_AT_ONCE[criterion] * FLOAT32 * self.architecture.vocab, self.architecture.num_layers
        return min(scoring.logits_tokens, scoring.batch * self.row_tokens) * (matrices + branches * self._per_token)

    def _layer_weights(self, scoring: ScoringSettings) -> int:
        """All weights, or of those that are streamed the layer at work and the one that is read."""
        if scoring.placement is Placement.device:
            return self.bytes_per_number * count_total_parameters(self.architecture)
        return streamed_bytes(self.architecture, self.bytes_per_number)

    def _head_weights(self, scoring: ScoringSettings) -> int:
        if scoring.placement is Placement.device:
            return self._layer_weights(scoring)
        return self.bytes_per_number * count_parameters(self.architecture)["head"]
