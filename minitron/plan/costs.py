"""What each stage of a walk takes, by its name: work, memory, bytes on disk, tokens. Loads no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import log2

from memory_budget.architecture import Architecture
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.forward_memory import asked_bytes
from minitron.checkpoints.forward_work import decode_work, forward_work, head_work, load_work
from minitron.families.known import can_decode
from minitron.importance.cost import scoring_work
from minitron.importance.memory import ScoringNeeds
from minitron.machine.pace import Work
from minitron.plan.text_size import TextSize, text_size
from minitron.plan.view import FLOAT32, LapView
from minitron.pruning.cut_cost import CutCost
from minitron.pruning.plan import Recipe, recipe_of
from minitron.settings.derived import calibration_samples, candidate_samples, fewest_layers, has_ladder, ranks_refitted, ranks_rotated
from minitron.settings.run import PruneMethod
from minitron.settings.teachers import is_converted, is_stored, is_trained
from minitron.settings.training import TrainSettings
from minitron.text.blends import phase_parts, rows_to_make
from minitron.training.memory import PhaseMemory, state_bytes
from minitron.training.time import training_work

ROW_BYTES, BYTES_A_TOKEN = 4, 4
START = Work(serial=4.0)  # torch and transformers loaded, by the first stage that needs them
REPETITIONS = 3  # of a measured speed, and one before to warm up
WATCHED = 10  # times as many calls, in that one, since every tensor is counted
TOKENISED_BYTES_PER_SECOND = 3.0e6  # text read, tokenised and cut into rows, of a processor's core and a half
TOKENISED_BY_EACH, TOKENISING_BYTES = 2.3e6, 300 * 2**20  # by each of several processes, and what one holds
CONVERTED_NUMBERS_PER_SECOND = 8.0e6  # a GGUF's, unpacked, written, read back and held against what was written


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one stage. `shared` says that every process takes its share of the work, else the first does it all. `held` bytes of memory in a process, `kept`
    bytes on disk, `scratch` more of them while it runs, `tokens` that it trains on."""

    work: Work = field(default_factory=Work)
    shared: bool = False
    held: int = 0
    kept: int = 0
    scratch: int = 0
    tokens: int = 0
    times: int = 1


def cost_of(stage: str, view: LapView) -> Cost:
    """The cost of a stage in a lap; of one that nobody has counted, none."""
    return COSTS[stage](view) if stage in COSTS else Cost(held=view.process_bytes)


def _teacher(view: LapView) -> Cost:
    settings, numbers, whole = view.settings, count_total_parameters(view.teacher), view.weights(view.teacher, FLOAT32)
    if is_trained(settings):
        train = settings.teacher.train
        return _trained(view, view.teacher, None, [(train, view.length)], more=START)
    if is_converted(settings):
        return Cost(work=START + Work(serial=numbers / CONVERTED_NUMBERS_PER_SECOND), held=view.process_bytes + 2 * whole, kept=whole)
    if is_stored(settings):
        return Cost(work=START + Work(written=2 * whole, serial=1.0), held=view.process_bytes + whole, kept=whole)
    return Cost(work=START * 0.5, held=view.process_bytes)


def _data(view: LapView) -> Cost:
    return _rows(view, text_size(view.settings.data, view.teacher.vocab))


def _rows(view: LapView, size: TextSize) -> Cost:
    tokens = (size.train_tokens or 0) + (size.held_out_tokens or 0)
    read = size.read_bytes or tokens * BYTES_A_TOKEN
    processes = view.settings.data.num_processes(read)
    speed = TOKENISED_BYTES_PER_SECOND if processes == 1 else TOKENISED_BY_EACH * processes
    held = view.process_bytes + (TOKENISING_BYTES * processes if processes > 1 else 0)
    return Cost(work=Work(serial=0.5 + read / speed), held=held, kept=ROW_BYTES * tokens)


def _phase_rows(view: LapView) -> Cost:
    costs = [_rows(view, TextSize(0, data.max_train_tokens, None)) for data in rows_to_make(view.settings).values()]
    return Cost(work=sum((cost.work for cost in costs), Work()), held=max((cost.held for cost in costs), default=0), kept=sum(cost.kept for cost in costs))


def _base(view: LapView) -> Cost:
    return Cost(held=view.process_bytes)


def _score(view: LapView) -> Cost:
    settings = view.settings
    needs = ScoringNeeds(view.base, view.length, view.width, view.launch.world_size)
    block = needs.depth_block_tokens(settings.scoring, view.available)
    held = needs.plan(settings.scoring, block).total if view.on_gpu else view.process_bytes + _scoring_bytes(view, needs, block)
    work = scoring_work(view.base, settings.scoring, length=view.length, fewest_layers=fewest_layers(settings, view.base), width=view.width)
    return Cost(work=work, shared=True, held=held, kept=8 * 4 * view.base.num_sublayers * view.base.hidden)


def _scoring_bytes(view: LapView, needs: ScoringNeeds, block_tokens: int) -> int:
    """On a processor: what the stage's own plan says, but for the layer at work, and for states kept from round to round no more than there can be."""
    scoring, base = view.settings.scoring, view.base
    kept = base.num_layers * (1 + base.num_layers) * scoring.layer_samples * view.length * base.hidden * view.width // 2
    own = view.layer_bytes(base, max(scoring.batch * view.length, min(scoring.branch_tokens, block_tokens)))
    own += asked_bytes(base, view.width, needs.width_tokens(scoring)) if "E" in base.pattern else 0

    def moment(parts: Mapping[str, int]) -> int:
        capped = {name: min(size, kept) if name == "kept for the next round" else size for name, size in parts.items() if name != "a layer's own"}
        return sum(capped.values()) + own

    return max(map(moment, needs.moments(scoring, block_tokens).values()))


def _shortlist(view: LapView) -> Cost:
    """Zero-shot losses of the shortlisted, where there is more than one; before them the base is turned and refitted to widths, where it will be cut so."""
    settings, rows = view.settings, view.settings.search.screen_samples
    listed = Work(serial=0.1 + view.students.candidates * 2e-5)
    if settings.search.layer_order or view.shortlisted < 2:
        return Cost(work=listed, held=view.process_bytes)
    rotated, refitted = ranks_rotated(settings, view.base), ranks_refitted(settings, view.base)
    work = listed + load_work(view.base, view.width) + view.held_out(view.teacher, rows) + view.held_out(view.student, rows) * view.shortlisted
    if rotated or refitted:
        samples = candidate_samples(settings, view.base)
        recipe = Recipe(None, False, refitted, refit_experts=False, refit_shared=False)
        work += CutCost(view.base, view.base, recipe, samples, samples * view.length, view.width).work
        widths = len(_between(view, "ffn")) + len(_between(view, "mamba_heads"))
        work += forward_work(view.base, samples * view.length, view.length) * (0.25 * widths * refitted)
    models, tokens = [(view.base, view.width), (view.teacher, view.width)], settings.evaluate.batch * view.length
    return Cost(work=work, held=view.forward_bytes(models, tokens, 1024))


def _between(view: LapView, axis: str) -> range:
    """As many as an axis has options, at most four: what differs is refitted once for each."""
    low, high = view.students.ranges.get(axis, (1, 1))
    return range(4 if low < high else 1)


def _teacher_cache(view: LapView) -> Cost:
    return _cache(view, view.settings.screen.train.tokens)


def _distill_cache(view: LapView) -> Cost:
    return _cache(view, view.settings.distill.train.tokens)


def _cache(view: LapView, tokens: int) -> Cost:
    settings = view.settings
    size = int(tokens * top_k_bytes(view.teacher.vocab, settings.screen.top_k))
    walk = forward_work(view.teacher, tokens, view.length, batches=tokens / (settings.screen.cache_batch * view.length))
    work = load_work(view.teacher, view.width) + walk + head_work(view.teacher, tokens, 8) + Work(written=size, serial=tokens * 2e-5)
    return Cost(work=work, held=view.forward_bytes([(view.teacher, view.width)], settings.screen.cache_batch * view.length, 128), kept=size)


def top_k_bytes(vocab: int, k: int) -> float:
    """Bytes a token of distill.top_k's code: sorted ids by Elias and Fano, six bits a log-probability, two float16."""
    k = min(k, vocab)
    return k * (2 + max(0, int(log2(vocab / k)))) / 8 + 6 * k / 8 + 4


def _screen(view: LapView) -> Cost:
    """Of one candidate; `times` of them."""
    settings, screen = view.settings, view.settings.screen
    if not has_ladder(settings):
        return Cost(times=0)
    cut = load_work(view.base, view.width)
    if settings.prune.method is PruneMethod.compensated:
        cut += _compensated(view, candidate_samples(settings, view.base)).work
    measured = view.held_out(view.student, settings.search.screen_samples)
    decoded = (REPETITIONS * (screen.prompt_tokens * 0.2 + screen.new_tokens)) * can_decode(view.student)
    more = cut + measured + decode_work(view.student, decoded, FLOAT32)
    cost = _trained(view, view.student, None if screen.cached else view.teacher, [(screen.train, view.length)], more=more)
    times = 1 if settings.candidate else min(settings.search.finalists, view.shortlisted)
    cutting = view.process_bytes + (0 if view.on_gpu else view.weights(view.base, FLOAT32) + view.weights(view.student, FLOAT32))
    return replace(cost, held=max(cost.held, cutting), kept=2**16, scratch=cost.scratch + cost.kept, times=times)


def _search(view: LapView) -> Cost:
    return Cost(work=Work(serial=0.1), held=view.process_bytes)


def _prune(view: LapView) -> Cost:
    settings = view.settings
    if settings.prune.method is PruneMethod.slice:
        return _prune_slice(view)
    cut, rows = _compensated(view, calibration_samples(settings, view.base)), settings.search.screen_samples
    damage = view.held_out(view.base, rows) + view.held_out(view.student, rows) * 2
    loaded = load_work(view.base, view.width) + load_work(view.student, view.width) * 3
    held = view.process_bytes + cut.held_bytes
    if cut.recipe.directions == "loss" and view.student.hidden < view.base.hidden:
        scratch = 2 * view.base.hidden * view.length * min(settings.prune.direction_samples, cut.rows) * view.base.num_sublayers
    else:
        scratch = 0
    return Cost(work=cut.work + damage + loaded, held=held, kept=view.weights(view.student), scratch=scratch)


def _compensated(view: LapView, samples: int) -> CutCost:
    return CutCost(view.base, view.student, recipe_of(view.settings.prune, view.student), samples, samples * view.length, view.width)


def _prune_slice(view: LapView) -> Cost:
    size, whole = view.weights(view.student), view.weights(view.base, FLOAT32) + 2 * view.weights(view.student, FLOAT32)
    if view.on_gpu or whole > view.available:  # tensor by tensor, and read back layer by layer
        whole = 0
    held = view.process_bytes + whole
    return Cost(work=load_work(view.base, view.width) + Work(written=size, read=2 * size, calls=4 * view.base.num_sublayers), held=held, kept=size)


def _distill(view: LapView) -> Cost:
    settings = view.settings
    phases = [(train, parts[0].data.sequence_length) for train, parts in zip(settings.distill.trains(), phase_parts(settings), strict=True)]
    more = Work(written=view.weights(view.student), read=2 * view.weights(view.student)) + load_work(view.student, FLOAT32)
    if every := settings.distill.held_out_every:
        steps = sum(train.tokens / (train.batch * length) for train, length in phases)
        more += view.held_out(view.student, settings.distill.held_out_samples) * (steps // every)
    return _trained(view, view.student, None if settings.distill.cached else view.teacher, phases, more=more)


def _trained(view: LapView, student: Architecture, teacher: Architecture | None, phases: list[tuple[TrainSettings, int]], *, more: Work) -> Cost:
    """Of training in phases; the states that it saves on its way are scratch, but the student that it leaves."""
    needs = [(PhaseMemory(student, teacher or student, view.launch, length, view.width if teacher else 0, view.on_gpu), train) for train, length in phases]
    trains = [need.with_checkpointing(train, view.available) for need, train in needs]
    held = max(need.of(train).total for (need, _), train in zip(needs, trains, strict=True))
    work = sum((training_work(student, teacher, train, length) for train, (_, length) in zip(trains, phases, strict=True)), more)
    state = max(state_bytes(student, train) for train in trains)
    kept = view.weights(student)
    return Cost(work=work + Work(written=2 * state, serial=0.5), shared=True, held=view.process_bytes + held, kept=kept,
                scratch=(max(train.keep_states for train in trains) + 1) * state, tokens=sum(train.tokens for train in trains))  # fmt: skip


def _distill_slice(view: LapView) -> Cost:
    return _distill(view)


def _evaluate(view: LapView) -> Cost:
    """Of three models, all of whose measurements but lm-eval's tasks are counted: those are of any length."""
    settings, wanted = view.settings, view.settings.evaluate
    size = text_size(settings.data, view.teacher.vocab)
    rows = wanted.samples if size.held_out_tokens is None else min(wanted.samples, max(1, size.held_out_tokens // view.length // 2))
    work = Work(serial=1.0)
    for model in (view.teacher, view.student, view.student):
        work += load_work(model, view.width) + view.held_out(model, rows)
        work += view.held_out(view.teacher, rows) * (model is not view.teacher)
        for speed in wanted.speed:
            tokens = speed.input_tokens * speed.batch
            work += forward_work(model, tokens, speed.input_tokens) * (REPETITIONS + 1)
            if can_decode(model):
                work += decode_work(model, speed.output_tokens * (REPETITIONS + 1), view.width)
                work += Work(calls=speed.output_tokens * WATCHED * model.num_sublayers)
        for length in wanted.needle.lengths:
            tokens = length * wanted.needle.depths * wanted.needle.samples
            work += forward_work(model, tokens, length, batches=tokens / (wanted.batch * view.length))
        work += decode_work(model, (len(wanted.prompts) + wanted.held_out_prompts) * wanted.new_tokens, view.width)
    longest = max([wanted.batch * view.length, *(speed.batch * speed.input_tokens for speed in wanted.speed), *wanted.needle.lengths])
    models = [(view.teacher, view.width), (view.student, view.width)]
    return Cost(work=work, held=view.forward_bytes(models, longest, wanted.batch * view.length), kept=2**20)


def _against_slice(view: LapView) -> Cost:
    rows = view.settings.evaluate.samples
    work = load_work(view.teacher, view.width) + (view.held_out(view.student, rows) + view.held_out(view.teacher, rows)) * 2
    return replace(_evaluate(view), work=work, kept=2**16)


def _reasoning(view: LapView) -> Cost:
    """Three models, once for each budget: every problem's row, a token at a time for a batch at once."""
    settings = view.settings.reasoning
    batches, tokens = -(-settings.problems // settings.batch), view.length
    work = forward_work(view.teacher, settings.problems * tokens * len(settings.budgets) * 3, tokens)
    return Cost(work=work + decode_work(view.teacher, 3 * batches * tokens * len(settings.budgets), view.width), held=view.process_bytes)


def _merge(view: LapView) -> Cost:
    merge, size = view.settings.merge, view.weights(view.teacher)
    tried = max(1, len(merge.candidates()))
    work = Work(read=size * len(merge.checkpoints), written=size) * tried + view.held_out(view.teacher, merge.samples) * (tried if tried > 1 else 0)
    return Cost(work=work, held=view.process_bytes + size, kept=size, scratch=size * (tried > 1))


COSTS: Mapping[str, Callable[[LapView], Cost]] = {
    "teacher": _teacher, "data": _data, "base": _base, "score": _score, "shortlist": _shortlist, "teacher_cache": _teacher_cache, "screen": _screen,
    "search": _search, "prune": _prune, "prune_slice": _prune_slice, "phase_rows": _phase_rows, "whole_rows": _phase_rows, "distill_cache": _distill_cache,
    "distill": _distill, "distill_slice": _distill_slice, "distill_whole": _distill, "evaluate": _evaluate, "against_slice": _against_slice,
    "reasoning": _reasoning, "merge": _merge,
}  # fmt: skip
