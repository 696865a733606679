"""The whole walk for a tied Llama, sliced, and a tied Qwen3, compensated, by the real command; and a user's mistakes with such teachers."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.files import Checkpoint
from minitron.sources.embedded import topic_documents
from minitron.text.own_tokenizer import train_tokenizer
from minitron.walk.store import write_json

VOCABULARY = 320
ENDS = [0, 7]  # ids that end a text
OWN = {
    "llama tied": ("prune.method=slice", "search.hidden={values: [36]}", "search.key_value_heads={values: [1, 2]}"),
    "qwen3 tied": ("prune.method=compensated", "prune.samples=16", "prune.direction_samples=4", "prune.against_slice=true", "search.hidden={values: [40]}",
                   "search.ffn={values: [40]}", "search.key_value_heads={values: [2, 3]}", "scoring.placement=stream",
                   "scoring.criterion=block_influence"),
}  # fmt: skip
CANDIDATES = {"llama tied": {"L3-H36-F56-A3-K1", "L3-H36-F56"}, "qwen3 tied": {"L3-H40-F40-A4-K2", "L3-H40-F40"}}
COMMON = (
    "~experiment", "device=cpu", "run_name=own", "teacher.path=mine", "data.files=['texts/*.txt']", "data.sequence_length=32",
    "data.max_train_tokens=4000", "data.max_heldout_tokens=2000", "workload.context_tokens=64", "budget.device_gib=1", "search.floors={attention: 0}",
    "search.layers={values: [3]}", "scoring.samples=8", "scoring.layer_samples=4", "search.shortlist_size=2", "search.finalists=2", "search.screen_samples=4",
    "depth_lap.enabled=false", "screen.train.tokens=256", "screen.prompt_tokens=8", "screen.new_tokens=4", "distill.train.tokens=512",
    "evaluate.samples=4", "evaluate.prompts=['import os']", "evaluate.new_tokens=4", "evaluate.speed=[{input_tokens: 8, output_tokens: 4, batch: 1}]",
    "evaluate.needle.lengths=[]", "export.folder=out", "generate.new_tokens=6",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BlockWalk:
    """A finished walk and what was asked for after it."""

    name: str
    folder: Path
    settings: tuple[str, ...]
    finished: dict

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "runs" / "own" / "summary.json").read_text())


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Documents and a tokenizer of them."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "texts").mkdir()
    documents = list(topic_documents())
    for document in documents:
        (folder / "texts" / f"{document.name.rpartition('/')[2]}.txt").write_text(document.text[:2000])
    train_tokenizer((document.text[:2000] for document in documents), VOCABULARY, folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def make_teacher(texts, build_tiny, write_checkpoint):
    """Writes a folder with texts and a teacher in `mine` that reads them; gives the model."""

    def make(folder: Path, name: str, **changes):
        (folder / "texts").symlink_to(texts / "texts")
        blocks = build_tiny(name, vocab_size=VOCABULARY, **changes)
        write_checkpoint(folder / "mine", blocks.model, blocks.config)
        for path in (texts / "tokenizer").iterdir():
            (folder / "mine" / path.name).write_bytes(path.read_bytes())
        return blocks

    return make


def as_it_comes(folder: Path) -> None:
    """A teacher as the Hub has some: the index of an earlier save, heads for further tokens, code beside the weights, several ids that end a text, a licence,
    and the places where others had it."""
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}})
    save_file(load_file(folder / "model.safetensors") | {"mtp.layers.0.norm.weight": torch.ones(48)}, folder / "model.safetensors", {"format": "pt"})
    code = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    own = {"auto_map": code, "num_nextn_predict_layers": 1, "_name_or_path": str(folder), "eos_token_id": ENDS}
    write_json(folder / "config.json", read_config(folder) | own)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", tokenizer | {"name_or_path": str(folder), "auto_map": {"AutoTokenizer": [None, "tokenization_mine.Mine"]}})
    write_json(folder / "generation_config.json", {"eos_token_id": ENDS, "pad_token_id": 1})
    for name in ("configuration_mine", "modeling_mine", "tokenization_mine"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'trace')!r}, 'w').write('it ran')\n")
    (folder / "README.md").write_text(f"---\nlicense: other\nlicense_link: {folder}/LICENSE\n---\n# Mine\n")


@pytest.fixture(scope="module", params=OWN)
def block_walk(request, door, make_teacher, tmp_path_factory) -> BlockWalk:
    folder, settings = tmp_path_factory.mktemp("walk"), (*COMMON, *OWN[request.param])
    places = (f"teacher.path={folder / 'mine'}", f"data.files=['{folder / 'texts'}/*.txt']", f"export.folder={folder / 'out'}")
    settings = (*settings, f"runs_folder={folder / 'runs'}", *(places if request.param == "qwen3 tied" else ("teacher.path=./mine",)))
    make_teacher(folder, request.param)
    as_it_comes(folder / "mine")
    finished = {"all": door(folder, *settings)}
    assert finished["all"].returncode == 0, finished["all"].stderr
    for stage, more in (("export", ()), ("generate", ("prompt=import",)), ("merge", ("merge.checkpoints=[prune,distill]",))):
        finished[stage] = door(folder, *settings, f"stage={stage}", *more)
        assert finished[stage].returncode == 0, finished[stage].stderr
    return BlockWalk(request.param, folder, settings, finished)


def test_every_stage_ends_and_the_report_is_there(block_walk):
    stages = {line.split()[0] for line in block_walk.finished["all"].stdout.splitlines() if line.strip()}
    wanted = {"data", "teacher", "score", "shortlist", "teacher_cache", "screen", "search", "prune", "distill", "evaluate", "report"}
    assert wanted | ({"prune_slice", "distill_slice", "against_slice"} if block_walk.name == "qwen3 tied" else set()) <= stages
    assert (block_walk.folder / "runs" / "own" / "report.html").stat().st_size > 10_000


def test_the_candidates_are_those_of_the_space(block_walk):
    candidates = block_walk.summary["candidates"]
    assert {candidate["id"] for candidate in candidates} == CANDIDATES[block_walk.name]
    assert all(candidate["zero_shot_loss"] > 0 and candidate["short_distill_loss"] > 0 and candidate["tokens_per_second"] > 0 for candidate in candidates)
    assert len({candidate["parameters"] for candidate in candidates}) == 2 and sum(candidate["chosen"] for candidate in candidates) == 1
    assert all(candidate["architecture"]["tied_embeddings"] for candidate in candidates), "though they may be ranked with a head of their own"
    said = block_walk.finished["all"].stdout
    assert ("in the rotated basis" in said) == ("refitted to its widths" in said) == (block_walk.name == "qwen3 tied")


@pytest.mark.parametrize("model", ["pruned", "student"])
def test_planned_parameters_are_those_written_and_transformers_loads_them(block_walk, model):
    models = block_walk.summary["models"]
    folder, planned = Path(models[model]["path"]), models[model]["parameters"]
    loaded, architecture = AutoModelForCausalLM.from_pretrained(folder), architecture_from_config(read_config(folder))
    assert loaded.num_parameters() == Checkpoint(folder).num_parameters == count_total_parameters(architecture) == planned < models["teacher"]["parameters"]
    assert architecture.num_layers == 3 == loaded.config.num_hidden_layers and "lm_head.weight" not in Checkpoint(folder).entries
    ids = AutoTokenizer.from_pretrained(folder)("import os\n", return_tensors="pt")
    assert loaded.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 3


def test_distillation_lowered_the_kl_to_the_teacher(block_walk):
    kl = {name: model["evaluation"]["kl_to_teacher_nats_per_token"] for name, model in block_walk.summary["models"].items()}
    assert kl["teacher"] == 0 < kl["student"] < kl["pruned"]


def test_the_card_says_every_size_that_was_cut(block_walk):
    card = (Path(block_walk.summary["models"]["pruned"]["path"]) / "README.md").read_text()
    chosen = next(candidate for candidate in block_walk.summary["candidates"] if candidate["chosen"])["architecture"]
    assert f"hidden 48 → {chosen['hidden']}" in card and "layers 4 → 3" in card and "Removed layers (from 0): " in card and "Mamba" not in card
    keys = 2 if block_walk.name == "llama tied" else 3
    cut = f"KV heads {keys} → {chosen['num_key_value_heads']}"
    assert (cut in card and f"query heads 6 → {chosen['num_attention_heads']}" in card) == (chosen["num_key_value_heads"] < keys)


@pytest.mark.parametrize("model", ["pruned", "student"])
def test_a_checkpoints_card_has_the_licence_of_the_teachers(model, block_walk):
    """Without the place on this machine that the teacher's card gives, and without a base, as the teacher is no model of the Hub."""
    card = (Path(block_walk.summary["models"][model]["path"]) / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "other" and metadata["license_link"] == "LICENSE" and "base_model" not in metadata
    assert "whose licence is **other**" in card and str(block_walk.folder) not in card


def test_the_export_is_the_student_and_no_program_is_said_to_want_another_family(block_walk):
    folders = (block_walk.folder / "out", block_walk.summary["models"]["student"]["path"])
    exported, student = map(AutoModelForCausalLM.from_pretrained, folders)
    with torch.no_grad():
        assert torch.equal(*(model(torch.arange(40)[None], use_cache=False).logits for model in (exported, student)))
    text = (block_walk.folder / "out" / "README.md").read_text() + block_walk.finished["export"].stdout
    assert "nemotron" not in text.lower() and "mamba" not in text.lower() and "vllm serve FOLDER`." in text
    refused = {"llama tied": [], "qwen3 tied": ["vLLM would not take it: head_dim (10) must be a multiple of 8 and at most 256, for FlashAttention"]}
    assert [line for line in block_walk.finished["export"].stdout.splitlines() if "would not take it" in line] == refused[block_walk.name]


def test_what_is_handed_over_names_no_place_of_this_machine_and_no_code(block_walk):
    """Only the licence's words, the tokenizer's files and the weights are the teacher's; its name is its folder's."""
    out = block_walk.folder / "out"
    texts = {path.name: path.read_text() for path in out.iterdir() if path.suffix in (".md", ".json", ".jinja")}
    assert {"README.md", "export.json", "config.json", "tokenizer_config.json", "generation_config.json"} <= texts.keys()
    for name, text in texts.items():
        places = (str(block_walk.folder), f"{Path.home()}/", "/tmp", "./mine", "configuration_mine", '"auto_map"')
        assert [said for said in places if said in text] == [], name
    for said in ("# mine, pruned and distilled", "teacher.path=mine", 'license_link: "LICENSE"'):
        assert said in texts["README.md"]
    record = json.loads(texts["export.json"])
    assert record["settings"]["teacher"]["path"] == "mine" and ["lengths of rows" in said for said in record["remarks"]] == [True, True]
    assert str(block_walk.folder) in block_walk.finished["all"].stdout, "the control: the console does say where things are"


def test_what_the_teacher_came_with_is_honoured(block_walk):
    out, said = block_walk.folder / "out", block_walk.finished["all"].stdout
    assert "model.safetensors is read, as transformers does" in said and "left out: 1, mtp.layers.0.norm.weight the first" in said
    assert read_config(out)["eos_token_id"] == ENDS == json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    model, tokenizer = (auto.from_pretrained(out, trust_remote_code=True) for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert model.generation_config.eos_token_id == ENDS and tokenizer("import os")["input_ids"]
    assert not (block_walk.folder / "mine" / "trace").exists() and "num_nextn_predict_layers" not in read_config(out)


def test_text_is_generated(block_walk):
    assert "6 tokens" in block_walk.finished["generate"].stdout


def test_the_merge_is_the_mean(block_walk):
    (folder,) = (path.parent / "checkpoint" for path in block_walk.folder.glob("runs/store/merge/*/done.json"))
    merged, pruned, student = (Checkpoint(path) for path in (folder, *(block_walk.summary["models"][name]["path"] for name in ("pruned", "student"))))
    assert merged.entries.keys() == pruned.entries.keys()
    assert all(torch.allclose(merged.read(name), (pruned.read(name) + student.read(name)) / 2, atol=1e-6) for name in merged.entries)
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == merged.num_parameters


def test_a_second_run_does_no_stage_again(block_walk, door):
    again = door(block_walk.folder, *block_walk.settings)
    assert again.returncode == 0 and again.stdout.count("(already done)") >= 11, again.stdout + again.stderr


# A user's mistakes.


@pytest.fixture(scope="module")
def mistaken(door, make_teacher, tmp_path_factory):
    """Runs a walk of a one-block teacher that is wrong somewhere, gives the one line that it was refused with; `change` is given the folder first."""
    folders = {}

    def run(name: str, *arguments: str, change=None, **config) -> str:
        if change or (name, *config) not in folders:
            folder = folders[(name, *config)] = tmp_path_factory.mktemp("mistake")
            make_teacher(folder, name, num_hidden_layers=2)
            written = read_config(folder / "mine")
            (folder / "mine" / "config.json").write_text(json.dumps(written | config))
        folder = folders[(name, *config)]
        if change:
            change(folder)
            folders.pop((name, *config))
        finished = door(folder, *(one for one in COMMON if not one.startswith("search.layers")), "search.layers={values: [1]}", *arguments)
        assert finished.returncode == 2 and len(finished.error_lines) == 1 and "Traceback" not in finished.stderr + finished.stdout, finished.stderr
        assert not list(folder.glob("runs/store/score/*/done.json"))
        return finished.error_lines[0].removeprefix("error: ")

    return run


MISTAKES = {
    "no family": ("llama tied", {"model_type": "gpt2"}, ("stage=score", "search.ffn={low: 0.5}"), "supported: nemotron_h, "),
    "quantised": ("llama tied", {"quantization_config": {"quant_method": "awq"}}, ("stage=score",), "quantization_config is there (awq)"),
    "windows": ("qwen3 tied", {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"]}, ("stage=teacher",),
                "layer_types (1 entries) must have an entry for each of the 2 layers that num_hidden_layers says"),
    "no axis": ("llama tied", {}, ("stage=search", "search.attention_channels={values: [4]}"), "search.attention_channels is no setting"),
    "another family's axis": ("llama tied", {}, ("stage=search", "search.mamba_heads={low: 0.5}"),
                              "search.mamba_heads is given, but a llama has no such axis; it has layers, hidden, ffn, attention_heads, key_value_heads"),
    "floors": ("llama tied", {}, ("stage=search", "search.floors={attention: 2}"), "search.floors keeps 2 layers of kind '*'; the teacher's layers are"),
    "ceilings": ("llama tied", {}, ("stage=score", "scoring.ceilings={attention: 1}"),
                 "scoring.ceilings keeps at most 1 layers of kind '*'; the teacher's layers are"),
    "an equation": ("llama tied", {}, ("stage=search", "search.hidden={values: [40]}"),
                    "hidden % num_attention_heads == 0 holds for no options of search.hidden (40) and search.attention_heads (6)"),
    "a fixed equation": ("llama tied", {}, ("stage=search", "search.fixed.hidden=40"), "the student breaks hidden % num_attention_heads == 0"),
    "twice": ("llama tied", {}, ("stage=search", "search.fixed={mamba_heads: 4, mamba_num_heads: 6}"),
              "search.fixed has mamba_heads (4) and mamba_num_heads (6), two names of one size; give one"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_any_work(name, mistaken):
    teacher, config, arguments, said = MISTAKES[name]
    assert said in mistaken(teacher, *arguments, **config)


@pytest.mark.parametrize("stage", ["teacher", "base"])
def test_a_tied_checkpoint_with_another_head_is_refused(stage, mistaken, build_tiny):
    def add_head(folder: Path) -> None:
        own = Checkpoint(folder / "mine")
        state = {name: own.read(name) for name in own.entries}
        (folder / "other").mkdir()
        for path in (folder / "mine").iterdir():
            (folder / "other" / path.name).write_bytes(path.read_bytes())
        wrong = folder / ("mine" if stage == "teacher" else "other")
        save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1}, wrong / "model.safetensors", metadata={"format": "pt"})

    said = mistaken("llama tied", f"stage={stage}", *(["base.path=other"] if stage == "base" else []), change=add_head)
    assert "tie_word_embeddings is true" in said and "lm_head.weight holds other values than model.embed_tokens.weight" in said
