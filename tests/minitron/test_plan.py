"""The plan before the work: its figures against what was measured and published, what it says, and what is refused by it, each beside what passes."""

import functools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from memory_budget.calculator import memory_report
from memory_budget.units import GIB
from memory_budget.workload import Workload
from minitron.machine import rate
from minitron.machine.pace import Work, device_named, device_pace, machine_pace
from minitron.plan.console import lines, table
from minitron.plan.plan import TRAINING, Plan, StagePlan, lap_views, most_on_disk, plan_of
from minitron.plan.refusals import check_before_work, check_disk, refused_because
from minitron.plan.text_size import text_size
from minitron.settings.data import DataSettings, Embedded
from minitron.settings.run import PlanSettings, Settings, Stage
from minitron.settings.search import FixedSettings
from minitron.settings.teachers import CONF_FOLDER
from minitron.sources.document import Document
from minitron.sources.embedded import source_files
from minitron.text.rows import windows
from minitron.walk.pipeline import check_rows

PUBLISHED = {"hidden": 4480, "ffn": 15680}
# Seconds of experiment=tiny on two cores with AVX-512 that multiply 200 GFLOP/s (AMD EPYC, Python 3.11, torch 2.13), while nothing else ran.
TINY_RATE, TINY_TAKEN = 200e9, {
    ("depth", "teacher"): 6.4, ("depth", "data"): 3.5, ("depth", "score"): 20.8, ("depth", "shortlist"): 4.6, ("depth", "teacher_cache"): 1.2,
    ("depth", "screen"): 24.7, ("depth", "prune"): 14.3, ("depth", "distill"): 26.5, ("widths", "against_slice"): 9.6,
}  # fmt: skip


@pytest.fixture(scope="module")
def composed():
    """Settings of the experiments: composed("nano2", "plan.gpus=8")."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    import minitron.run  # noqa: F401 registers the schema

    @functools.cache
    def make(experiment: str, *overrides: str) -> Settings:
        with initialize_config_dir(str(CONF_FOLDER), version_base="1.3"):
            return OmegaConf.to_object(compose("run", overrides=[f"experiment={experiment}", *overrides]))

    return make


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose rate is kept already: machine(200e9, threads=2)."""

    def known(flops_per_second: float, threads: int = 2) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        path = tmp_path / "cache" / "minitron" / rate.KEPT_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {f"{rate._processor()}, {threads} threads": {"flops_per_second": flops_per_second, "tries": rate.MOST_TRIES}}
        path.write_text(json.dumps(kept))
        assert rate.product_rate() == flops_per_second

    return known


@pytest.fixture
def tiny_plan(composed, machine, tmp_path) -> Plan:
    machine(TINY_RATE)
    return plan_of(composed("tiny", f"runs_folder={tmp_path}"))


@pytest.fixture(scope="module")
def nano2(composed, published_patterns) -> Plan:
    settings = composed("nano2", "plan.device=h100-80", "plan.gpus=8", "depth_lap.enabled=false")
    fixed = replace(settings.search, fixed=FixedSettings(pattern=published_patterns[1], **PUBLISHED))
    return plan_of(replace(settings, search=fixed))


def test_planned_is_near_what_was_taken(tiny_plan):
    planned = {(stage.lap, stage.stage): stage.seconds for stage in tiny_plan.stages}
    total = sum(planned[key] for key in TINY_TAKEN)
    assert total == pytest.approx(sum(TINY_TAKEN.values()), rel=0.2)
    assert all(seconds / 2 < planned[key] < 2 * seconds for key, seconds in TINY_TAKEN.items() if seconds > 10)
    slow = machine_pace(TINY_RATE / 4, 2).seconds(Work(products=1e12, numbers=1e9))  # another machine's figures would not do
    assert slow > 2 * machine_pace(TINY_RATE, 2).seconds(Work(products=1e12, numbers=1e9))


def test_the_published_distillation_takes_the_published_hours(nano2):
    assert (nano2.distill_tokens, nano2.processes) == (60_000_000_000, 8)
    assert nano2.device_hours == pytest.approx(7394, rel=0.01)  # docs/scale.md; calls and states come on top
    (stage,) = [stage for stage in nano2.stages if stage.stage == "distill"]
    assert stage.scratch_bytes == 2 * 12 * 8_888_227_328 and stage.memory_bytes < 79 * GIB < 130 * GIB < 16 * 8_888_227_328  # states; in slices


def test_both_laps_and_their_screens_are_planned(composed):
    plan = plan_of(composed("nano2", "plan.device=h100-80", "plan.gpus=8"))
    trained = {(stage.lap, stage.stage): stage.tokens for stage in plan.stages if stage.tokens}
    assert trained == {("depth", "screen"): 18e9, ("depth", "distill"): 60e9, ("widths", "screen"): 57e9, ("widths", "distill"): 60e9}
    assert plan.device_hours == pytest.approx(2650 + 8830 + 7030 + 7400, rel=0.02)  # docs/scale.md, of students that are not chosen yet
    assert [stage.stage for stage in plan.stages].count("teacher") == 1 and "base" not in [stage.stage for stage in plan.stages]


def test_the_uncut_teacher_is_weighed(nano2):
    assert nano2.teacher_parameters == 12_310_001_152 and nano2.student_parameters == 8_888_227_328
    assert not nano2.teacher_fits and nano2.spare_bytes < 0 and nano2.student_fits
    assert list(nano2.uncut_bytes) == ["bf16", "fp8", "int4"] and nano2.uncut_bytes["bf16"] == nano2.teacher_bytes > nano2.uncut_bytes["int4"]
    assert nano2.ranges == {"layers": (56, 56, 62), "hidden": (4480, 4480, 5120), "ffn": (15680, 15680, 20480)}


def test_a_teacher_that_fits_is_said_to(composed):
    plan = plan_of(composed("tiny", "budget.device_gib=24", "budget.name=large"))
    assert plan.teacher_fits and plan.spare_bytes == plan.budget_bytes - plan.teacher_bytes > 20 * GIB
    assert "fits uncut, with 22." in "\n".join(lines(plan))


def test_the_likely_student_is_about_the_largest_that_fits(composed):
    settings = composed("tiny")
    plan, workload = plan_of(settings), Workload(**{"context_tokens": 4096})
    (_, depth, _), (_, widths, _) = lap_views(settings)
    assert 0.85 * plan.budget_bytes < plan.student_bytes <= plan.budget_bytes < memory_report(depth.student, workload).total
    assert widths.base == depth.student and widths.students.smallest.hidden == 80 and plan.smallest_parameters < plan.student_parameters


def test_sums_are_those_of_the_stages_ahead(tiny_plan):
    assert tiny_plan.seconds == pytest.approx(sum(stage.seconds for stage in tiny_plan.stages))
    tokens = sum(stage.tokens for stage in tiny_plan.stages if stage.stage in TRAINING)
    assert tiny_plan.distill_tokens == tokens == 3 * 12_000 + 40_000 + 3 * 12_000 + 2 * 64_000
    done = replace(tiny_plan, stages=tuple(replace(stage, done=stage.stage != "evaluate") for stage in tiny_plan.stages))
    (last,) = done.ahead
    assert done.seconds == last.seconds and done.distill_tokens == 0 and done.memory_bytes == last.memory_bytes
    nothing = replace(tiny_plan, stages=tuple(replace(stage, done=True) for stage in tiny_plan.stages))
    assert lines(nothing)[-1].endswith("everything is done already") and "18 of 19 stages are done already; about" in "\n".join(lines(done))


def test_disk_is_the_most_that_is_there_at_once():
    def stage(kept, scratch):
        return StagePlan("distill", "", 1, 1.0, 0, kept, scratch, 0)

    assert most_on_disk([stage(5, 0), stage(1, 100), stage(2, 3)]) == 106 and most_on_disk([stage(5, 0), stage(1, 1), stage(200, 3)]) == 209


def test_few_lines_come_first_and_the_table_has_every_stage_with_what_decides_it(tiny_plan):
    few, whole = lines(tiny_plan), table(tiny_plan)
    assert len(few) <= 8 and whole[: len(few)] == few and max(map(len, few)) < 260
    rows = {line.split("  ")[0]: line for line in whole[len(few) + 2 :]}
    assert "distill.train.tokens=64,000" in rows["second lap, distill"] and "search.finalists=3" in rows["first lap, screen × 3"]
    assert len([name for name in rows if "lap, " in name]) == len(tiny_plan.stages)


def test_a_gpu_that_is_not_in_the_table_has_no_times(tiny_plan):
    unknown = replace(tiny_plan, device="NVIDIA T4", stages=tuple(replace(stage, seconds=None) for stage in tiny_plan.stages))
    assert unknown.seconds is None and unknown.device_hours is None and "how long it takes on NVIDIA T4 is not known" in "\n".join(table(unknown))


@pytest.mark.parametrize(("model", "device"), [("NVIDIA A10G", "a10g"), ("NVIDIA L4", "l4"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("Tesla T4", None),
                         ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA A100-PCIE-40GB", "a100-40"), ("NVIDIA H100 80GB HBM3", "h100-80"),
                         ("NVIDIA L40S", None), ("NVIDIA GeForce RTX 4090 D", "rtx4090")])  # fmt: skip
def test_gpus_are_known_by_what_the_driver_calls_them(model, device):
    assert device_named(model) == device


def test_work_that_is_shared_goes_by_the_number_of_devices():
    one, eight, work = device_pace("h100-80"), device_pace("h100-80", 8), Work(products=1e18)
    assert one.seconds(work, shared=True) == pytest.approx(8 * eight.seconds(work, shared=True)) and eight.seconds(work) == one.seconds(work)


@pytest.mark.parametrize(("given", "said"), [({"device": "h200"}, "plan.device is 'h200'; it must be one of a10g, l4"), ({"gpus": 8}, "plan.device is null"),
                                             ({"device": "l4", "gpus": 0}, "plan.gpus is 0; it must be at least 1")])  # fmt: skip
def test_devices_that_are_none_are_refused(given, said):
    PlanSettings(device="l4", gpus=8)
    with pytest.raises(ValueError, match=said):
        PlanSettings(**given)


def test_the_rate_is_measured_once_and_kept_whatever_lies_there(machine, tmp_path, monkeypatch):
    machine(1.0)
    monkeypatch.setattr(rate, "MEASURED_SECONDS", 0.02)
    monkeypatch.setattr("os.getloadavg", lambda: (9.0, 9.0, 9.0))  # as while other work goes on
    path = tmp_path / "cache" / "minitron" / rate.KEPT_FILE
    for damaged in ("", "[]", "{}", '{"x": 1}', path.read_text()[:-5]):
        path.write_text(damaged)
        measured = rate.product_rate()
        assert measured > 1e8 and json.loads(path.read_text())  # FLOP/s of any processor
    kept = json.loads(path.read_text())
    (name,) = kept
    path.write_text(json.dumps({name: {"flops_per_second": 1e30, "tries": 1}}))
    assert rate.product_rate() == 1e30  # measured again, and other work can only have slowed that down
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    assert rate.product_rate() < 1e30
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert rate.product_rate() > 1e8


def test_text_gives_no_more_rows_than_is_foretold():
    for embedded in Embedded:
        size = text_size(DataSettings(embedded=embedded, sequence_length=256), 2048)
        assert size.train_tokens < size.most_rows * 256 and size.held_out_tokens == pytest.approx(size.train_tokens / 19, rel=0.01)
    assert text_size(DataSettings(), 2048).train_tokens == pytest.approx(3_557_888, rel=0.1)  # of the demo, docs/tiny_teacher.md
    prose = text_size(DataSettings(embedded=Embedded.prose, sequence_length=512), 49152)
    assert prose.train_tokens == pytest.approx(443_904, rel=0.1)  # docs/real_teacher.md
    text = [Document(name, path.read_text(errors="replace")) for name, path in source_files()[:40]]
    a_token_a_byte = windows([list(document.text.encode()) for document in text], 256)
    num_bytes = sum(path.stat().st_size for _, path in source_files()[:40])
    assert len(a_token_a_byte) <= math.ceil(num_bytes * 1.5 / 256)


def test_limits_and_unknown_lengths_bound_what_is_foretold(tmp_path):
    (tmp_path / "some.txt").write_text("word " * 2000)
    files = [str(tmp_path / "some.txt")]
    assert text_size(DataSettings(files=files, sequence_length=100), 2048).most_rows == 150
    assert text_size(DataSettings(files=files, sequence_length=100, max_train_tokens=1000), 2048).most_rows == 10
    (tmp_path / "some.jsonl").write_text("word " * 2000)  # perhaps conversations
    assert text_size(DataSettings(files=[str(tmp_path / "some.jsonl")], sequence_length=100), 2048).most_rows == 400
    assert text_size(DataSettings(files=files, messages_field="messages"), 2048).most_rows is None  # a template adds to it
    assert text_size(DataSettings(dataset="a/b"), 2048).train_tokens is None


def llama(folder: Path, **sizes) -> Path:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
              "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1000, "tie_word_embeddings": False, "max_position_embeddings": 8192,
              "rms_norm_eps": 1e-5, "dtype": "bfloat16"}  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | sizes))
    return folder


@pytest.fixture
def own(composed, tmp_path):
    """Settings of a Llama of these sizes, cut by a layer, and trained on few tokens: own({"hidden_size": 8192}, "distill.max_hours=1")."""

    def make(sizes, *overrides):
        path, cut = llama(tmp_path / "teacher", **sizes), sizes.get("num_hidden_layers", 4) - 1
        plain = ("prune.method=slice", "prune.against_slice=false", "depth_lap.enabled=false", "budget.device_gib=100000", "workload.context_tokens=512")
        space = ("search.layers={low: null, high: null}", "search.hidden.low=null", "search.ffn.low=null", "search.mamba_heads.low=null",
                 "search.floors.attention=0", f"search.fixed={{layers: {cut}}}")  # fmt: skip
        return composed("tiny", f"teacher.path={path}", f"runs_folder={tmp_path / 'runs'}", "device=cpu", "evaluate.needle.lengths=[]", *plain, *space,
                        "data.sequence_length=256", "distill.train.tokens=1024", "distill.max_hours=null", *overrides)  # fmt: skip

    return make


HUGE = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 40, "num_attention_heads": 128, "num_key_value_heads": 8}


def test_memory_that_is_not_there_is_refused_before_any_work(own):
    check_before_work(own({}), frozenset())
    with pytest.raises(ValueError, match=r"^distill: each process will hold about [\d,.]+ GiB: .*; this machine, by what is free now, has .* GiB. Lower dist"):
        check_before_work(own(HUGE), frozenset())
    check_before_work(own(HUGE), frozenset((name, "") for name in ("distill", "prune", "score", "evaluate", "teacher", "data")))  # what is done needs no more


def test_disk_that_is_not_free_is_refused_before_any_work(own, tmp_path):
    # More than any disk has: 10¹⁵ bytes of states. What the machine's memory would refuse is passed over by the GPU's name.
    huge = own({"hidden_size": 2**20, "intermediate_size": 2**22, "num_attention_heads": 2**13})
    views = [(lap, view, names) for lap, view, names in lap_views(replace(huge, plan=PlanSettings(device="h100-80")))]
    with pytest.raises(ValueError, match=r"^runs_folder is '.*/runs', whose file system has [\d.,]+ GiB free; until distill this run writes at least \d+"):
        check_disk(huge, views)
    assert not (tmp_path / "runs").exists()
    small = own({})
    check_disk(small, list(lap_views(small)))


def test_batches_larger_than_the_data_are_refused_by_their_own_name(own, tmp_path):
    (tmp_path / "some.txt").write_text("word " * 2000)  # 10,000 bytes
    settings = own({}, f"data.files=[{tmp_path / 'some.txt'}]", "data.sequence_length=100", "distill.train.batch=200", "distill.train.tokens=20000")
    with pytest.raises(ValueError, match=r"^distill.train.batch is 200, but the data has at most 150 train rows of data.sequence_length \(100\) tokens; it m"):
        check_before_work(settings, frozenset())
    fewer = replace(settings, distill=replace(settings.distill, train=replace(settings.distill.train, batch=150)))
    check_before_work(fewer, frozenset())
    with pytest.raises(ValueError, match=r"^distill.train.batch is 150, but the data has only 149 train rows"):  # as soon as the data are there
        check_rows(fewer, 149, "only")
    check_rows(fewer, 150, "only")


@pytest.mark.parametrize("experiment", sorted({path.stem for path in (CONF_FOLDER / "experiment").glob("*.yaml")} - {"own"}))  # which names no model
def test_every_experiment_has_a_plan(experiment, composed, monkeypatch, tmp_path):
    smollm2 = llama(tmp_path, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152)
    overrides = {
        "tiny_teacher": ["budget.name=l4"],
        "smollm2": ["teacher.package=null", f"teacher.path={smollm2}"],  # whose package is not installed everywhere
    }
    monkeypatch.setenv("HF_HUB_CACHE", "/nowhere")
    settings = composed(experiment, "plan.device=l4", *overrides.get(experiment, []))
    plan = plan_of(settings)
    assert plan.seconds > 0 and plan.disk_bytes > 0 and plan.memory_bytes > 0 and all(stage.seconds >= 0 for stage in plan.stages)
    assert {stage.stage for stage in plan.stages} >= {"teacher", "data", "score", "prune", "distill", "evaluate"}
    on_the_hub = settings.teacher.path is not None and experiment != "smollm2"
    assert plan.download_bytes == (plan.teacher_parameters * 2 if on_the_hub else 0)


def test_what_cuts_nothing_needs_no_budget(composed):
    settings = composed("tiny", "budget.device_gib=0.0001")
    plan = plan_of(replace(settings, stage=Stage.score, depth_lap=replace(settings.depth_lap, enabled=False)))
    assert [stage.stage for stage in plan.stages] == ["teacher", "data", "score"] and not plan.cuts and len(lines(plan)) == 2
    with pytest.raises(ValueError, match="set_aside_gib .* must leave memory free"):
        plan_of(settings)


def test_screens_are_held_against_the_data_too(composed):
    settings = composed("tiny")
    with pytest.raises(ValueError, match=r"^screen.train.batch is 4, but the data has only 3 train rows"):
        check_rows(replace(settings, distill=replace(settings.distill, train=replace(settings.distill.train, batch=1))), 3, "only")
    check_rows(settings, 4, "only")
    check_before_work(settings, frozenset())
    with pytest.raises(ValueError, match=r"^depth_lap.screen_tokens is 768; it must be at least one batch of screen.train.batch, 4 rows .*: 1,024"):
        check_before_work(replace(settings, depth_lap=replace(settings.depth_lap, screen_tokens=768)), frozenset())


def test_hours_are_refused_by_what_products_take_at_least(own, machine):
    machine(1e12)
    long = own({}, "distill.train.tokens=100_000_000_000_000", "distill.max_hours=48")
    with pytest.raises(ValueError, match=r"^distill.max_hours is 48; on a CPU this run takes at least [\d.,]+ years"):
        check_before_work(long, frozenset())
    check_before_work(replace(long, distill=replace(long.distill, max_hours=None)), frozenset())


def test_what_a_run_would_refuse_is_said_of_this_machine_alone(composed, machine):
    machine(1e12)
    settings = composed("nano2", "device=cpu")
    assert refused_because(settings, frozenset()).startswith("distill.max_hours is 48; without fused Mamba-2 kernels")
    assert refused_because(replace(settings, plan=PlanSettings(device="h100-80")), frozenset()) is None
    assert refused_because(composed("tiny"), frozenset()) is None


def test_stage_plan_needs_no_torch_no_weights_and_no_runs_folder(environment, tmp_path):
    wanted = ("experiment=nano2", "stage=plan", "plan.device=a100-80", "plan.gpus=16", f"runs_folder={tmp_path / 'runs'}")
    code = ("import sys, minitron.run\nsys.argv = ['minitron', *sys.argv[1:]]\nleft = minitron.run.main()\n"
            "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules], left)")  # fmt: skip
    finished = subprocess.run([sys.executable, "-c", code, *wanted], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert finished.stdout.splitlines()[-1] == "[] 0" and "16 × a100-80" in finished.stdout and not (tmp_path / "runs").exists()
