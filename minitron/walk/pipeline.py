"""The walk: the stages that a setting asks for, each run once.

Asking for a stage runs what it needs first and reuses what is done, like make.
"""

import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minitron.machine import processes
from minitron.settings.run import CheckInputs, Settings
from minitron.walk.console import Console
from minitron.walk.integrity import SMALL_BYTES, named
from minitron.walk.laps import depth_lap, width_lap
from minitron.walk.need import nothing_to_cut
from minitron.walk.saved import save_settings
from minitron.walk.stage import Lap, StageContext, UsingStage
from minitron.walk.store import FORMAT, Result, check_format, damaged, discard, find_result, finish, locked, make_runs_folder, still_there
from minitron.walk.table import inputs_of, label_of, order_of, stage_folder, stage_of, stages, stored_stages, using_stages

MOST_TURNS = 4
MOST_CHECKED = {CheckInputs.auto: 2**30, CheckInputs.sizes: SMALL_BYTES, CheckInputs.full: float("inf")}  # bytes of an input's files


def run_pipeline(settings: Settings, console: Console) -> list[Lap]:
    """Run what is asked for, then write the run's summary and report; a stage that uses what is done takes the report's place. Gives what was walked."""
    asked = stages().get(settings.stage.value)
    uses = isinstance(asked, UsingStage)
    check_before_work(settings)
    if uses and asked.looks_ahead:
        asked.run(settings, [], console)
        return []
    if not uses:
        for stage in using_stages().values():
            stage.before(settings, console)
    if said := nothing_to_cut(settings):
        console.say(said)
        return []
    make_runs_folder(settings.runs_folder)
    if processes.rank() == 0:
        check_format(settings.runs_folder, (lambda _text: None) if uses else console.say)
        if not uses:
            save_settings(settings, console.say)
    laps = _laps(settings, console, uses=uses)
    if processes.rank() == 0:
        (asked if uses else stages()["report"]).run(settings, laps, console)
    return laps


def _laps(settings: Settings, console: Console, *, uses: bool) -> list[Lap]:
    """The walk, or what is done of it. A result that turns out not to be what was written is not done: the walk begins again, and comes by it again."""
    for _ in range(MOST_TURNS):
        try:
            return _walk(settings, console, uses=uses)
        except DamagedInput as found:
            console.say(str(found))
    raise RuntimeError(f"{settings.runs_folder}/store: what is written there is read back otherwise, {MOST_TURNS} times now; the disk or the memory fails")


def _walk(settings: Settings, console: Console, *, uses: bool) -> list[Lap]:
    walk = finished_stages if uses else partial(run_stages, asked=settings)
    first = depth_lap(settings)
    if first is None:
        laps = [walk(settings, console)]
    else:
        say = (lambda _text: None) if uses else console.say
        say("first lap: depth")
        laps = [walk(first, console)]
        if "distill" in laps[0].results:
            say("second lap: widths")
            student = laps[0].results["distill"]
            laps.append(walk(width_lap(settings, student), console, {"base": student}))
    return laps


def check_before_work(settings: Settings) -> None:
    """Everything that the stages to run refuse from settings and config.json alone, the one that was asked for first, and what was launched otherwise than
    this machine is made. Raises ValueError."""
    processes.check_this_launch(settings.device)
    asked = stages().get(settings.stage.value)
    needed = [] if isinstance(asked, UsingStage) else order_of(settings)
    for stage in [asked] * (asked is not None) + [stages()[name] for name in needed if stages()[name] is not asked]:
        stage.check(settings)


def check_rows(settings: Settings, rows: int, told: str) -> None:
    """What the stages to run refuse of so many train rows. Raises ValueError."""
    for name in order_of(settings):
        stored_stages()[name].check_rows(settings, rows, told)


def run_stages(settings: Settings, console: Console, given: Mapping[str, Result] = MappingProxyType({}), *, asked: Settings | None = None) -> Lap:
    """Everything that `settings.stage` needs, and itself; what is `given` is there already. `asked`: the whole run's settings, of which these are a lap's."""
    lap = Lap(settings, dict(given), dict.fromkeys(given, True))
    for name in order_of(settings):
        if name in given:
            continue
        for one in _settings_of(name, lap):
            label = label_of(name, one)
            lap.results[label], lap.cached[label] = run_stage(name, one, lap.results, console)
        if name == "data":
            check_rows(asked or settings, lap.results[name].facts["train_rows"], "only")
        each = stored_stages()[name].per_candidate
        if each and settings.candidate is None:
            for label, result in _others(name, lap).items():
                lap.results[label], lap.cached[label] = result, True
        elif each and lap.cached[label] and processes.rank() == 0:
            each.on_found(lap, lap.results[label])
    return lap


def _settings_of(name: str, lap: Lap) -> list[Settings]:
    """Settings for every time that a stage is to run."""
    each = stored_stages()[name].per_candidate
    if each is None or lap.settings.candidate is not None:
        return [lap.settings]
    return [replace(lap.settings, candidate=candidate) for candidate in each.wanted(lap)]


def _others(name: str, lap: Lap) -> dict[str, Result]:
    """Results of candidates that nobody asked for, but that are there all the same, from a sweep: they count too."""
    found = {}
    for candidate in stored_stages()[name].per_candidate.also(lap):
        one = replace(lap.settings, candidate=candidate)
        result = find_result(stage_folder(name, one, lap.results))
        if result is not None:
            found[label_of(name, one)] = result
    return processes.from_first(found)


def finished_stages(settings: Settings, console: Console, given: Mapping[str, Result] = MappingProxyType({})) -> Lap:
    """What is already done under these settings."""
    lap = Lap(settings, dict(given), {})
    for name in order_of(settings):
        if name in given or not set(stored_stages()[name].needs(settings)) <= {stage_of(label) for label in lap.results}:
            continue
        for one in _settings_of(name, lap):
            folder = stage_folder(name, one, lap.results)
            found = find_result(folder)
            if found is None and (bad := damaged(folder)):
                console.say(f"{name}: {folder}: {bad}; it is not used, and stage={name} makes it again")
            if found is not None:
                lap.results[label_of(name, one)] = found
        if stored_stages()[name].per_candidate:
            lap.results.update(_others(name, lap))
    lap.cached.update(dict.fromkeys(lap.results, True))
    return lap


def finished_laps(settings: Settings) -> list[Lap]:
    """What of each lap is already done under these settings; one lap where its student is not there to go on from."""
    quiet, first = Console(quiet=True), depth_lap(settings)
    laps = [finished_stages(first or settings, quiet)]
    if first is not None and "distill" in laps[0].results:
        student = laps[0].results["distill"]
        laps.append(finished_stages(width_lap(settings, student), quiet, {"base": student}))
    return laps


def run_stage(name: str, settings: Settings, results: Mapping[str, Result], console: Console) -> tuple[Result, bool]:
    """The stage's result and whether it was already there. Raises DamagedInput where what it would read is not what was written."""
    folder = stage_folder(name, settings, results)
    found = processes.from_first(find_result(folder))
    if found is not None:
        console.headline(name, f"{found.facts['headline']} (already done)")
        return found, True
    if processes.rank() > 0:
        if (found := processes.from_first(None)) is not None:
            return found, True
        _check_inputs(name, settings, results, console)
        if stored_stages()[name].parallel:
            _run(name, settings, folder, results, console)
        return processes.from_first(None), False
    with locked(folder, console.say):
        found = processes.from_first(find_result(folder))  # another run may have finished it meanwhile
        if found is not None:
            console.headline(name, f"{found.facts['headline']} (done by another run)")
            return found, True
        if bad := damaged(folder):
            console.headline(name, f"{folder}: {bad}; it is done again")
            discard(folder)
        _check_inputs(name, settings, results, console)
        folder.mkdir(parents=True, exist_ok=True)
        with named(folder):
            with still_there(folder):
                record = _run(name, settings, folder, results, console)
            result = finish(folder, record)
    console.headline(name, f"{result.facts['headline']} ({result.record['seconds']:,.0f} s)")
    return processes.from_first(result), False


class DamagedInput(Exception):
    """What a stage was to read is not what was written; it has been taken away."""


def _check_inputs(name: str, settings: Settings, results: Mapping[str, Result], console: Console) -> None:
    """Hold what a stage will read against what was written, as far as settings.check_inputs says. Raises DamagedInput in all processes, once the first
    has taken away what is damaged."""
    said = None
    if processes.rank() == 0:
        for label, result in inputs_of(name, settings, results).items():
            most = MOST_CHECKED[settings.check_inputs]
            if bad := damaged(result.folder, most):
                with locked(result.folder, console.say):
                    if damaged(result.folder, most):  # and no other run has made it anew
                        discard(result.folder)
                said = f"{stage_of(label)}: {result.folder}: {bad}; it is done again"
                break
    said = processes.from_first(said)
    if said:
        raise DamagedInput(said)


def _run(name: str, settings: Settings, folder: Path, results: Mapping[str, Result], console: Console) -> dict[str, Any]:
    """Do the stage's work; gives the record for done.json."""
    stage, inputs = stored_stages()[name], inputs_of(name, settings, results)
    forget_peak()
    started = time.monotonic()
    facts = stage.run(StageContext(settings, folder, inputs, console))
    if "torch" in sys.modules:
        from minitron.machine.device import let_go

        let_go()
    return {
        "format": FORMAT,
        "stage": name,
        "key": folder.name,
        "version": stage.version,
        "settings": stage.what(settings),
        "inputs": stage.of_inputs(settings, inputs),
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "facts": facts,
    }


def forget_peak() -> None:
    """Let the highest resident memory be counted anew from here on, where the system can (Linux)."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far, in bytes, or since it was forgotten."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
