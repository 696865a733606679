"""What a compensated cut takes: calibration tokens, memory, time; told or refused before anything is loaded. Loads no torch."""

from dataclasses import dataclass
from math import ceil

from memory_budget.architecture import Architecture
from memory_budget.parameters import count_total_parameters, layer_parameters
from memory_budget.units import format_gib
from minitron.checkpoints.forward_work import forward_work
from minitron.machine.pace import Pace, Work
from minitron.machine.rate import duration
from minitron.pruning.plan import (
    ENOUGH_FOR_EXPERT,
    JUDGE,
    LEAST_IN_FLOAT32,
    LOCAL_BATCH,
    MIXTURES,
    SHARED_BATCH,
    SWEEPS,
    TRAINED_TOKENS,
    Recipe,
    num_sites,
    ridge_for,
    set_ridge,
)

STEP_SECONDS = 1e-3  # of a step of local training beside its products
TRIED_RIDGES = 5  # of refits.least_squares.RIDGES, about
FORWARD_ROWS = 8  # of a batch: prune.batch's default


@dataclass(frozen=True, slots=True)
class Fit:
    """Matrices of the same shape that are solved for one after another, `number` of them, each from so many tokens. `whose` says what they are in words."""

    inputs: int
    outputs: int
    tokens: float
    number: int = 1
    whose: str = ""

    @property
    def tokens_per_input(self) -> float:
        return self.tokens / self.inputs


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
        scarcest = min(self._fits, key=lambda fit: fit.tokens_per_input, default=None)
        if scarcest is None or scarcest.tokens >= scarcest.inputs:
            return None
        enough = ENOUGH_FOR_EXPERT if scarcest.whose else 1.0
        needed, fixed = ceil(self.rows * scarcest.inputs / scarcest.tokens), set_ridge(self.recipe)
        few = f", about {scarcest.tokens:,.0f} for each of {scarcest.whose}," if scarcest.whose else ""
        held = f"prune.ridge goes from {fixed:g} up to {ridge_for(fixed, scarcest.inputs, scarcest.tokens, enough=enough):.2g}"
        if self.recipe.ridge is None and not scarcest.whose:
            held = "the refit stays near the cut without one"
        return f"{self.tokens:,} calibration tokens{few} are fewer than the {scarcest.inputs:,} inputs solved for: {held}; prune.samples={needed} would do"

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
        of_all, of_experts = (max((fit for fit in self._fits if bool(fit.whose) == own), key=lambda fit: fit.inputs, default=None) for own in (False, True))
        of_widest = f", {of_all.tokens_per_input:,.0f} for each input of the widest matrix refitted" if of_all else ""
        sent = f", about {of_experts.tokens:,.0f} to each expert of {of_experts.inputs:,} inputs" if of_experts else ""
        time = f", takes about {duration(pace.seconds(self.work) / 3600)}" if pace else ""
        return f"{self.tokens:,} calibration tokens ({self.rows} rows{of_widest}{sent}); holds about {format_gib(self.held_bytes)}{time}"

    @property
    def held_bytes(self) -> int:
        """At least: both models' residuals of all tokens in float32, and beside them two layers of the base and one of the student as stored, and what
        needs most of a fit's Gram matrices, in float64, the choice of neurons, a layer or an expert that is trained, or what directions are chosen by. The
        base's experts are there one by one, the student's of a layer together."""
        base = 2 * max(self._without_experts(kind) for kind in set(self.base.mixers)) + 3 * _expert(self.base)
        of_student = max(layer_parameters(self.student, kind).total for kind in set(self.student.mixers))
        fit = max((8 * self._squares(fit) * (fit.inputs**2 + fit.inputs * fit.outputs) for fit in self._fits), default=0)
        trained = _expert(self.student) * (self.recipe.local_steps > 0)
        if self.recipe.feed_forward_steps and "-" in self.student.mixers:  # beside itself four numbers a token and neuron
            trained = max(trained, _feed_forward(self.student) + 4 * self._trained_tokens * self.student.ffn // 5)
        fit = max(fit, 8 * 2 * self._chosen_from**2)  # the Gram matrix of all neurons, and what CUDA inverts it from or, less, the writer twice
        fit = max(fit, 5 * 4 * trained)  # itself, as it was, its gradient and Adam's two
        return self._residual_bytes + self.number_bytes * (base + of_student) + max(fit, self._sums_for_directions)

    @property
    def _chosen_from(self) -> int:
        """Neurons of a feed-forward layer, of which some are chosen to stay; 0 where none go."""
        chooses = self.recipe.chooses_neurons and "-" in self.student.mixers and self.student.ffn < self.base.ffn and not self.student.post_norms
        return self.base.ffn if chooses else 0

    def _squares(self, fit: Fit) -> int:
        """The Gram matrix, where its factor will be; where the ridge is chosen, that of each half and a copy of one."""
        return 1 if self.recipe.ridge is not None or fit.whose else 3

    def _solved(self, fit: Fit) -> float:
        """Float64 FLOP of a factor and the solution by it; where the ridge is chosen, also of those that it is chosen by."""
        chosen = 0 if self.recipe.ridge is not None or fit.whose else 2 * TRIED_RIDGES
        return (1 + chosen) * fit.inputs**3 / 3 + 4 * fit.inputs**2 * (fit.outputs + chosen * min(fit.outputs, MIXTURES))

    def _without_experts(self, kind: str) -> int:
        return layer_parameters(self.base, kind).total - (kind == "E") * self.base.moe_num_experts * _expert(self.base)

    @property
    def work(self) -> Work:
        """Both models' walks, the student's twice where writers are refitted and its experts' twice in every round of theirs, and in float64 the Gram and cross
        matrices of the fits."""
        walks = self._walk(self.base) + self._walk(self.student) * (1 + self.recipe.refit_writing) + self._rounds_of_experts
        sums = [fit.number * 2 * fit.tokens * fit.inputs * (fit.inputs / 2 + fit.outputs) for fit in self._fits]
        in_singles = [not fit.whose and (self.recipe.ridge is None or self.recipe.ridge >= LEAST_IN_FLOAT32) for fit in self._fits]
        singles = sum(found for found, single in zip(sums, in_singles, strict=True) if single)
        solved = sum(fit.number * self._solved(fit) for fit in self._fits)
        numbers = sum(2 * fit.number * fit.tokens * (fit.inputs + fit.outputs) for fit in self._fits)
        fits = Work(singles=singles, doubles=sum(sums) - singles + solved, numbers=numbers)
        neurons, layers = self._chosen_from, self.student.num_layers_of("-")
        first = 2 * self.tokens * layers * _feed_forward(self.base) * (neurons > 0)
        chosen = Work(doubles=layers * 2 * neurons**3, singles=layers * self.tokens * neurons**2 + first)
        moved = Work(read=self.number_bytes * count_total_parameters(self.base), written=self.number_bytes * count_total_parameters(self.student))
        return walks + fits + chosen + moved + self._directions_work + self._local_training

    @property
    def _rounds_of_experts(self) -> Work:
        if not (self.recipe.refit_experts or self.recipe.refit_shared):
            return Work()
        active = layer_parameters(self.student, "E", active_only=True).total * self.student.num_layers_of("E")
        return Work(singles=2 * self.tokens * active * (1 + 2 * SWEEPS))

    @property
    def _local_training(self) -> Work:
        """Forward and backward of every step, of feed-forward layers, of experts and of the shared one, which has three matrices at most."""
        student, layers = self.student, self.student.num_layers_of("E")
        trained, judged = self.recipe.feed_forward_steps * self._trained_tokens, (self.recipe.feed_forward_steps > 0) * 4 * self.tokens / JUDGE
        rows = Work(singles=(6 * trained + 2 * judged) * student.num_layers_of("-") * _feed_forward(student))
        if not layers:
            return rows
        experts, steps = student.moe_num_experts * self.recipe.refit_experts, self.recipe.local_steps * layers
        sent = min(LOCAL_BATCH, self.tokens * student.moe_experts_per_token / student.moe_num_experts)
        shared = self.recipe.refit_shared and student.moe_shared_ffn > 0
        numbers = experts * sent * _expert(student) + shared * SHARED_BATCH * 3 * student.moe_shared_ffn * student.hidden
        return rows + Work(singles=6 * steps * numbers, serial=STEP_SECONDS * steps * (experts + shared))

    @property
    def _trained_tokens(self) -> int:
        """Of a step of a feed-forward layer."""
        return min(self.tokens, max(TRAINED_TOKENS, self.tokens // self.rows))

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
        walk = forward_work(model, self.tokens, length, batches=-(-self.rows // FORWARD_ROWS))
        return Work(singles=walk.products, numbers=walk.numbers, calls=walk.calls)

    @property
    def _turns(self) -> bool:
        return self.recipe.directions is not None and self.student.hidden < self.base.hidden

    @property
    def _fits(self) -> list[Fit]:
        student, recipe = self.student, self.recipe
        inner = {"M": student.mamba_inner, "-": student.ffn, "*": student.num_attention_heads * student.attention_head_dim}
        fits = [Fit(student.hidden, self.base.hidden, self.tokens, student.num_sublayers)] * recipe.refit_reading
        fits += [Fit(inner[kind], student.hidden, self.tokens) for kind in student.mixers if kind != "E"] * recipe.refit_writing
        layers = SWEEPS * student.num_layers_of("E")
        if layers and recipe.refit_experts:
            sent, width = self.tokens * student.moe_experts_per_token / student.moe_num_experts, student.moe_latent or student.hidden
            fits.append(Fit(student.moe_ffn, width, sent, layers * student.moe_num_experts, f"{student.moe_num_experts} experts"))
        if layers and recipe.refit_shared:
            fits += [Fit(inputs, student.hidden, self.tokens, layers) for inputs in (student.moe_shared_ffn, student.moe_latent) if inputs]
        return fits

    @property
    def _sums_for_directions(self) -> int:
        """Bytes of the moments of every norm and as much again for half of them (directions.py)."""
        turns = self.recipe.directions == "loss" and self.student.hidden < self.base.hidden
        return 3 * 8 * num_sites(self.base.hidden, self.base.num_sublayers) * self.base.hidden**2 * turns

    @property
    def _residual_bytes(self) -> int:
        """Of layers with experts, which take all tokens at once, with what they read, write and add up, and the shared expert's neurons before and after."""
        kept = 4 + (self.recipe.local_steps > 0)  # what the shared expert reads while it is trained
        at_once = (kept * self.base.hidden + 2 * self.base.moe_shared_ffn) if "E" in self.base.mixers else 0
        return 4 * self.tokens * (self.base.hidden + self.student.hidden + at_once)


def _expert(model: Architecture) -> int:
    """Parameters of one expert."""
    if "E" not in model.mixers:
        return 0
    matrices = layer_parameters(model, "E").matrices[:2]
    return sum(copies * outputs * inputs for copies, outputs, inputs in matrices) // model.moe_num_experts


def _feed_forward(model: Architecture) -> int:
    """Parameters of a feed-forward layer."""
    return layer_parameters(model, "-").total if "-" in model.mixers else 0
