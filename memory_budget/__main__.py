"""python -m memory_budget DIR_OR_CONFIG_JSON: what a model takes in memory, and what still fits.

Exit codes: 0 done, whether it fits or not · 2 the user's mistake, one line on stderr beginning "error: " · 130 interrupted.
"""

import argparse
import json
import os
import sys

# Said before what an older Python cannot read is imported; this file itself it can.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.stderr.write("error: Python is %d.%d; minitron needs 3.11 or later\n" % sys.version_info[:2])  # noqa: UP031
    sys.exit(2)

from memory_budget.command.answer import Answer, work_out
from memory_budget.command.as_json import as_json, questions_as_json
from memory_budget.command.options import build_parser, fail
from memory_budget.command.plot import write_plot
from memory_budget.command.tables import as_table, cards_table, compare_table, formats_table


def main(arguments: list[str] | None = None) -> int:
    """The command; gives the exit code."""
    try:
        try:
            return run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def run(arguments: list[str] | None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        answer = work_out(options, options.config)
        other = None if options.compare is None else work_out(options, options.compare)
        print(text_of(options, answer, other))
    except ValueError as error:
        fail(str(error))
    return 0


def text_of(options: argparse.Namespace, answer: Answer, other: Answer | None) -> str:
    """All that is printed. Raises ValueError where a plot cannot be drawn."""
    if options.json:
        drawn = None if options.plot is None else write_plot(answer, options.plot)
        result = as_json(answer) | questions_as_json(answer, with_cards=options.cards, with_formats=options.formats, with_curve=drawn is not None)
        return json.dumps(result if other is None else result | {"compare": as_json(other)}, indent=2)
    sections = [as_table(answer) if other is None else compare_table(answer, other)]
    sections += ["\n".join(f"note: {one.name}: {note}" for one in (answer, other) for note in one.notes)] if other is not None else []
    sections += [cards_table(answer)] if options.cards else []
    sections += [formats_table(answer)] if options.formats else []
    sections += [write_plot(answer, options.plot)] if options.plot is not None else []
    return "\n\n".join(section for section in sections if section).encode("utf-8", "backslashreplace").decode()


if __name__ == "__main__":
    sys.exit(main())
