"""Records: written whole, read back, compared by their numbers only, shown as tables."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import faceadv
from faceadv import metrics, records
from faceadv.course import profiles
from faceadv.errors import Invalid, Missing
from faceadv.records import number


def write(path, value=0.9312345678, **run):
    numbers = [
        number("success", np.float32(value), 0.91, 0.95, n=np.int64(500), unit="%", how="bootstrap", paper=0.99),
        number("photos", 400, note="a | b"),
        number("not measured", None, paper="about 95"),
    ]
    return records.write(path, notebook="01_attacks", profile="orl", seed=0, numbers=numbers, data="ORL", **run)


def test_a_notebook_that_runs_elsewhere_writes_there_and_not_beside(tmp_path, monkeypatch):
    """As with papermill, typed by hand in any folder."""
    for path in profiles.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"):
        assert profiles.defaults(path)["results_dir"] == records.DEFAULT
    monkeypatch.chdir(tmp_path)
    assert records.place(records.DEFAULT, "orl", "01") == Path("build/results/orl/01.json")
    assert records.place("../mine", "orl", "01") == Path("../mine/orl/01.json")
    monkeypatch.chdir(profiles.NOTEBOOKS)
    assert records.place(records.DEFAULT, "orl", "01") == Path("../build/results/orl/01.json")


def test_round_trip(tmp_path):
    path = records.place(tmp_path, "orl", "01_attacks")
    record = write(path, device="cpu")
    assert records.read(path) == record
    assert path == tmp_path / "orl" / "01_attacks.json"
    assert list(record) == ["notebook", "profile", "seed", "data", "numbers", "run"]
    assert list(record["numbers"][0]) == ["name", "value", "low", "high", "n", "unit", "how", "paper", "note"]
    assert record["numbers"][0]["value"] == 0.931235
    assert record["run"]["versions"]["numpy"] == np.__version__
    assert record["run"]["versions"]["faceadv"] == faceadv.__version__
    assert list(path.parent.iterdir()) == [path]


def test_the_version_is_that_of_the_code_which_ran(tmp_path, monkeypatch):
    """What is installed may say another one: an editable installation keeps that of its day."""
    monkeypatch.setattr(records, "__version__", "9.9")
    assert write(tmp_path / "a.json")["run"]["versions"]["faceadv"] == "9.9"


def test_what_differs_from_run_to_run_is_apart(tmp_path):
    write(tmp_path / "a.json", device="cpu")
    write(tmp_path / "b.json", device="gpu", timings={"ms an image": 3.0})
    texts = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    assert texts[1]["run"]["timings"] == {"ms an image": 3.0}
    assert texts[0].pop("run") != texts[1].pop("run")
    assert json.dumps(texts[0]) == json.dumps(texts[1])


def test_the_device_is_the_one_that_was_used(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU that nothing ran on")
    assert write(tmp_path / "a.json")["run"]["device"] == "cpu"
    assert write(tmp_path / "a.json", device=torch.device("cuda", 0))["run"]["device"] == "cuda:0"


def test_an_interval_may_be_missing():
    assert number("one value", *metrics.bootstrap([1.0]))["low"] is None
    through_pandas = pd.DataFrame([{"low": None, "high": None}, {"low": 0.1, "high": 0.2}]).to_dict("records")[0]
    found = number("one value", 0.5, **through_pandas)
    assert (found["low"], found["high"]) == (None, None)
    assert records.table({"numbers": [found]})["ours [low, high]"].tolist() == ["0.5"]
    with pytest.raises(Invalid, match="value of it is nan"):
        number("it", float("nan"), 0.1, 0.2)
    with pytest.raises(TypeError, match="unti"):
        number("it", 1, unti="%")


def test_differences_are_of_numbers(tmp_path):
    a = write(tmp_path / "a.json")
    b = write(tmp_path / "b.json", value=0.9322)
    assert records.differences(a, tmp_path / "a.json") == []
    assert records.differences(a, b, rtol=0.002) == []
    assert records.differences(a, b) == ["value of success: 0.931235 and 0.9322"]
    assert records.differences(a, b, atol=0.002) == []
    assert records.differences(a, b, atol=0.0009) != []
    assert records.differences(a, {"numbers": a["numbers"][:2]}) == ["not measured is in one record only"]
    assert records.differences(a, {"numbers": [*a["numbers"][:2], number("not measured", 1)]}, rtol=1) == [
        "paper of not measured: 'about 95' and None",
        "value of not measured: None and 1",
    ]


def test_table_and_markdown(tmp_path):
    record, before = write(tmp_path / "a.json"), pd.get_option("display.max_colwidth")
    table = records.table(record)
    assert pd.get_option("display.max_colwidth") == before  # nothing else than the table is changed
    assert list(table.columns) == ["ours [low, high]", "paper", "unit", "n", "how", "note"]
    assert table.loc["success", "ours [low, high]"] == "0.9312 [0.91, 0.95]"
    assert table.loc["not measured"].tolist() == ["", "about 95", "", "", "", ""]
    chosen = records.table(record, {"photos": "How many"})
    assert (list(chosen.index), list(chosen.columns)) == (["How many"], ["ours [low, high]", "note"])
    assert records.markdown({"numbers": record["numbers"][1:2]}) == (
        "| number | ours [low, high] | note |\n| --- | --- | --- |\n| photos | 400 | a \\| b |\n"
    )
    with pytest.raises(ValueError, match=r"did you mean photos\?"):
        records.table(record, ["photo"])


def test_paper_lfw_and_here_stand_beside_one_another(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PROJECT", tmp_path)
    here = write(tmp_path / "orl.json")
    with pytest.raises(Missing):
        records.committed("lfw", "01_attacks")
    alone = records.beside(here, ["success"])
    assert list(alone.columns) == ["paper", "here"]
    write(records.place(tmp_path / "results", "lfw", "01_attacks"), value=0.5)
    assert records.committed("lfw", "01_attacks")["numbers"][0]["value"] == 0.5
    table = records.beside(here, {"success": "pairs flipped", "photos": "photos"}, {"success": "other people"}, 2)
    assert list(table.columns) == ["paper", "LFW", "here", "why they differ"]
    assert table.loc["pairs flipped", "LFW"] == "0.50 [0.91, 0.95]"
    assert table.loc["pairs flipped", "here"] == "0.93 [0.91, 0.95]"
    assert table.loc["pairs flipped", "why they differ"] == "other people"
    with pytest.raises(Invalid, match=r'no number "succes".*success'):
        records.beside(here, ["succes"])


def test_what_a_record_cannot_hold_is_refused_and_the_old_one_stays(tmp_path):
    path = tmp_path / "a.json"
    write(path)
    before = path.read_text()
    for numbers, told in (
        ([{"name": "psnr", "value": float("inf")}], "value of psnr is inf"),
        ([number("a", 1), number("a", 2)], "a came more than once"),
    ):
        with pytest.raises(ValueError, match=told):
            records.write(path, notebook="n", profile="orl", seed=0, numbers=numbers)
    with pytest.raises(TypeError):
        records.write(path, notebook="n", profile="orl", seed=0, numbers=[number("a", {1})])
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_no_record_is_told(tmp_path):
    (tmp_path / "a.json").write_text("<html>")
    with pytest.raises(ValueError, match=r"a\.json is not a record"):
        records.read(tmp_path / "a.json")
    with pytest.raises(Missing, match=r"no record .*03_b\.json: .* run faceadv run 03_b --profile lfw\.$"):
        records.read(records.place(tmp_path, "lfw", "03_b"))


def test_a_table_is_put_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n<!-- b -->\nb\n<!-- /b -->\n")
    for _ in range(2):
        records.insert(page, "a", "new\n")
    assert page.read_text() == "before\n<!-- a -->\nnew\n<!-- /a -->\nafter\n<!-- b -->\nb\n<!-- /b -->\n"
    before = page.read_bytes()
    with pytest.raises(ValueError, match="no line <!-- c --> with <!-- /c --> below it"):
        records.insert(page, "c", "new\n")
    assert page.read_bytes() == before
