"""The README's scoreboard: what each paper claims, and what our records say. `python docs/scoreboard.py` writes it.

Verdicts are computed: docs/claims.yaml says which intervals of which record must lie where.
"""

import re
from pathlib import Path

import yaml

from faceadv import records
from faceadv.store.paths import PROJECT

HEAD = "| paper | claim | the paper | here | verdict |\n|---|---|---|---|---|\n"
MARKS = "<!-- scoreboard -->\n", "<!-- /scoreboard -->"
SIGNS = {"confirmed": "✔ confirmed", "partly": "◐ partly", "not confirmed": "✘ not confirmed"}


def numbers(record: str) -> dict[str, dict]:
    """The numbers of a record by their names."""
    return {entry["name"]: entry for entry in records.read(PROJECT / "results" / f"{record}.json")["numbers"]}


def words(entry: dict) -> str:
    """A number with its interval; two digits after the point if it is small."""
    digits = 1 if max(abs(entry[key]) for key in ("value", "low", "high")) > 2 else 2
    return "{value:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(**entry, d=digits).replace("-", "−")


def holds(rule: str, known: dict[str, dict]) -> bool:
    """Whether "NAME > X", "NAME < X" or "NAME >= X" is true; X is a number or another name."""
    name, sign, other = re.fullmatch(r"(.+) (>=|>|<) (.+)", rule).groups()
    mine, bound = known[name], known.get(other)
    low, high = (bound["low"], bound["high"]) if bound else (float(other), float(other))
    return {">": mine["low"] > high, "<": mine["high"] < low, ">=": mine["high"] >= low}[sign]


def verdict(claim: dict) -> str:
    """Confirmed if all its rules hold, partly if some do, else not confirmed, or what the claim says for that.

    Without rules it was not tested.
    """
    known = numbers(claim["record"])
    found = [holds(rule, known) for rule in claim["holds"]]
    if not found:
        return "not tested"
    missed = claim.get("otherwise", "not confirmed")
    return "confirmed" if all(found) else "partly" if any(found) and "otherwise" not in claim else missed


def table() -> str:
    """The scoreboard in Markdown."""
    claims, rows, last = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8")), [], ""
    for claim in claims:
        known = numbers(claim["record"])
        ours = re.sub(r"\{(.+?)\}", lambda match, known=known: words(known[match[1]]), claim["ours"])
        name = claim.get("notebook", claim["record"].split("/")[1])
        judged = verdict(claim)
        said = f"**{SIGNS.get(judged, judged)}** ([{name[:2]}](notebooks/{name}.ipynb))"
        paper, last = "" if claim["paper"] == last else claim["paper"], claim["paper"]
        rows.append(f"| {paper} | {claim['claim']} | {claim['theirs']} | {ours} ({claim['data']}) | {said} |")
    return HEAD + "\n".join(rows) + "\n"


def main() -> None:
    """Write it into the README, between its two marks."""
    path = PROJECT / "README.md"
    before, rest = path.read_text(encoding="utf-8").split(MARKS[0])
    path.write_text(before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1], encoding="utf-8")


if __name__ == "__main__":
    main()
