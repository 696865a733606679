"""Writing a model folder that any runtime loads unchanged, and checking it by reading it back."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

import torch
from torch import nn

from distill.states import TENSORS_FILE
from memory_budget.architecture import Architecture, describe_layers
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_active_parameters, count_total_parameters
from memory_budget.units import format_gib
from minitron.checkpoints.files import DTYPES, Checkpoint, PlannedTensor, PlannedWeights, copy_companions, same_bits
from minitron.checkpoints.local_paths import is_local, public
from minitron.checkpoints.placement import StreamedModel
from minitron.checkpoints.shards import save_model_weights, write_weights
from minitron.families.base import Family
from minitron.families.state import model_tensors
from minitron.families.table import expert_of
from minitron.machine.memory import available_memory_bytes
from minitron.mamba import dispatch
from minitron.settings.hub import HUB_ID
from minitron.walk.shown import escaped, without_secrets
from minitron.walk.stage import StageContext
from minitron.walk.store import Result, write_json

CHECK_TOKENS = 48
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")
LICENCE_KEYS = ("license", "license_name", "license_link")
LAYER_CHECK_TOKENS = 8


def write_model(folder: Path, family: Family, model: nn.Module, *, config: dict, dtypes: Mapping[str, torch.dtype], companions: Path,
                card: str, max_shard_bytes: int) -> None:  # fmt: skip
    """Write a model in memory as a checkpoint: weights, config, tokenizer files and model card.

    `dtypes` maps canonical tensor names to the dtype each is stored in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {family.file_name(name): tensor.detach().to(dtypes[name]) for name, tensor in model_tensors(family, model).items()}
    save_model_weights(state, folder, max_shard_bytes=max_shard_bytes)
    write_companions(folder, config=config, companions=companions, card=card)


def state_tensors(family: Family, state: Path, *, like: Checkpoint) -> list[PlannedTensor]:
    """The weights of a training's saved state, whatever engine made it, in the names and dtypes of the checkpoint that was trained."""
    weights = Checkpoint(state, file=TENSORS_FILE)
    names = {family.canonical_name(name.removeprefix("model.")): name for name in weights.entries if name.startswith("model.")}
    entries = {family.canonical_name(entry.name): entry for entry in like.entries.values()}
    return [weights.planned(names[name], new_name=family.file_name(name), dtype=entry.dtype) for name, entry in entries.items()]


def write_planned(folder: Path, family: Family, planned: Sequence[PlannedTensor], *, config: dict, companions: Path, card: str, max_shard_bytes: int,
                  on_bytes: Callable[[int], None] = lambda _: None) -> str:  # fmt: skip
    """Write planned tensors, never a whole model in memory, as a checkpoint: weights, config, tokenizer files and model card; then read it back.

    Gives what the check says. Whole shards that an earlier attempt at the same left are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, planned, max_shard_bytes=max_shard_bytes, on_bytes=on_bytes)
    write_companions(folder, config=config, companions=companions, card=card)
    return check_written(folder, family, planned, config)


def formats_of(tensors: Iterable[PlannedTensor]) -> str:
    """The number formats that tensors are stored in, the one of most bytes first: "bfloat16 and float32"."""
    sizes = Counter()
    for tensor in tensors:
        sizes[str(DTYPES[tensor.dtype]).removeprefix("torch.")] += tensor.num_bytes
    return " and ".join(name for name, _ in sizes.most_common())


def write_companions(folder: Path, *, config: dict, companions: Path, card: str) -> None:
    """Everything of a model folder but the weights."""
    write_json(folder / "config.json", config)
    copy_companions(companions, folder)
    (folder / "README.md").write_text(without_secrets(card))


@torch.no_grad()
def check_reload(folder: Path, family: Family, model: nn.Module, *, tolerance: float = 1e-5) -> float:
    """Load the folder as a user would and compare its logits with the model in memory.

    Returns the largest difference relative to the largest logit; raises RuntimeError above the tolerance, or where
    the parameters on disk are not the number that config.json's architecture has.
    """
    dispatch.install()  # a cut may be the first that this process computes
    planned = count_total_parameters(architecture_from_config(read_config(folder)))
    written = Checkpoint(folder).num_parameters
    if planned != written:
        raise RuntimeError(f"{folder} holds {written:,} parameters, its config.json has {planned:,}")
    device = next(model.parameters()).device  # both on one: another computes otherwise (a GPU's kernels round float32 products to TF32)
    reloaded = family.load(folder, dtype=torch.float32, device=str(device))
    vocabulary = reloaded.config.vocab_size
    ids = torch.randint(vocabulary, (2, CHECK_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    expected = model.eval()(ids, use_cache=False).logits.float()
    difference = ((reloaded(ids, use_cache=False).logits - expected).abs().max() / expected.abs().max()).item()
    if not difference <= tolerance:
        raise RuntimeError(f"{folder}, read back, gives logits that differ by {difference:.2e} of the largest; at most {tolerance:.0e} is rounding")
    return difference


@torch.no_grad()
def check_written(folder: Path, family: Family, planned: Sequence[PlannedTensor], config: dict) -> str:
    """Hold a folder against the tensors planned for it, made anew: by the models' logits where two fit in memory, else layer by layer.

    Gives a sentence on what was found; raises RuntimeError as the two checks do.
    """
    if 3 * 4 * count_total_parameters(architecture_from_config(config)) >= available_memory_bytes():
        check_layer_by_layer(folder, family, planned, config)
        return "reloaded layer by layer, every tensor and every layer's output equal"
    model, weights = family.build(config), PlannedWeights(planned)
    for name, tensor in model_tensors(family, model).items():
        tensor.copy_(weights.read(family.file_name(name)))
    return f"reloaded, logits differ by {check_reload(folder, family, model):.1e}"


@torch.no_grad()
def check_layer_by_layer(folder: Path, family: Family, planned: Sequence[PlannedTensor], config: dict, *,
                         on_layer: Callable[[], None] = lambda: None) -> None:  # fmt: skip
    """check_reload for a model too large for memory: the folder against the tensors and config.json planned for it, a layer at a time.

    Every tensor must be the planned one, bit for bit, and every layer, built as the folder's config.json says, must do to
    a few tokens what the planned layer does in memory. Two layers of each side are in memory at once, or the output
    head. Raises RuntimeError where something differs or the logits are not finite.
    """
    dispatch.install()
    written, architecture = Checkpoint(folder), architecture_from_config(config)
    if {name: (entry.dtype, entry.shape) for name, entry in written.entries.items()} != {tensor.name: (tensor.dtype, tensor.shape) for tensor in planned}:
        raise RuntimeError(f"{folder} holds other tensors than were planned")
    if architecture_from_config(read_config(folder)) != architecture:
        raise RuntimeError(f"{folder}/config.json, read back, describes another architecture than was planned")
    device = torch.device("cpu")
    found = StreamedModel(family, folder, read_config(folder), architecture, device)
    expected = StreamedModel(family, folder, config, architecture, device, weights=PlannedWeights(planned))
    for tensor in planned:  # those that no layer brings at once, or that a layer converts
        name = family.canonical_name(tensor.name)
        by_layer = name.startswith("layers.") and expert_of(name) is None and DTYPES[tensor.dtype] == found.dtype
        if not by_layer and not written.holds(tensor):
            raise RuntimeError(f"{folder}: tensor {tensor.name}, read back, is not what was planned")
    ids_BT = torch.randint(architecture.vocab, (1, LAYER_CHECK_TOKENS), generator=torch.Generator().manual_seed(0))
    (hidden_BTD,), layers = found.embed([ids_BT]), range(architecture.num_sublayers)
    for (layer, one), (_, other) in zip(found.visit(layers), expected.visit(layers), strict=True):
        for name, tensor in other.state_dict().items():
            if not tensor.is_meta and not same_bits(one.state_dict()[name], tensor):
                raise RuntimeError(f"{folder}: tensor {name} of layer {layer}, read back, is not what was planned")
        before, hidden_BTD = hidden_BTD, one(hidden_BTD)
        if not torch.equal(hidden_BTD, other(before)):
            raise RuntimeError(f"{folder}: layer {layer}, read back, does something else to {LAYER_CHECK_TOKENS} tokens than the layer planned")
        on_layer()
    with found.open_head() as head:
        if not torch.isfinite(head.logits(hidden_BTD)).all():
            raise RuntimeError(f"{folder}, read back, gives logits that are not finite")


@dataclass(frozen=True, slots=True)
class Licence:
    """What a model's folder says of its licence: the card's metadata, and files of that name."""

    metadata: Mapping[str, str]
    files: tuple[Path, ...] = ()


def licence_of(folder: Path, given: str | None = None) -> Licence:
    """The licence of a model folder, or the one that is given in its place. Raises ValueError where its card's metadata cannot be read."""
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    card, metadata = folder / "README.md", {"license": given} if given else {}
    if card.exists() and not given:
        try:
            metadata = metadata_load(card) or {}
        except (ValueError, YAMLError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{card}, the teacher's card, must have metadata in YAML, where its licence is looked for, or card.licence=ID says it: "
                             f"{reason}") from None  # fmt: skip
    files = sorted({path for pattern in LICENCE_FILES for path in folder.glob(pattern) if path.is_file()})
    return Licence({key: public(str(metadata[key])) for key in LICENCE_KEYS if metadata.get(key)}, tuple(files))


def licence_note(licence: Licence, teacher: str, *, carried: bool) -> str:
    """What a person who passes the student on has to know; `carried`, whether the teacher's files are in its folder too."""
    if not licence.metadata and not licence.files:
        return (f"Unknown: the folder of the teacher ({escaped(teacher)}) has no LICENSE file, and its card names none. Find out before you pass this model "
                "on; stage=export with card.licence=ID writes it into the card.")  # fmt: skip
    named = licence.metadata.get("license_name") or licence.metadata.get("license")
    link = escaped(licence.metadata.get("license_link", ""))
    parts = [f"A derivative of {escaped(teacher)}" + (f", whose licence is **{escaped(named)}**" if named else "") + (f" ({link})" if link else "") + "."]
    if licence.files:
        names = ", ".join(f"[{escaped(path.name)}]({quote(path.name)})" if carried else f"`{path.name}`" for path in licence.files)
        parts.append(f"The teacher's {names} {'is carried over' if carried else 'comes along with stage=export'}.")
    return " ".join([*parts, "What it asks of derivatives holds for this model."])


def student_card(context: StageContext, title: str, *, lines: list[str], architecture: Architecture, source: Result) -> str:
    """The card of a checkpoint made of `source`, another one's stage: with its Hub id as base, and its licence. An unreadable card there is said and left."""
    card, name = context.settings.card, source.facts["name"]
    try:
        licence = licence_of(source.model_folder, card.licence)
    except ValueError as error:
        context.console.say(str(error))
        licence = Licence({})
    head = model_card(title, lines=lines, architecture=architecture, base=card.base_model or name, metadata=licence.metadata)
    return f"{head}\n## Licence\n\n{licence_note(licence, name, carried=False)}\n"


def model_card(title: str, *, lines: list[str], architecture: Architecture, base: str | None,
               metadata: Mapping[str, str] = MappingProxyType({})) -> str:  # fmt: skip
    """README.md of a model folder: what it is, what it came from, its sizes; `metadata` is more of what the Hub reads at its top."""
    title = " ".join(title.split())
    tags = ["minitron", "pruning", "distillation", architecture.model_type]
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]"]
    head += [f"base_model: {base}"] if base and HUB_ID.match(base) and not is_local(base) else []
    head += [f"{name}: {json.dumps(value)}" for name, value in metadata.items()]  # a JSON string is a YAML one
    parameters, of_blocks = count_total_parameters(architecture), architecture.sublayers_per_layer > 1
    sizes = [
        ("", "parameters", f"{parameters:,}"),
        ("E", "of them for one token", f"{count_active_parameters(architecture):,}"),
        ("", "weights in bf16", format_gib(2 * parameters)),
        ("", "layers", describe_layers(architecture) if of_blocks else f"{architecture.num_layers} (`{architecture.pattern}`)"),
        ("", "hidden", str(architecture.hidden)),
        ("-", "FFN", str(architecture.ffn)),
        ("E", "experts", _described_experts(architecture)),
        ("*", "attention", f"{architecture.num_attention_heads} query heads, {architecture.num_key_value_heads} KV heads × {architecture.attention_head_dim}"),
        ("M", "Mamba-2", f"{architecture.mamba_num_heads} heads × {architecture.mamba_head_dim}, {architecture.mamba_num_groups} groups, "
                         f"state {architecture.mamba_state_size}"),
        ("", "vocabulary", f"{architecture.vocab:,}" + ("; embeddings and output head are one matrix (tied)" if architecture.tied_embeddings else "")),
    ]  # fmt: skip
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for letter, name, value in sizes if letter in architecture.mixers)]
    letters = ", ".join(["M Mamba-2", "`*` attention", "- FFN", *["E experts"] * ("E" in architecture.pattern)])
    return "\n".join([*head, "---", "", f"# {title}", "", *lines, "", *table, *([] if of_blocks else ["", f"Pattern letters: {letters}."]), ""])


def _described_experts(architecture: Architecture) -> str:
    groups, shared = architecture.moe_groups, architecture.moe_shared_ffn
    said = [f"{architecture.moe_num_experts} of {architecture.moe_ffn} neurons in each of {architecture.num_layers_of('E')} layers",
            f"{architecture.moe_experts_per_token} for a token"]  # fmt: skip
    said += [f"in {groups} groups, {architecture.moe_groups_per_token} of them for a token"] * (groups > 1)
    return ", ".join(said + [f"and a shared one of {shared}"] * (shared > 0))
