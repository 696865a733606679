"""Which teacher a run is about: its config.json, its folder, its identity. Loads no weights and no torch."""

import hashlib
from dataclasses import asdict, fields
from pathlib import Path

from memory_budget.architecture import Architecture, check_architecture
from memory_budget.hf_config import architecture_from_config, read_config
from minitron.settings.gguf_teacher import gguf_teacher_config
from minitron.settings.hub import from_hub
from minitron.settings.run import Settings

_PACKAGE = Path(__file__).resolve().parent.parent
# Beside the package in a checkout, inside it in an installed wheel.
CONF_FOLDER = next((folder for folder in (_PACKAGE.parent / "conf", _PACKAGE / "conf") if (folder / "run.yaml").exists()), _PACKAGE.parent / "conf")
STORED_FOLDER = _PACKAGE / "tiny_teacher"  # the tiny teacher that comes with the package: a checkpoint in bf16, and how it was made
STORED_FILES = ("config.json", "model.safetensors", "tokenizer.json")  # what it is told apart by
TRAINING_FILE = "training.json"  # beside them: how it came about, and their digest
TINY_POSITIONS = 131072  # the tiny teacher's max_position_embeddings
MOST_POSITIONS = 2**62  # tokens: of a model whose config.json names no longest text, as pure Mamba-2's does not


def teacher_architecture(settings: Settings) -> Architecture:
    """Sizes of the teacher, from its config.json alone. Raises ValueError for a path that is no checkpoint."""
    if not is_tiny(settings):
        return architecture_from_config(teacher_config(settings))
    tiny = Architecture(model_type="nemotron_h", vocab=settings.data.vocab, **asdict(settings.teacher.tiny))
    check_architecture(tiny)
    if is_stored(settings):
        _check_stored(tiny, architecture_from_config(teacher_config(settings)))
    return tiny


def is_converted(settings: Settings) -> bool:
    """Whether the walk converts its teacher from a GGUF file: its folder is there once stage teacher is done."""
    return settings.teacher.gguf is not None or settings.teacher.package is not None


def is_tiny(settings: Settings) -> bool:
    """Whether the teacher is a tiny one of ours, with a tokenizer of ours, and no checkpoint from elsewhere."""
    return settings.teacher.path is None and not is_converted(settings)


def is_stored(settings: Settings) -> bool:
    """Whether the teacher is the tiny one that comes with the package."""
    return is_tiny(settings) and not settings.teacher.train_anew


def is_trained(settings: Settings) -> bool:
    """Whether the walk trains its teacher, and the tokenizer."""
    return is_tiny(settings) and settings.teacher.train_anew


def _check_stored(wanted: Architecture, stored: Architecture) -> None:
    for name in [f.name for f in fields(Architecture)]:
        value, own = getattr(wanted, name), getattr(stored, name)
        if value != own:
            setting = "data.vocab" if name == "vocab" else f"teacher.tiny.{name}"
            raise ValueError(f"{setting} is {value!r}; the tiny teacher that comes with the package has {own!r}: teacher.train_anew=true trains another one")


def base_architecture(settings: Settings) -> Architecture:
    """Sizes of the model that is cut: the teacher, or the checkpoint of `base.path`. Raises ValueError where that is none of the teacher's kin."""
    teacher = teacher_architecture(settings)
    if settings.base.path is None:
        return teacher
    if not Path(settings.base.path).is_dir():
        raise ValueError(f"base.path is {settings.base.path!r}; it must be the folder of a checkpoint")
    base = architecture_from_config(read_config(settings.base.path))
    for name in ("model_type", "vocab"):
        if getattr(base, name) != getattr(teacher, name):
            raise ValueError(f"base.path {settings.base.path!r} has the {name} {getattr(base, name)}; it must be the teacher's, {getattr(teacher, name)}")
    return base


def teacher_config(settings: Settings) -> dict:
    """The parsed config.json of a teacher that is not trained here: from its folder, from `teacher.config`, from the Hub, or as a GGUF's header has it."""
    if is_stored(settings):
        return read_config(STORED_FOLDER)
    if is_converted(settings):
        return gguf_teacher_config(settings.teacher)
    path = settings.teacher.path
    if Path(path).is_dir():
        return read_config(path)
    if settings.teacher.config is not None:
        named = Path(settings.teacher.config)
        return read_config(named if named.exists() else CONF_FOLDER / named)
    return read_config(from_hub(path, "config.json", revision=settings.teacher.revision))


def max_positions(settings: Settings) -> int:
    """Tokens that a sequence may have: `max_position_embeddings`, or MOST_POSITIONS where config.json has none. NemotronH embeds no positions; it is what was
    trained or promised."""
    return TINY_POSITIONS if is_trained(settings) else int(teacher_config(settings).get("max_position_embeddings") or MOST_POSITIONS)


def teacher_folder(settings: Settings) -> Path:
    """The folder of a teacher that is there before the walk, with its weights; downloaded from the Hub if `teacher.path` is an id there."""
    assert settings.teacher.path is not None or is_stored(settings), "a teacher that the walk makes lies where its stage left it"
    if is_stored(settings):
        return STORED_FOLDER
    path = Path(settings.teacher.path)
    return path.resolve() if path.is_dir() else from_hub(settings.teacher.path, None, revision=settings.teacher.revision)


def stored_digest() -> str:
    """Of the stored tiny teacher's files, 12 hexadecimal digits. Raises ValueError where it is not there."""
    try:
        return digest_of(STORED_FOLDER)
    except OSError as error:
        raise ValueError(f"the tiny teacher that comes with the package cannot be read ({error.filename}: {error.strerror}); install it again, or set "
                         "teacher.train_anew=true or teacher.path") from None  # fmt: skip


def teacher_name(settings: Settings) -> str:
    """What cards and reports call a teacher of `teacher.path`: its Hub id, or the name of its folder, wherever that lies."""
    path = Path(settings.teacher.path)
    return path.resolve().name if path.is_dir() else settings.teacher.path


def digest_of(folder: Path) -> str:
    """Of a tiny teacher's files in a folder. Raises OSError."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in STORED_FILES)).hexdigest()[:12]
