"""From stored rows to verdicts and tables. Thresholds are applied here, so that rows need not be measured again for one."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_MEGABYTES = 200

Row = Mapping[str, Any]


def failures(row: Row) -> list[str]:
    """Everything that keeps a model from being covered, in the order in which it is tried; empty if it is covered."""
    ours = row["facts"]
    if ended := ours.get("ended"):
        return [ended]
    for step in ("build", "export", "trace", "plan", "apply", "run"):
        if error := ours.get(f"{step}_error"):
            return [f"{step}: {error}"]
    found = []
    if not ours["same_shapes"]:
        found.append("run: outputs have other shapes")
    for step in ("check", "onnx", "train"):
        if error := ours.get(f"{step}_error"):
            dense = " (the dense model fails, too)" if f"dense_{step}_error" in ours else ""
            found.append(f"{step}: {error}{dense}")
    if not _is_close(ours):
        more = (
            f" ({ours['difference_eval']:.1e} in eval form; {ours['difference_float64']:.1e} in float64)"
            if "difference_float64" in ours
            else ""
        )
        found.append(f"check: masked and cut differ by {ours['difference']:.1e}{more}")
    if not ours.get("onnx_difference", 0) < 1e-3:
        found.append(f"onnx: differs by {ours['onnx_difference']:.1e}")
    if not ours.get("finite", True):
        found.append("train: not finite")
    if not ours.get("reached", ours.get("changed", 1)) >= 0.5:
        found.append(f"train: only {ours.get('reached', ours.get('changed')):.0%} of the parameters have a gradient")
    if ours["prunable"] < 0.9:
        found.append(f"prunable: {ours['prunable']:.1%}{_reason(ours)}")
    if ours["removed"] < 0.5:
        found.append(f"removed: {ours['removed']:.1%}")
    if ours["off_width_count"]:
        found.append(f"widths: {ours['off_width_count']} groups are off")
    return found


def _is_close(ours: Row) -> bool:
    """Whether cut and masked model agree: in float32, or in eval form where float64 shows that train form does, too."""
    if ours.get("difference", 0) < 1e-4:
        return True
    return bool(ours.get("difference_eval", 1) < 1e-4 and ours.get("difference_float64", 1) < 1e-9)


def _reason(ours: Row) -> str:
    frozen = ours.get("frozen") or []
    return f" ({frozen[0]['op']}: {frozen[0]['reason']})" if frozen else ""


def export_s(row: Row) -> float | None:
    """Seconds of torch.export, the smallest of all rounds."""
    return _least(row["ours"], lambda facts: facts["export"]["s"], "export")


def after_export_s(row: Row) -> float | None:
    """Seconds of edgeprune's own part of `trace` and of `uniform_plan`, the smallest of all rounds."""
    return _least(
        row["ours"], lambda facts: facts["trace"]["s"] - facts["export"]["s"] + facts["plan"]["s"], "trace", "plan"
    )


def whole_s(row: Row) -> float | None:
    """Seconds of export, trace, plan and cut, the smallest of all rounds."""
    return _least(
        row["ours"],
        lambda facts: sum(facts[step]["s"] for step in ("trace", "plan", "apply")),
        "trace",
        "plan",
        "apply",
    )


def peer_s(row: Row) -> float | None:
    """Seconds of Torch-Pruning's constructor and step, the smallest of all rounds."""
    return _least(row["peer"], lambda facts: facts["construct"]["s"] + facts["step"]["s"], "construct", "step")


def _least(rounds: Sequence[Row], seconds: Any, *steps: str) -> float | None:
    done = [seconds(facts) for facts in rounds if all(step in facts for step in steps)]
    return min(done) if done else None


def extra_mb(row: Row) -> float | None:
    """Peak memory of export, trace and plan over what the process had with the model, MB."""
    facts = row["facts"]
    if "plan" not in facts:
        return None
    peak = max(facts[step]["peak_mb"] for step in ("export", "trace", "plan"))
    return float(peak - facts["trace"]["before_mb"])


def in_time(row: Row) -> bool:
    """Whether the part after the export takes at most twice the export or a second."""
    export, after = export_s(row), after_export_s(row)
    return export is not None and after is not None and after <= max(2 * export, 1.0)


def peer_result(row: Row) -> str:
    """What became of the model on the other side; ``""`` where it had no turn yet."""
    if not row["peer"]:
        return ""
    facts = row["peer"][0]
    if ended := facts.get("ended"):
        return str(ended)
    for step in ("build", "find_last", "construct", "step", "run"):
        if error := facts.get(f"{step}_error"):
            return f"{step}: {error}"
    return "runs"


def _peer_cell(row: Row) -> str:
    result = peer_result(row)
    return f"runs, {row['peer'][0]['removed']:.1%} removed" if result == "runs" else _short(result)


def markdown(names: Sequence[str], rows: Mapping[str, Row]) -> str:
    """One table line per model that was measured, and a summary."""
    head = [
        "model",
        "M parameters",
        "covered",
        "groups",
        "prunable",
        "removed",
        "masked - cut",
        "comes back as",
        "export s",
    ]
    head += ["after export s", "extra MB", "all s", "peer s", "peer"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    notes = []
    for name in names:
        if name in rows:
            lines.append("| " + " | ".join(_cells(name, rows[name])) + " |")
            notes += [f"- `{name}`: {_short(reason)}" for reason in failures(rows[name])]
    done = [rows[name] for name in names if name in rows]
    parts = ["\n".join(lines)]
    if notes:
        parts.append("Not covered, and why:\n\n" + "\n".join(notes))
    if done:
        parts.append("\n".join(_summary(done)))
    return "\n\n".join(parts)


def _cells(name: str, row: Row) -> list[str]:
    ours = row["facts"]
    parameters = ours.get("parameters")
    return [
        name,
        f"{parameters / 1e6:.1f}" if parameters else "-",
        "yes" if not failures(row) else "NO",
        str(ours.get("groups", "-")),
        _percent(ours.get("prunable")),
        _percent(ours.get("removed")),
        f"{ours['difference']:.0e}" if "difference" in ours else "-",
        ours.get("kind", "-"),
        _seconds(export_s(row)),
        _seconds(after_export_s(row)) + (" !" if after_export_s(row) is not None and not in_time(row) else ""),
        f"{extra_mb(row):.0f}" if extra_mb(row) is not None else "-",
        _seconds(whole_s(row)),
        _seconds(peer_s(row)),
        _peer_cell(row),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"


def _short(text: str, width: int = 160) -> str:
    plain = " ".join(text.split()).replace("|", "/")
    return plain if len(plain) <= width else plain[: width - 3] + "..."


def _summary(rows: Sequence[Row]) -> list[str]:
    count = len(rows)
    covered = [row for row in rows if not failures(row)]
    removed = [row["facts"]["removed"] for row in rows if "removed" in row["facts"]]
    traced = [row for row in rows if after_export_s(row) is not None]
    peers = [peer_result(row) for row in rows if row["peer"]]
    runs = peers.count("runs")
    both = [(whole_s(row), peer_s(row)) for row in rows]
    faster = [(ours, peer) for ours, peer in both if ours is not None and peer is not None]
    lines = [f"{len(covered)} of {count} covered ({len(covered) / count:.1%})."]
    if peers:
        lines.append(f"The peer's cut model runs for {runs} of {len(peers)} ({runs / len(peers):.1%}).")
    if removed:
        lines.append(f"Parameters removed, median: {statistics.median(removed):.1%}.")
    if traced:
        slow = sum(not in_time(row) for row in traced)
        large = sum((extra_mb(row) or 0) >= _MEGABYTES for row in traced)
        after = [after_export_s(row) or 0.0 for row in traced]
        lines.append(
            f"After export: median {statistics.median(after):.2f} s, longest {max(after):.2f} s; {slow} of {len(traced)} take "
            f"more than twice the export and more than 1 s; {large} need {_MEGABYTES} MB or more."
        )
    if faster:
        ahead = sum(ours < peer for ours, peer in faster)
        lines.append(
            f"Where both get to a cut model ({len(faster)}): {sum(ours for ours, _ in faster):.0f} s with the export against "
            f"{sum(peer for _, peer in faster):.0f} s of the peer; less time in {ahead}."
        )
    packages = Counter(row["package"] for row in rows)
    if len(packages) > 1:
        lines.append(f"CAUTION: rows come from {len(packages)} different states of the package: {dict(packages)}.")
    return lines
