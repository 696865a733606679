"""Planned against taken, as the report's page shows it."""

from collections.abc import Iterator, Mapping
from typing import Any

from memory_budget.units import format_gib
from minitron.report.text import Summary, duration, quoted, table


def plan_blocks(summary: Summary) -> Iterator[str]:
    """A heading, the whole in a sentence, and a table of the stages; nothing where nothing was planned."""
    plan = summary.get("plan")
    if not plan or not (rows := list(_rows(plan))):
        return
    yield "## Planned and taken"
    planned, taken = plan["seconds"]["planned"], plan["seconds"]["taken"]
    said = "Nobody knew how long it takes on this device" if planned is None else f"About {duration(planned)} were planned for {quoted(plan['device'])}"
    yield f"{said}; the stages that are done took {duration(taken)}. Memory is a process's, disk what stays."
    yield table(("stage", "time planned", "taken", "memory planned", "taken", "disk planned", "taken"), rows)


def _rows(plan: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for lap, stages in (("first lap, ", plan["depth_lap"]), ("second lap, " if plan["depth_lap"] else "", plan["stages"])):
        for name, both in stages.items():
            cells = []
            for kind, shown in (("seconds", duration), ("memory_bytes", format_gib), ("disk_bytes", format_gib)):
                cells += ["–" if side is None or side[kind] is None else shown(side[kind]) for side in (both["planned"], both["taken"])]
            yield (f"{lap}{quoted(name)}", *cells)
