"""What the costs of a lap follow from."""

from dataclasses import dataclass

from distill.engines.launch import Launch
from memory_budget.architecture import Architecture
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.forward_memory import forward_memory
from minitron.checkpoints.forward_work import forward_work, head_work, passing_numbers
from minitron.machine.pace import Work
from minitron.plan.students import Students
from minitron.settings.run import Settings

FLOAT32 = 4
PROCESS_BYTES = 450 * 2**20  # of a process that has loaded torch and transformers, and nothing else


@dataclass(frozen=True, slots=True)
class LapView:
    """What the costs of a lap follow from: its settings, the models, bytes of a number as base and teacher are stored, the launch, and free memory."""

    settings: Settings
    teacher: Architecture
    base: Architecture
    students: Students
    width: int
    launch: Launch
    on_gpu: bool
    available: int

    @property
    def length(self) -> int:
        return self.settings.data.sequence_length

    @property
    def student(self) -> Architecture:
        return self.students.likely

    @property
    def shortlisted(self) -> int:
        return min(self.students.candidates, self.settings.search.shortlist_size)

    @property
    def process_bytes(self) -> int:
        """What any process holds in main memory; of a GPU's memory nothing is said."""
        return 0 if self.on_gpu else PROCESS_BYTES

    def weights(self, model: Architecture, width: int | None = None) -> int:
        return (self.width if width is None else width) * count_total_parameters(model)

    def forward_bytes(self, models: list[tuple[Architecture, int]], tokens: int, logits_tokens: int) -> int:
        """What models of so many bytes a number hold, one of them at work on so many tokens at once, the logits of some of which are there as a whole.

        On a processor layers go by blocks, and attention keeps no scores: less than the stages' own plans for GPUs say.
        """
        if self.on_gpu:
            return forward_memory("", models, tokens=tokens, logits_tokens=logits_tokens, advice="").total
        weights = sum(self.weights(model, width) for model, width in models)
        return self.process_bytes + weights + max(self.layer_bytes(model, tokens) + 4 * FLOAT32 * logits_tokens * model.vocab for model, _ in models)

    def layer_bytes(self, model: Architecture, tokens: int, all_tokens: int = 0) -> int:
        """Of states and the layer at work, on a processor; a walk through the layers gives one with experts `all_tokens` at once."""
        at_once = [(letter, max(tokens, all_tokens) if letter == "E" else tokens) for letter in set(model.pattern)]
        return int(FLOAT32 * max(number * (2 * model.hidden + passing_numbers(model, letter, self.length)) for letter, number in at_once))

    def held_out(self, model: Architecture, rows: int) -> Work:
        """Loss of a model on so many held-out rows."""
        return forward_work(model, rows * self.length, self.length, batches=rows / self.settings.evaluate.batch) + head_work(model, rows * self.length)
