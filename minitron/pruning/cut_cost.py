"""What a compensated cut takes: calibration tokens, memory, time; told or refused before anything is loaded. Loads no torch."""

from dataclasses import dataclass

from memory_budget.architecture import Architecture
from memory_budget.parameters import count_total_parameters, layer_parameters
from memory_budget.units import format_gib
from minitron.checkpoints.forward_work import forward_work
from minitron.machine.pace import Pace, Work
from minitron.machine.rate import duration
from minitron.pruning.plan import Recipe, num_sites, ridge_for


@dataclass(frozen=True, slots=True)
class CutCost:
    """A cut from `base` to `student` by a recipe on calibration `rows` with `tokens` tokens in all, of a base stored in `number_bytes` a number."""

    base: Architecture
    student: Architecture
    recipe: Recipe
    rows: int
    tokens: int
    number_bytes: int

    def few_tokens_note(self) -> str | None:
        """What to say where the calibration tokens are fewer than the inputs of a matrix that is solved for; None where they are not."""
        if self.tokens >= self._widest:
            return None
        ridge, needed = ridge_for(self.recipe.ridge, self._widest, self.tokens), -(-self._widest * self.rows // self.tokens)
        return (f"{self.tokens:,} calibration tokens are fewer than the {self._widest:,} inputs solved for: prune.ridge goes from {self.recipe.ridge:g} up to "
                f"{ridge:.2g}; prune.samples={needed} would do")  # fmt: skip

    def check_memory(self, available: int, where: str) -> None:
        """Refuse to begin what `available` bytes cannot hold. Raises ValueError."""
        needed = self.held_bytes
        if needed <= available:
            return
        beside = needed - self._residual_bytes
        fitting = self.rows * (available - beside) // self._residual_bytes
        advice = f"prune.samples={fitting} would fit" if fitting > 0 else f"{format_gib(beside)} are for the matrices alone, so prune.method must be slice"
        said = f"the compensated cut needs at least {format_gib(needed)}, and {where} has {format_gib(available)}"
        raise ValueError(f"prune.samples is {self.rows}, {self.tokens:,} tokens: {said}; {advice}")

    def line(self, pace: Pace | None) -> str:
        """What the cut will hold and about how long it will take, for the terminal."""
        of_widest = f", {self.tokens / self._widest:,.0f} for each input of the widest matrix refitted" if self._widest else ""
        time = f", takes about {duration(pace.seconds(self.work) / 3600)}" if pace else ""
        return f"{self.tokens:,} calibration tokens ({self.rows} rows{of_widest}); holds about {format_gib(self.held_bytes)}{time}"

    @property
    def held_bytes(self) -> int:
        """At least: both models' residuals of all tokens in float32, and beside them two layers of the base and one of the student as stored, and in float64
        either the Gram matrix of a fit, its factor and two matrices of its shape, or what directions are chosen by."""
        of_base, of_student = (max(layer_parameters(one, kind).total for kind in set(one.pattern)) for one in (self.base, self.student))
        fit = max((8 * (2 * inputs * inputs + 2 * inputs * outputs) for inputs, outputs in self._solved_for), default=0)
        return self._residual_bytes + self.number_bytes * (2 * of_base + of_student) + max(fit, self._sums_for_directions)

    @property
    def work(self) -> Work:
        """Both models' walks, the student's twice where writers are refitted, and in float64 the Gram and cross matrices of the fits."""
        walks = self._walk(self.base) + self._walk(self.student) * (1 + self.recipe.refit_writing)
        per_layer = [2 * self.tokens * inputs * (inputs / 2 + outputs) for inputs, outputs in self._solved_for]
        again = (self.student.num_sublayers - 1) * per_layer[0] if self.recipe.refit_reading and per_layer else 0  # at every norm
        solved = sum(inputs**3 / 3 + 4 * inputs * inputs * outputs for inputs, outputs in self._solved_for)
        fits = Work(doubles=sum(per_layer) + again + solved, numbers=2 * self.tokens * sum(map(sum, self._solved_for)))
        moved = Work(read=self.number_bytes * count_total_parameters(self.base), written=self.number_bytes * count_total_parameters(self.student))
        return walks + fits + moved + self._directions_work

    @property
    def _directions_work(self) -> Work:
        """One walk of the base and a sum over all norms for the directions of most variance; one forward and backward and two sums at each for the loss's."""
        if not self._turns:
            return Work()
        sums = 2 * self.tokens * self.base.hidden**2 * (self.base.num_sublayers + 1)
        if self.recipe.directions == "variance":
            return self._walk(self.base) + Work(doubles=sums)
        share = min(1.0, self.recipe.direction_samples / self.rows)
        sites = num_sites(self.base.hidden, self.base.num_sublayers)
        chosen = 30 * 1.25 * sites * 8 * self.base.hidden**2 * (self.base.hidden - self.student.hidden)  # directions.ITERATIONS of L-BFGS, forward and backward
        return self._walk(self.base) * (4 * share) + Work(doubles=2 * share * sums + chosen + sites * self.base.hidden**3)

    def _walk(self, model: Architecture) -> Work:
        """A forward pass over all tokens, in float32 whatever the model is stored in."""
        length = self.tokens // self.rows
        walk = forward_work(model, self.tokens, length, batches=-(-self.rows // 8))
        return Work(singles=walk.products, numbers=walk.numbers, calls=walk.calls)

    @property
    def _turns(self) -> bool:
        return self.recipe.directions is not None and self.student.hidden < self.base.hidden

    @property
    def _solved_for(self) -> list[tuple[int, int]]:
        """Inputs and outputs of every matrix that is."""
        student = self.student
        inner = {"M": student.mamba_inner, "-": student.ffn, "*": student.num_attention_heads * student.attention_head_dim}
        inner["E"] = student.moe_ffn
        reading = [(student.hidden, self.base.hidden)] * self.recipe.refit_reading
        return reading + [(inner[kind], student.hidden) for kind in student.mixers] * self.recipe.refit_writing

    @property
    def _widest(self) -> int:
        return max((inputs for inputs, _ in self._solved_for), default=0)

    @property
    def _sums_for_directions(self) -> int:
        """Bytes of the moments of every norm and as much again for half of them (directions.py)."""
        turns = self.recipe.directions == "loss" and self.student.hidden < self.base.hidden
        return 3 * 8 * num_sites(self.base.hidden, self.base.num_sublayers) * self.base.hidden**2 * turns

    @property
    def _residual_bytes(self) -> int:
        return 4 * self.tokens * (self.base.hidden + self.student.hidden)
