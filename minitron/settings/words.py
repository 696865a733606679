"""What people type, as Hydra reads it: arguments in, arguments out, before anything is composed.

Hydra's own grammar stays; REWRITES adds the words that it would refuse or take for something else: `budget=l4`, `search.hidden=96`, one name where
a list is meant, `1e6` for a whole number, text with any character. Which setting takes what is read off the dataclasses' types (settings.names).

Text stands for itself, but `${NAME}` and `${oc.env:NAME}` are filled in (not in a prompt), null is none, and text in quotes is Hydra's own. Under -m a
comma outside quotes and brackets separates the values to try; else it belongs to the text.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, get_args, get_origin

from memory_budget.budget import PRESETS, parse_budget
from minitron.settings.names import did_you_mean, is_setting, no_setting, setting_groups, setting_types
from minitron.settings.run import Stage
from minitron.settings.search import AxisSettings
from nas.axes import AXES

FLAGS = ("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m", "--shell-completion", "-sc", "--info", "-i")
FLAGS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--experimental-rerun")
SHOWN = ("job", "hydra", "all")  # what --cfg takes
NOT_SPLIT = ("prompt",)  # text that has commas and braces of its own, under -m and everywhere
COMMAS_SEPARATE = ("evaluate.tasks",)  # of the lists of text; those of numbers all
OWN_KEYS = ("search.protect_experts",)
MEANT = {"teacher": "path", "base": "path", "data": "files", "throughput": "device", "search.fixed": "file", "export": "folder", "merge": "checkpoints"}
SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
INTEGER = re.compile(r"[+-]?\d[\d_]*")
EXPONENT = re.compile(r"[+-]?\d[\d_]*(\.\d+)?[eE]\+?\d+")


@dataclass(frozen=True, slots=True)
class Word:
    """One `key=value`; `mark` is Hydra's +, ++ or ~ before it, `value` is None where there is no =."""

    mark: str
    name: str
    value: str | None

    def __str__(self) -> str:
        return self.mark + self.name + ("" if self.value is None else f"={self.value}")

    @property
    def is_setting(self) -> bool:
        """Whether it is about settings, not about groups of config files or Hydra itself."""
        return self.mark != "~" and self.value is not None and not re.search(r"[/@]", self.name) and self.name.split(".")[0] not in ("hydra", "experiment")


Rewrite = Callable[[list[Word], bool], list[Word]]


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra reads them, options first. Raises ValueError for those that are none."""
    options, rest = _options_and_words(arguments)
    words = [_word(argument) for argument in rest]
    sweeping = not {"-m", "--multirun"}.isdisjoint(options) or any(word.name == "hydra.mode" and word.value == "MULTIRUN" for word in words)
    for rewrite in REWRITES:
        words = rewrite(words, sweeping)
    return [*options, *map(str, words)]


def asks_for_help(arguments: Iterable[str]) -> bool:
    return not {"help", "-h", "--help"}.isdisjoint(arguments)


def _options_and_words(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options with their values, wherever they stand, and all else."""
    options, words, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        name, given, value = argument.partition("=")
        if not argument.startswith("-"):
            words.append(argument)
            continue
        if name not in FLAGS + FLAGS_WITH_VALUE:
            raise ValueError(f"{name} is no option{did_you_mean(name, FLAGS + FLAGS_WITH_VALUE) or '; --help lists them'}")
        options.append(argument)
        if name in FLAGS_WITH_VALUE and not given:
            value = rest.pop(0) if rest else ""
            options.append(value)
        if name in ("--cfg", "-c") and value not in SHOWN:
            raise ValueError(f"{name} is {value!r}; it must be job (every setting with its value), hydra or all")
        if name in FLAGS_WITH_VALUE and not value:
            raise ValueError(f"{name} has no value; it must be given one after it")
        if name in ("--info", "-i") and rest and re.fullmatch(r"[a-z-]+", rest[0]):
            options.append(rest.pop(0))
    return options, words


def _word(argument: str) -> Word:
    mark = re.match(r"\+{0,2}|~", argument)[0] or ("~" if argument.startswith("~") else "")
    name, given, value = argument.removeprefix(mark).partition("=")
    if not given and mark != "~":
        raise ValueError(f"{argument!r} is no key=value{_meant_by(argument)}")
    if not name.strip():
        raise ValueError(f"{argument!r} names no setting; it must be one, e.g. seed=1; --cfg job lists them all")
    return Word(mark, name, value if given else None)


def _meant_by(argument: str) -> str:
    """What someone may have meant who gave no key."""
    stage = did_you_mean(argument, list(Stage.__members__)).replace("did you mean ", "did you mean stage=")
    if stage:
        return stage
    if is_setting(argument):
        return f"; it must be given a value: {argument}=…"
    if "/" in argument or "." in argument:
        return f"; did you mean teacher.{'gguf' if argument.endswith('.gguf') else 'path'}={argument}?"
    return "; --help says more"


# ------------------------------------------------------------------------------------------------------------- rewrites


def _no_experiment(words: list[Word], _sweeping: bool) -> list[Word]:
    """experiment=null and experiment=none."""
    return [Word("~", "experiment", None) if word.name == "experiment" and str(word.value).lower() in ("null", "none", "") and word.mark == "" else word
            for word in words]  # fmt: skip


def _own(words: list[Word], _sweeping: bool) -> list[Word]:
    """A teacher and no experiment: experiment=own, since the other experiments are about teachers of theirs."""
    teacher = any(word.name in ("teacher.path", "teacher.gguf", "teacher.package") and word.value not in (None, "null") for word in words)
    return [*words, Word("", "experiment", "own")] if teacher and not any(word.name == "experiment" for word in words) else words


def _aliases(words: list[Word], _sweeping: bool) -> list[Word]:
    """An axis by the architecture's name for it: search.num_layers is search.layers. Raises ValueError for one given by both."""
    aliases = {f"search.{axis.field}": f"search.{name}" for name, axis in AXES.items() if axis.field != name}
    given, renamed = {word.name for word in words}, []
    for word in words:
        alias = next((alias for alias in aliases if word.name == alias or word.name.startswith(f"{alias}.")), None)
        if alias and aliases[alias] in given:
            raise ValueError(f"{alias} and {aliases[alias]} are both given, two names of one axis; give one")
        renamed.append(replace(word, name=aliases[alias] + word.name.removeprefix(alias)) if alias else word)
    return renamed


def _known(words: list[Word], _sweeping: bool) -> list[Word]:
    """Raises ValueError for a name that is no setting, and for a value in place of a group of settings."""
    for word in words:
        if not word.is_setting or (word.mark == "+" and "." not in word.name):  # which may name a group of config files too
            continue
        if not is_setting(word.name):
            raise ValueError(no_setting(word.name))
        group = setting_groups().get(word.name)
        if group and group is not AxisSettings and word.name != "budget" and word.value[:1] not in ("{", "$"):
            members = [name.removeprefix(f"{word.name}.") for name in setting_types() if name.rpartition(".")[0] == word.name]
            meant = f"; did you mean {word.name}.{MEANT[word.name]}={word.value}?" if word.name in MEANT else f": {', '.join(members)}"
            raise ValueError(f"{word.name} is {word.value!r}, but {word.name} is a group of settings{meant}")
    return words


def _budget(words: list[Word], sweeping: bool) -> list[Word]:
    """budget=NAME or GIB; and budget.name or budget.device_gib alone, which mean the same. Raises ValueError for what is neither."""
    given = {word.name: word.value for word in words if word.value is not None}
    own_device = given.get("budget.device_gib", "null") != "null"
    rewritten = []
    for word in words:
        if word.name == "budget" and word.value is not None and not word.value.startswith("{"):
            pieces = _split(word.value) if sweeping else [word.value]
            budgets = [{name: value for name, value in _budget_values(piece).items() if f"budget.{name}" not in given} for piece in pieces]
            if len(budgets) > 1:
                rewritten.append(replace(word, value=",".join("{" + ", ".join(f"{name}: {value}" for name, value in one.items()) + "}" for one in budgets)))
            else:
                rewritten += [Word("", f"budget.{name}", value) for name, value in budgets[0].items()]
        elif word.name == "budget.name" and word.value is not None and not own_device and "budget" not in given:
            names = [_preset(piece) for piece in (_split(word.value) if sweeping else [word.value])]
            rewritten += [replace(word, value=",".join(names)), *_unless(given, device_gib="null", cushion_fraction="null", set_aside_gib="null")]
        elif word.name == "budget.device_gib" and word.value is not None and own_device and "budget" not in given:
            name = "'${budget.device_gib} GiB'" if sweeping and len(_split(word.value)) > 1 else f"'{word.value} GiB'"
            rewritten += [word, *(_unless(given, name=name, cushion_fraction="0", set_aside_gib="0") if "budget.name" not in given else [])]
        else:
            rewritten.append(word)
    return rewritten


def _unless(given: dict[str, Any], **values: str) -> list[Word]:
    return [Word("", f"budget.{name}", value) for name, value in values.items() if f"budget.{name}" not in given]


def _budget_values(text: str) -> dict[str, str]:
    """The four settings of a budget, a preset's numbers left to the preset."""
    budget = parse_budget(_unquoted(text))
    if budget.name in PRESETS:
        return {"name": budget.name, "device_gib": "null", "cushion_fraction": "null", "set_aside_gib": "null"}
    return {"name": f"'{budget.name}'", "device_gib": repr(budget.device_gib), "cushion_fraction": "0", "set_aside_gib": "0"}


def _preset(text: str) -> str:
    name = _unquoted(text).lower()
    if name not in PRESETS:
        raise ValueError(f"budget.name is {_unquoted(text)!r}; without budget.device_gib it must be one of {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")
    return name


def _modelled_device(words: list[Word], _sweeping: bool) -> list[Word]:
    """throughput.device alone is that device, with none of the experiment's numbers."""
    given = {word.name for word in words}
    if "throughput.device" not in given or given & {"throughput.gb_per_second", "throughput.tflops"}:
        return words
    return [*words, Word("", "throughput.gb_per_second", "null"), Word("", "throughput.tflops", "null")]


def _axes(words: list[Word], sweeping: bool) -> list[Word]:
    """search.hidden=96 and search.hidden=[96,112] are its values. Raises ValueError for what are no sizes."""
    rewritten = []
    for word in words:
        if setting_groups().get(word.name) is not AxisSettings or not word.is_setting or word.value[:1] in ("{", "$") or SWEEP.fullmatch(word.value):
            rewritten.append(word)
            continue
        if word.value == "null":
            rewritten.append(replace(word, value="{values: null, low: null, high: null, step: null}"))
            continue
        sizes = [size for piece in _split(word.value) for size in _split(piece.strip("[]"))]
        if not all(INTEGER.fullmatch(size) or EXPONENT.fullmatch(size) for size in sizes):
            raise ValueError(f"{word.name} is {word.value!r}; it must be one size or several, e.g. {word.name}=96 or {word.name}='[96, 112]', or bounds, "
                             f"e.g. {word.name}='{{low: 0.5, high: 1}}', of which those up to 1 are shares of the teacher's")  # fmt: skip
        rewritten.append(replace(word, name=f"{word.name}.values"))
    return rewritten


def _mappings(words: list[Word], _sweeping: bool) -> list[Word]:
    """Any key may come into a mapping that has none of its own in run.yaml."""
    return [replace(word, mark="++") if word.mark == "" and word.name.startswith(OWN_KEYS) else word for word in words]


def _values(words: list[Word], sweeping: bool) -> list[Word]:
    """Every value as Hydra's grammar writes it for the setting's type."""
    types = setting_types()
    return [replace(word, value=_written(word.name, types[word.name], word.value, sweeping)) if word.is_setting and word.name in types else word
            for word in words]  # fmt: skip


def _names_of_jobs(words: list[Word], sweeping: bool) -> list[Word]:
    """Under -m, what is not to be in the name of a job's run (door.command makes it): all but what is tried, and all where run_name says more itself."""
    if not sweeping:
        return words
    tried = {word.name for word in words if word.value and (SWEEP.fullmatch(word.value) or len(_split(word.value)) > 1)} - {"candidate"}
    named = "run_name" in tried or any(word.name == "run_name" and "${" in str(word.value) for word in words)
    left_out = sorted({word.name for word in words if named or word.name not in tried})
    return [*words, Word("", "hydra.job.config.override_dirname.exclude_keys", f"[{','.join(left_out)}]")]


# Each sees all words, as the ones before it left them.
REWRITES: tuple[Rewrite, ...] = (_no_experiment, _own, _aliases, _known, _budget, _modelled_device, _axes, _mappings, _values, _names_of_jobs)


# --------------------------------------------------------------------------------------------------------------- values


def _written(name: str, kind: Any, value: str, sweeping: bool) -> str:
    if sweeping and SWEEP.fullmatch(value):
        return value
    pieces = _split(value) if sweeping and name not in NOT_SPLIT else [value]
    return ",".join(_one(name, kind, piece) for piece in pieces)


def _one(name: str, kind: Any, value: str) -> str:
    """One value of a setting."""
    write = {str: lambda text: _text(text, fills_in=name not in NOT_SPLIT), int: _whole}
    if get_origin(kind) is not list:
        return write.get(kind, str)(value)
    (of,) = get_args(kind)
    if value == "null" or of is Any or (value.startswith("${") and _is_filled_in(value[2:])):
        return value
    listed = value.startswith("[") and value.endswith("]")
    if of not in write:
        return value if listed else f"[{value}]"
    text = value[1:-1] if listed else value
    if not text.strip():
        return "[]"
    separate = listed or of is int or name in COMMAS_SEPARATE
    return f"[{','.join(write[of](item) for item in (_split(text) if separate else [text]))}]"


def _text(text: str, *, fills_in: bool) -> str:
    """What was typed in Hydra's quotes, so that it is read back as it is; null and what has quotes already stay."""
    return text if text == "null" or QUOTED.fullmatch(text) else quoted(text, fills_in=fills_in)


def quoted(text: str, *, fills_in: bool = False) -> str:
    """Any text in Hydra's quotes; `fills_in` leaves ${NAME} of a setting to be filled in."""

    def dollar(found: re.Match) -> str:
        if fills_in and not found[1] and _is_filled_in(found[2]):
            return found[0]
        return found[1] * 2 + "\\" + found[0][len(found[1]) :]

    text = re.sub(r"(\\*)\$\{([^}]*)", dollar, text)
    text = re.sub(r"\\+(?='|$)", lambda some: some[0] * 2, text)  # of backslashes, only those before a quote count
    return "'" + text.replace("'", "\\'") + "'"


def _is_filled_in(inside: str) -> bool:
    """Whether ${…} is more than text."""
    return inside.rstrip("}") in setting_types() or inside.startswith(("oc.", "hydra:"))


def _unquoted(text: str) -> str:
    return text[1:-1] if QUOTED.fullmatch(text) else text


def _whole(text: str) -> str:
    """1e6 and 2.5e9 as whole numbers, where they are."""
    if EXPONENT.fullmatch(text):
        number = Decimal(text)
        return str(int(number)) if number == int(number) else text
    return text


def _split(text: str) -> list[str]:
    """At commas outside quotes and brackets; brackets that do not match count for nothing."""
    depths, pieces, start, position = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}, [], 0, 0
    nests = _balanced(text)
    depth = 0
    while position < len(text):
        quoted = QUOTED.match(text, position) if text[start:position].strip() == "" else None
        if quoted:
            position = quoted.end()
            continue
        depth += depths.get(text[position], 0) if nests else 0
        if text[position] == "," and depth == 0:
            pieces.append(text[start:position].strip())
            start = position + 1
        position += 1
    return [*pieces, text[start:].strip()] if text[start:].strip() or not pieces else pieces


def _balanced(text: str) -> bool:
    closing, open_ones = {")": "(", "]": "[", "}": "{"}, []
    for letter in text:
        if letter in closing.values():
            open_ones.append(letter)
        elif letter in closing and (not open_ones or open_ones.pop() != closing[letter]):
            return False
    return not open_ones
