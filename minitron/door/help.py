"""The page of --help: on one screen what this is, how it is begun, the stages of a walk, and where the rest is explained."""

import sys
from textwrap import fill

from minitron.settings.run import Settings
from minitron.settings.teachers import CONF_FOLDER
from minitron.walk.table import order_of, stages, stored_stages

COLUMNS = 108

PAGE = """\
minitron makes a language model fit a GPU: scores what matters, searches what fits, cuts, distils.

  python -m minitron.run                                       the demo: a tiny teacher that comes with it
  python -m minitron.run teacher.path=DIR_OR_HUB_ID budget=l4  your own checkpoint, and the card it is to fit
  python -m minitron.run stage=generate prompt="A question"    of the student; with the settings of its run

Stages of a walk; stage=NAME runs what it needs first, stage=all (the default) all and the report. Results are
kept, and the same command goes on where it was left.
{walk}
{others}
{using}

key=value sets anything. --cfg job prints every setting with its value; each one's meaning stands in
  {settings}
{experiments}
Yours: --config-dir DIR experiment=MINE, with DIR/experiment/MINE.yaml (docs/own_model.md shows one).
budget= takes a card's name or GiB, search.hidden=96 or '[96, 112]' an axis. Lists go in brackets; one name
needs none. -m runs one job per comma-separated value. Exit codes: 0 done, 2 your mistake, 130 interrupted."""


def help_page() -> str:
    walk = order_of(Settings())
    others = [name for name in stored_stages() if name not in walk]
    using = [name for name in stages() if name not in stored_stages()]
    experiments = sorted(path.stem for path in (CONF_FOLDER / "experiment").glob("*.yaml"))
    return PAGE.format(
        walk="\n".join(map(_stage, walk)),
        others=_wrapped("Where settings ask for them, or by name: ", others),
        using=_wrapped("From what is done, and run nothing else: ", using),
        settings=CONF_FOLDER / "run.yaml",
        experiments=_wrapped("experiment=NAME sets many; none sets none, else one of ", experiments),
    )


def _stage(name: str) -> str:
    """A stage and the first line of its file."""
    says = sys.modules[f"minitron.stages.{name}"].__doc__.partition("\n")[0]
    return fill(says, COLUMNS, initial_indent=f"  {name:<14} ", subsequent_indent=" " * 17)


def _wrapped(title: str, names: list[str]) -> str:
    return fill(title + ", ".join(names), COLUMNS, subsequent_indent="  ", break_on_hyphens=False)
