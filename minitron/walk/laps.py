"""The published two laps: depth is cut and distilled first, then widths are cut from that checkpoint (N2, arXiv 2508.14444).

Both go through the same stages; only their settings differ, and these two functions say how.
"""

from dataclasses import replace

from minitron.settings.derived import axis_of, couplings_of, given_widths
from minitron.settings.reasoning import ReasoningSettings
from minitron.settings.run import BaseSettings, Settings, Stage
from minitron.settings.search import AxisSettings, FixedSettings, LaterWidthsSettings
from minitron.settings.teachers import teacher_architecture
from minitron.walk.stage import StoredStage, UsingStage
from minitron.walk.store import Result
from minitron.walk.table import stages
from nas.axes import AXES, WIDTHS
from nas.couplings import completed, following

LATER = ("hidden", "ffn", "mamba_heads")  # axes that the second lap may cut
LATER_WHERE_ASKED = ("key_value_heads", "experts", "expert_ffn", "shared_ffn")  # and those that it may where they are; with KV heads query heads go


def depth_lap(settings: Settings) -> Settings | None:
    """The first lap's settings: depth alone, held against the smallest widths that the second may choose; None for a walk of one lap.

    A stage may declare that the walk to it has one lap: a search from config.json alone looks at depth and widths in one.
    """
    asked = stages().get(settings.stage.value)
    if not settings.depth_lap.enabled or (isinstance(asked, StoredStage) and asked.in_one_lap(settings)):
        return None
    search, fixed, teacher = settings.search, settings.search.fixed, teacher_architecture(settings)
    later = {AXES[name].field: axis_of(settings, name, teacher)[0] for name in LATER}
    asked_for = {AXES[name].field: axis_of(settings, name, teacher)[0] for name in LATER_WHERE_ASKED}
    later |= {field: fewest for field, fewest in asked_for.items() if fewest < getattr(teacher, field)}
    follows = following(couplings_of(teacher), given_widths(settings) & later.keys())
    narrowest = completed(replace(teacher, **later), teacher, follows)
    later |= {field: size for field in follows if (size := getattr(narrowest, field))}
    depths = len(axis_of(settings, "layers", teacher))
    search = replace(
        search, **dict.fromkeys(WIDTHS.values(), AxisSettings()), shortlist_size=max(2, depths), finalists=depths,
        fixed=FixedSettings(pattern=fixed.pattern, num_layers=fixed.num_layers, file=fixed.file), later_widths=LaterWidthsSettings(**later),
        max_parameters=None, max_active_parameters=None, min_gib=None, max_gib=None, min_tokens_per_second=None,
    )  # fmt: skip
    screen = replace(settings.screen, train=replace(settings.screen.train, tokens=settings.depth_lap.screen_tokens))
    distill = replace(settings.distill, phases=[], train=replace(settings.distill.train, tokens=settings.depth_lap.tokens))
    stays = isinstance(asked, UsingStage) or (asked is not None and asked.ends_first_lap)
    stage = settings.stage if stays else Stage.distill
    return replace(settings, stage=stage, candidate=None, search=search, screen=screen, distill=distill, reasoning=ReasoningSettings())


def width_lap(settings: Settings, depth_student: Result) -> Settings:
    """The second lap's settings: widths alone, cut from the first lap's student; the teacher still teaches."""
    search = replace(settings.search, layers=AxisSettings(), layer_order=None, floors={}, fixed=replace(settings.search.fixed, pattern=None, num_layers=None))
    scoring = replace(settings.scoring, protect=[], ceilings={})
    return replace(settings, base=BaseSettings(path=str(depth_student.model_folder)), search=search, scoring=scoring)
