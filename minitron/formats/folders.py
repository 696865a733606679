"""Folders as sources: all known files below one, and the form that the datasets library saves a dataset in."""

import json
import os
from pathlib import Path

from memory_budget.json_files import is_inside, read_json
from minitron.formats.kinds import KNOWN, KNOWN_SAID, TEXT, TOKENS, TOKENS_INDEX, extension
from minitron.formats.streams import named_errors, wrong

STATE, SPLITS = "state.json", "dataset_dict.json"  # of a saved dataset, and of a folder of several
ABOUT = ("readme", "license", "licence", "changelog", "contributing")  # texts about the data, where they lie beside data of another kind
DESCRIPTIONS = (SPLITS, "dataset_info.json", "dataset_infos.json")  # of the datasets library: no documents


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder is what `Dataset.save_to_disk` of the datasets library wrote."""
    return (path / STATE).is_file() and any(path.glob("*.arrow"))


def saved_files(folder: Path, name: str) -> list[Path]:
    """The Arrow files of a saved dataset, in their order. Raises ValueError for a damaged folder."""
    with named_errors(f"{name}/{STATE}"):
        state = read_json(folder / STATE)
    if not isinstance(state, dict) or not isinstance(state.get("_data_files"), list):
        raise wrong(f"{name}/{STATE}", "names no files; save the dataset anew")
    if state.get("_indices_data_files"):
        raise wrong(name, "holds rows in an order of its own, by an old version of the datasets library; save it anew after flatten_indices()")
    names = [file.get("filename") if isinstance(file, dict) else None for file in state["_data_files"]]
    if odd := [given for given in names if not is_inside(given)]:
        raise wrong(f"{name}/{STATE}", f"names {json.dumps(odd[0])[:80]}, which is no file of its folder")
    paths = [folder / given for given in names]
    for path in paths:
        if not path.is_file():
            raise wrong(name, f"lacks {path.name}, which its {STATE} names")
    return paths


def files_below(folder: Path, pattern: str) -> list[Path]:
    """The files below a folder that can be read, and saved datasets, sorted by path; hidden ones are left out.

    So are descriptions, and texts about the data (README.md) where there are other kinds of files. Raises ValueError where
    nothing is left, and for a folder of a saved dataset's splits.
    """
    if (folder / SPLITS).is_file():
        splits = [path.name for path in sorted(folder.iterdir()) if is_saved_dataset(path)]
        named = ", ".join(repr(os.path.join(pattern, split)) for split in splits)
        raise ValueError(f"data.files names {pattern!r}, a folder with splits of a saved dataset; it must name one: {named or 'it holds none'}")
    found = sorted(_walk(folder), key=Path.as_posix)
    if any(path.is_dir() or extension(path) not in TEXT for path in found):
        found = [path for path in found if path.is_dir() or extension(path) not in TEXT or path.name.lower().split(".")[0] not in ABOUT]
    if not found:
        raise ValueError(f"data.files names {pattern!r}, a folder without a file that can be read: {KNOWN_SAID}")
    return found


def _walk(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        saved = [name for name in subfolders if is_saved_dataset(Path(folder, name))]
        found += [Path(folder, name) for name in saved]
        subfolders[:] = [name for name in subfolders if name not in saved]
        paths = [Path(folder, name) for name in names if not name.startswith(".") and name.lower() not in DESCRIPTIONS]
        # A .bin is many things, tokens only with its index; an index without its .bin is refused.
        found += [path for path in paths if extension(path) in KNOWN and not (extension(path) == TOKENS and not path.with_suffix(TOKENS_INDEX).is_file())]
    return found
