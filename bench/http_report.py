"""The loads of bench.http, what is measured of each, and the tables made of it."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.report import header, ratios, spread, table
from bench.texts import TextSet

__all__ = ["LIST", "LOADS", "Load", "Measured", "report"]

LIST = 32
"""Texts of a request with several."""


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    Attributes:
        clients: at a time.
        of: set of the texts.
        size: texts in a request.
        encoding: of the vectors.
    """

    clients: int
    of: str
    size: int
    encoding: str


LOADS: Mapping[str, Load] = {
    "one query at a time": Load(1, "queries", 1, "float"),
    "short queries": Load(32, "queries", 1, "float"),
    "mixed texts, float": Load(4, "mixed", LIST, "float"),
    "mixed texts, base64": Load(4, "mixed", LIST, "base64"),
}


@dataclass
class Measured:
    """Everything that the tables show.

    Attributes:
        absent: server -> why it does not run.
        first: server -> seconds to the first vector, of each start.
        idle: server -> CPU milliseconds a second with nothing to do.
        resident: server -> MB at the end.
        reference: whose vectors the servers' are compared with.
        cosines: (load, server) -> min cosine.
        numbers: (load, server) -> kind -> a number for each repeat; the server "" is our engine in process.
    """

    absent: dict[str, str] = field(default_factory=dict)
    first: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    idle: dict[str, float] = field(default_factory=dict)
    resident: dict[str, float] = field(default_factory=dict)
    reference: str = ""
    cosines: dict[tuple[str, str], float] = field(default_factory=dict)
    numbers: defaultdict[tuple[str, str], defaultdict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )


def report(measured: Measured, sets: Mapping[str, TextSet], ours: str, seconds: float, *, refined: bool) -> str:
    """The result as markdown.

    Args:
        measured: what was measured.
        sets: the texts.
        ours: name of our server.
        seconds: length of a load.
        refined: whether our shapes were refined.
    """
    repeats = len(measured.numbers["short queries", ours]["rate"])
    shapes = "refined by such texts before anything was timed" if refined else "its default ones"
    return "\n\n".join(
        [
            header("Servers over HTTP"),
            table(
                ["set", "texts", "tokens", "tokens a text: 0/5/50/95/100 %", "digest"],
                [sets[name].row() for name in ("queries", "mixed")],
            ),
            f"jaxembed's shapes: {shapes}.",
            table(
                ["server", "first vector, s: cold, then warm", "RSS MB at the end", "idle CPU ms/s"], starts(measured)
            ),
            f"Median (least-largest) of {repeats} repeats of {seconds:g} s; CPU milliseconds are over all cores.",
            table(
                [
                    "load",
                    "server",
                    "texts/s",
                    "p50 ms",
                    "p99 ms",
                    "server CPU ms a request",
                    "client CPU ms a request",
                    f"min cosine to {measured.reference}",
                ],
                loads(measured),
            ),
            *against(measured, ours),
            f"{ours} against its own engine in process, which gets the same texts, {LIST} a call (one query at a "
            "time: one), while no server works.",
            table(["load", "in process", "server / in process"], inside(measured, ours)),
            f"{ours}: one query at a time beside one client that sends {LIST} mixed texts a request, all the while.",
            table(["what", "value"], lone(measured, ours)),
        ]
    )


def against(measured: Measured, ours: str) -> list[str]:
    """The table of ratios and what it says; nothing where no other server runs."""
    others = peers(measured, ours)
    if not others:
        return []
    return [
        f"{ours} against the others, within a repeat: median (least-largest). Texts/s: over 1, {ours} is faster; "
        "p50: under 1, it is.",
        table(["load", "what", *(f"/ {name}" for name in others)], quotients(measured, ours)),
    ]


def peers(measured: Measured, ours: str) -> list[str]:
    """The other servers that run."""
    return [name for name in measured.idle if name != ours]


def starts(measured: Measured) -> list[list[str]]:
    """A line for each server."""
    rows = []
    for name, idle in measured.idle.items():
        first = ", ".join(f"{one:.1f}" for one in measured.first[name])
        rows.append([name, first, f"{measured.resident[name]:,.0f}", f"{idle:.0f}"])
    return rows + [[name, why, "-", "-"] for name, why in measured.absent.items()]


def loads(measured: Measured) -> list[list[str]]:
    """A line for each load of each server."""
    rows = []
    for load in LOADS:
        for name in measured.idle:
            of = measured.numbers[load, name]
            numbers = map(spread, (of[kind] for kind in ("rate", "p50", "p99", "server", "client")), (0, 1, 1, 2, 2))
            rows.append([f"{load} ({LOADS[load].clients})", name, *numbers, f"{measured.cosines[load, name]:.7f}"])
    return rows


def quotients(measured: Measured, ours: str) -> list[list[str]]:
    """A line for each load."""
    rows = []
    for load in LOADS:
        kind, what = ("p50", "p50") if load == "one query at a time" else ("rate", "texts/s")
        mine = measured.numbers[load, ours][kind]
        others = [ratios(mine, measured.numbers[load, name][kind]) for name in peers(measured, ours)]
        rows.append([load, what, *others])
    return rows


def inside(measured: Measured, ours: str) -> list[list[str]]:
    """A line for each load."""
    rows = []
    for load in LOADS:
        kind, unit, digits = ("p50", "ms", 2) if load == "one query at a time" else ("rate", "texts/s", 0)
        own = measured.numbers[load, ""][kind]
        rows.append([load, f"{spread(own, digits)} {unit}", ratios(measured.numbers[load, ours][kind], own)])
    return rows


def lone(measured: Measured, ours: str) -> list[list[str]]:
    """The lone query beside the bulk job."""
    idle = measured.numbers["one query at a time", ours]["p50"]
    of = measured.numbers["beside", ours]
    bound = [3 * one + dispatch for one, dispatch in zip(idle, of["dispatch"], strict=True)]
    return [
        ["query p50 with nothing else, ms", spread(idle, 1)],
        ["query p50 beside the bulk job, ms", spread(of["p50"], 1)],
        ["query p99 beside the bulk job, ms", spread(of["p99"], 1)],
        ["longest single dispatch in process, ms", spread(of["dispatch"], 1)],
        ["p99 / (3 x idle p50 + one dispatch)", ratios(of["p99"], bound)],
        ["bulk job, texts/s", spread(of["bulk"])],
    ]
