"""The times of the recognisers are taken, and docs/measured.md shows their record."""

import pytest

from faceadv import records
from faceadv.store.paths import PROJECT


@pytest.fixture(scope="module")
def benchmark(script):
    return script("recognisers")


def test_each_recogniser_is_timed_and_shown(benchmark, tmp_path):
    record = benchmark.measure(chips=2, repeats=2, path=tmp_path / "recognisers.json")
    taken = {entry["name"]: entry for entry in record["numbers"]}
    for name in ("dlib", "mobilefacenet", "mobilenet-vggface2"):
        forward, gradient = (taken[f"{name}: {work}, float32"] for work in ("forward", "gradient"))
        assert 0 < forward["low"] <= forward["value"] <= forward["high"]
        assert forward["low"] < gradient["high"]
    lfw = {"numbers": [records.number("LFW View 2, dlib: accuracy", 98.5, 98.0, 99.0, unit="%")]}
    shown = benchmark.table(record, lfw)
    assert "98.50 % [98.00, 99.00]" in next(line for line in shown.splitlines() if line.startswith("| `dlib` | 5.6 |"))
    assert len({line.count("|") for line in shown.splitlines()}) == 1


def test_the_readme_shows_the_record(benchmark):
    shown = benchmark.table(records.read(benchmark.RECORD), records.read(benchmark.LFW))
    assert f"<!-- recognisers -->\n{shown}<!-- /recognisers -->\n" in (PROJECT / "docs" / "measured.md").read_text(
        encoding="utf-8"
    )
