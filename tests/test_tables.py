"""The benchmark's long table is as its dictionary says, and the leaderboard has what the records say."""

import importlib.util
import json

import pandas as pd
import pytest

from faceadv import cli, records
from faceadv.benchmark import grid, statistics, tables
from faceadv.store.paths import PROJECT

spec = importlib.util.spec_from_file_location("leaderboard", PROJECT / "docs" / "leaderboard.py")
leaderboard = importlib.util.module_from_spec(spec)
spec.loader.exec_module(leaderboard)


@pytest.fixture(scope="module")
def shipped():
    return [records.committed(profile, grid.NOTEBOOK) for profile in ("lfw", "orl")]


def test_both_files_are_as_the_dictionary_says(shipped, tmp_path):
    csv, parquet, package = tables.write(shipped, tmp_path / "tables")
    told = json.loads(package.read_text(encoding="utf-8"))
    assert [resource["path"] for resource in told["resources"]] == [csv.name, parquet.name]
    schema = told["resources"][0]["schema"]
    table = pd.read_parquet(parquet)
    pd.testing.assert_frame_equal(pd.read_csv(csv, keep_default_na=False), table, check_dtype=False)
    assert list(table) == [field["name"] for field in schema["fields"]]
    kinds = {"string": pd.api.types.is_string_dtype, "number": pd.api.types.is_float_dtype}
    kinds["integer"] = pd.api.types.is_integer_dtype
    for field in schema["fields"]:
        column, bounds = table[field["name"]], field.get("constraints", {})
        assert field["description"]
        assert kinds[field["type"]](column), field["name"]
        assert column.notna().all()
        assert set(column) <= set(bounds.get("enum", column))
        if "minimum" in bounds:
            assert column.between(bounds["minimum"], bounds.get("maximum", column.max())).all()
    assert not table.duplicated(schema["primaryKey"]).any()
    assert (table["low"] <= table["right"] + 1e-9).all()
    assert (table["right"] <= table["high"] + 1e-9).all()
    assert len(table) == sum(len(statistics.lines(record)) for record in shipped) > 100


def test_no_records_make_an_empty_table():
    assert list(tables.long([])) == list(tables.COLUMNS)


def test_the_command_writes_the_tables_and_compares_records(shipped, tmp_path, capsys):
    assert cli.main(["bench", "--tables", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / name) for name in ("benchmark.csv", "benchmark.parquet", "datapackage.json")
    ]
    mine = tmp_path / "mine.json"
    record = json.loads(records.place(PROJECT / "results", "orl", grid.NOTEBOOK).read_text())
    record["numbers"][0]["value"] -= 12.5
    mine.write_text(json.dumps(record))
    assert cli.main(["bench", "--compare", "orl", str(mine)]) == 0
    head, first, second, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "first", "second", "difference", "apart"]
    assert first.split()[-2] == "-12.5"
    assert second.split()[-2] == "0.0"
    assert cli.main(["bench", "--compare", "orl", "no.json"]) == 2
    assert "There is no record no.json" in capsys.readouterr().err
    assert cli.main(["bench", "--compare", "orl", "lfw", "--tables", "x"]) == 2


def test_the_leaderboard_and_the_table_are_those_of_the_records(shipped, tmp_path):
    text = (PROJECT / "docs" / "leaderboard.md").read_text(encoding="utf-8")
    assert leaderboard.boards(shipped) in text, "python docs/leaderboard.py"
    for path in tables.write(shipped, tmp_path):
        ours = PROJECT / "results" / "tables" / path.name
        if path.suffix == ".parquet":
            pd.testing.assert_frame_equal(pd.read_parquet(ours), pd.read_parquet(path))
        else:
            assert ours.read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), "python docs/leaderboard.py"


def test_a_board_is_in_the_order_of_the_ranks():
    def line(defence, attack, way, right):
        name = f"dlib, dodging, {defence}, {attack}, {way}, 2/255"
        return records.number(name, right, right - 5, right + 5, n=8, unit="%")

    numbers = [line(name, "none", "static", 90) for name in ("none", "two-stage", "blur")]
    numbers += [line("none", "worst", "of 3", 10), line("blur", "worst", "of 4", 40)]
    for name, rank in (("none", 2), ("blur", 1)):
        numbers.append(records.number(f"rank of {name}, dodging", rank, 1, 2))
        numbers.append(records.number(f"mean worst case of {name}, dodging", 50 - 10 * rank))
    record = {"numbers": numbers, "data": {"recognisers": ["dlib"], "eps of 255": 2.0}}
    board = leaderboard.board(record, "dodging")
    assert list(board.index) == ["blur", "none", "two-stage"]
    assert list(board.loc["blur"]) == ["1 [1, 2]", "40", "90 [85, 95]", "", "40 [35, 45]"]
    assert list(board.loc["two-stage"]) == ["–", "", "90 [85, 95]", "", ""]  # not ranked
    assert not len(leaderboard.board(record, "impersonation"))
