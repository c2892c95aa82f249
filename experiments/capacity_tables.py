"""What `capacity` found, as tables: requests/s, LayerKV's over the best paged baseline's, and what to mind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.capacity_places import Site
from experiments.capacity_runs import Capacity
from experiments.objectives import ALL, PAPER
from experiments.tables import format_table, rounded
from experiments.tuning import LAYERKV, LAYERKV_SJF, PAGED, PARK, POLICIES

TARGETS = (PAPER, ALL)


@dataclass(frozen=True)
class Row:
    """A capacity, and what it is of."""

    part: str
    site: Site
    policy: str
    target: str  # objectives that the settings were chosen for
    objectives: str  # that were judged
    scale: float
    level: float
    found: Capacity

    @property
    def family(self) -> str:
        """The workloads."""
        return self.site.place.family.name

    def record(self) -> dict[str, Any]:
        """Plain JSON types."""
        place, found = self.site.place, self.found
        return {
            "part": self.part, "family": self.family, "device": place.device, "tensor": place.tensor,
            "fraction": place.fraction, "host_gb": place.host_gb, "requests": self.site.num_requests,
            "policy": self.policy, "tuned_for": self.target, "objectives": self.objectives, "scale": self.scale,
            "level": self.level, "rate": found.rate, "load": rounded(found.rate / self.site.base_rate),
            "bounded": found.bounded, "crossings": found.crossings, "tried": found.tried,
        }  # fmt: skip


def ratio(rows: Iterable[Row], policy: str, others: Sequence[str]) -> float | None:
    """Capacity of a policy over the best of others', of rows that differ in the policy only. None: nobody has any; inf:
    the others have none."""
    rates = {row.policy: row.found.rate for row in rows}
    ours, theirs = rates[policy], max(rates[other] for other in others)
    return ours / theirs if theirs else (float("inf") if ours else None)


def picked(rows: Iterable[Row], **what: Any) -> list[Row]:
    """Rows whose attributes are these."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in what.items())]


def best(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By family and objectives: LayerKV over the best paged baseline at scale 1, 90%."""
    curves = picked(rows, part="curves", scale=1, level=0.9)
    return {
        family: {t: rounded(ratio(picked(curves, family=family, target=t), LAYERKV, PAGED)) for t in TARGETS}
        for family in dict.fromkeys(row.family for row in curves)
    }


def tables(rows: Sequence[Row], log: Sequence[dict[str, Any]]) -> str:
    """All of them."""
    parts = [_search_table(log, family) for family in dict.fromkeys(line["family"] for line in log)]
    for family in dict.fromkeys(row.family for row in rows):
        parts += [_curve_table(picked(rows, part="curves", family=family, target=t)) for t in TARGETS]
        parts.append(_alone_table(picked(rows, part="alone", family=family)))
    parts.append(_length_table(picked(rows, part="length")))
    parts += [_map_table(picked(rows, part="map", objectives=t), LAYERKV, PAGED) for t in TARGETS]
    parts.append(_map_table(picked(rows, part="map", objectives=PAPER), LAYERKV, (PARK,)))
    parts.append(_notes(rows))
    return "\n\n".join(part for part in parts if part)


def _search_table(log: Sequence[dict[str, Any]], family: str) -> str:
    """Defaults against what was chosen, on the seed that was tuned on."""
    lines = []
    for policy in POLICIES:
        own = [line for line in log if (line["family"], line["policy"]) == (family, policy)]
        row: list[Any] = [policy, len(own)]
        settings = []
        for target in TARGETS:
            winner = next(line for line in own if target in line["chosen_for"])
            row += [f"{own[0]['capacity'][target]:.3g}", f"{winner['capacity'][target]:.3g}"]
            settings.append(winner["settings"] or "defaults")
        lines.append([*row, *settings])
    header = ["policy", "trials"]
    for target in TARGETS:
        header += [f"{target}: defaults", "tuned"]
    return f"tuning, {family}, requests/s\n{format_table([*header, *(f'settings for {t}' for t in TARGETS)], lines)}"


def _curve_table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    columns = list(dict.fromkeys((row.level, row.scale) for row in sorted(rows, key=lambda r: (r.level, r.scale))))
    header = ["policy", *(f"x{scale:g} {level:.0%}" for level, scale in columns)]
    title = f"capacity, {rows[0].family}, {rows[0].objectives}, requests/s"
    return _with_ratios(title, header, rows, lambda row: (row.level, row.scale), columns)


def _alone_table(rows: Sequence[Row]) -> str:
    """Each objective alone, at scale 1."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(row.objectives for row in rows))
    title = f"each objective alone, {rows[0].family}, scale 1, 90%, settings for {PAPER}, requests/s"
    return _with_ratios(title, ["policy", *columns], rows, lambda row: row.objectives, columns)


def _length_table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    columns = list(dict.fromkeys(row.site.num_requests for row in rows))
    title = f"runs of other lengths, {rows[0].family}, {PAPER}, scale 1, 90%, requests/s; the second half is judged"
    header = ["policy", *(f"{num} requests" for num in columns)]
    return _with_ratios(title, header, rows, lambda row: row.site.num_requests, columns)


def _with_ratios(title: str, header: list[str], rows: Sequence[Row], column_of: Any, columns: Sequence[Any]) -> str:
    """A line per policy; then LayerKV over the best paged baseline, and over whole requests parked."""
    by_column = {column: [row for row in rows if column_of(row) == column] for column in columns}
    policies = list(dict.fromkeys(row.policy for row in rows))
    lines = [[p, *(_cell(next(r for r in by_column[c] if r.policy == p)) for c in columns)] for p in policies]
    for policy in (LAYERKV, LAYERKV_SJF):
        for name, others in (("best paged", PAGED), (PARK, (PARK,))):
            if policy in policies and not (policy == LAYERKV_SJF and others != PAGED):
                found = [ratio(by_column[c], policy, others) for c in columns]
                lines.append([f"{policy} / {name}", *map(_times, found)])
    return f"{title}\n{format_table(header, lines)}"


def _map_table(rows: Sequence[Row], policy: str, others: Sequence[str]) -> str:
    if not rows:
        return ""
    hosts = sorted({row.site.place.host_gb for row in rows})
    places = dict.fromkeys((r.site.place.device, r.site.place.tensor, r.site.place.fraction) for r in rows)
    lines = []
    for place in places:
        here = [r for r in rows if (r.site.place.device, r.site.place.tensor, r.site.place.fraction) == place]
        rates = {r.policy: r.found.rate for r in here if r.site.place.host_gb == hosts[-1]}
        top = max(others, key=lambda name: rates[name])
        found = [_times(ratio([r for r in here if r.site.place.host_gb == host], policy, others)) for host in hosts]
        device, tensor, fraction = place
        lines.append([device, tensor, fraction, here[0].site.holds, rates[top], top, "1", *found])
    header = ["device", "tensor", "pool", "holds", "best, requests/s", "which", "0 GB", *(f"{h} GB" for h in hosts)]
    name = "best paged" if len(others) > 1 else others[0]
    return f"{policy} / {name}, {rows[0].family}, {rows[0].objectives}, scale 1, 90%\n{format_table(header, lines)}"


def _notes(rows: Sequence[Row]) -> str:
    """Where bisection stands on less firm ground."""
    crossed = [row for row in rows if row.found.crossings]
    unbounded = [row for row in rows if not row.found.bounded]
    lines = [f"{len(crossed)} of {len(rows)} curves are not monotone where they were looked at (marked ~)"]
    for row in crossed[:20]:
        place = row.site.place
        lines.append(
            f"  {row.part}, {row.family}, {place.device} x{place.tensor}, {row.policy}, {row.objectives}, "
            f"x{row.scale:g}, {row.level:.0%}: "
            + "; ".join(f"{a:.3g} fails, {b:.3g} passes" for a, b in row.found.crossings)
        )
    if len(crossed) > 20:
        lines.append(f"  and {len(crossed) - 20} more, in capacity.json")
    lines.append(f"{len(unbounded)} end at the highest rate that is tried (marked >)")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    """A rate: `-` none, `>` at least, `~` not monotone."""
    if not row.found.rate:
        return "-"
    return f"{'' if row.found.bounded else '>'}{row.found.rate:.3g}{'~' if row.found.crossings else ''}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
