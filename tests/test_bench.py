"""The benchmark: its cells do what they say, and however it is run no cell is lost or computed twice."""

import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import test_rooms
import torch

from faceadv import cli, faces, metrics, pairs, precision, recognisers, records
from faceadv.benchmark import cell, grid, statistics
from faceadv.benchmark.cell import Cell, Settings
from faceadv.course import profiles, run
from faceadv.errors import Invalid

SMALL = Settings(pair_count=4, slow_pair_count=2, steps=8, slow_steps=2, sampling_steps=2)
cpu_has_bfloat16 = precision.has_bfloat16("cpu")
TINY = replace(SMALL, pair_count=2, slow_pair_count=1, seeds=(0,), steps=2)


def share(row):
    return np.mean(row["right"])


# -- a cell --


@pytest.mark.parametrize("goal", cell.GOALS)
@pytest.mark.parametrize("attack", ["PGD", "P-FGVM", "A3GN"])
def test_an_attack_succeeds_and_leaves_the_network_as_it_was(attack, goal):
    judge, _ = cell._recogniser("dlib", SMALL)
    before = [tensor.clone() for tensor in judge.state_dict().values()]
    row = cell.measure(Cell(attack, "none", "dlib", goal, eps_255=8.0), SMALL)
    assert share(cell.measure(Cell("none", "none", "dlib", goal), SMALL)) == 1
    assert share(row) <= 0.25
    if attack == "PGD":
        assert 0 < row["linf"] <= 8 / 255 + 1e-5
    assert all(torch.equal(a, b) for a, b in zip(before, judge.state_dict().values()))
    assert not judge.training


@pytest.mark.parametrize("attack", [name for name in cell.ATTACKS if name not in ("none", "A3GN")])
def test_nothing_happens_without_a_budget(attack):
    row = cell.measure(Cell(attack, "none", "dlib", "impersonation", eps_255=0.0), TINY)
    none = cell.measure(Cell("none", "none", "dlib", "impersonation"), TINY)
    assert row["linf"] == 0
    assert row["distance"] == none["distance"]


def test_attacked_images_are_files_in_range(monkeypatch):
    seen = []

    def looking(images):
        seen.append(images)
        return images

    for attack in cell.ATTACKS:
        cell.measure(Cell(attack, "looking", "dlib", "dodging"), TINY, {"looking": looking})
    x = torch.cat(seen)
    assert x.min() >= 0
    assert x.max() <= 1
    torch.testing.assert_close(x * 255, (x * 255).round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("defence", ["jpeg", "bit-depth", "blur", "median", "total-variation", "randomization"])
def test_a_defence_is_better_than_none_against_an_attack_that_does_not_know_it(defence):
    settings = replace(SMALL, pair_count=8)
    row, bare = (
        cell.measure(Cell("PGD", name, "dlib", "dodging", eps_255=1.0), settings) for name in (defence, "none")
    )
    assert share(row) > share(bare)
    assert share(cell.measure(Cell("none", defence, "dlib", "dodging"), settings)) >= 0.85


def test_resgn_falls_to_the_attack_that_knows_it():
    static, knowing = (
        cell.measure(Cell("PGD", "resgn", "dlib", "dodging", way, 4.0), SMALL) for way in ("static", "gradient")
    )
    assert share(static) >= 0.75
    assert share(knowing) == 0


@pytest.mark.parametrize("way", cell.WAYS["two-stage"])
def test_every_way_through_diffusion_brings_the_distance_down(way):
    settings = replace(SMALL, seeds=(0,), eot_samples=2)
    none, knowing = (
        cell.measure(Cell(attack, "two-stage", "dlib", "impersonation", how, 4.0), settings)
        for attack, how in (("none", "static"), ("PGD", way))
    )
    assert np.mean(knowing["distance"]) < np.mean(none["distance"])
    assert len(none["right"]) == SMALL.slow_pair_count


def test_the_pairs_are_of_people_no_threshold_was_chosen_on():
    calibration, photos, every = cell.data("orl")
    assert not set(calibration.names) & set(photos.names)
    fast, slow = (cell._pairs(SMALL, "dodging", slow) for slow in (False, True))
    assert fast.seed == [0] * 4 + [1] * 4
    torch.testing.assert_close(fast.presented[[0, 1, 4, 5]], slow.presented)
    assert len(every) == 200 * 199 // 2


def test_lfw_pairs_are_published_ones_of_people_no_threshold_was_chosen_on(lfw, monkeypatch):
    monkeypatch.setattr(faces, "load", lambda name, device: lfw)
    calibration, photos, every = cell.data("lfw")
    people = {photos.names[label] for label in photos.labels[torch.cat([every.first, every.second])]}
    assert not people & set(calibration.names)
    assert min((every.same).sum(), (~every.same).sum()) >= 100


def test_what_nobody_knows_is_refused():
    for wrong, words in (
        (Cell("PDG", "none", "dlib", "dodging"), "did you mean PGD"),
        (Cell("PGD", "jpg", "dlib", "dodging"), "did you mean jpeg"),
        (Cell("PGD", "jpeg", "dlib", "doging"), "did you mean dodging"),
        (Cell("PGD", "jpeg", "dlip", "dodging"), "did you mean dlib"),
        (Cell("PGD", "jpeg", "dlib", "dodging", source="mobilefac"), "did you mean mobilefacenet"),
        (Cell("PGD", "jpeg", "dlib", "dodging", "surrogate"), "not for jpeg"),
        (Cell("PGD", "none", "dlib", "dodging", "bpda"), "nothing to adapt"),
    ):
        with pytest.raises(Invalid, match=words):
            grid.run([wrong], TINY, "nowhere")  # before anything runs


def test_settings_of_nothing_are_refused():
    for wrong in ({"seeds": ()}, {"pair_count": 0}, {"slow_pair_count": -1}, {"steps": 0}, {"eot_samples": 0}):
        with pytest.raises(Invalid, match=f"has none: {next(iter(wrong))}"):
            replace(TINY, **wrong)


@pytest.mark.parametrize("goal", cell.GOALS)
def test_a_single_person_is_refused_and_does_not_hang(goal, monkeypatch, orl):
    alone = orl.people(orl.names[:1])
    place = torch.arange(4)
    wrong = pairs.Pairs(place, place + 1, torch.tensor([True, True, False, False]), torch.zeros(4))
    monkeypatch.setattr(cell, "data", lambda name, device: (alone, alone, wrong))
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(20)
    try:
        with pytest.raises(Invalid, match="photos of several people"):
            cell._pairs.__wrapped__(TINY, goal, False)
    finally:
        signal.alarm(0)


def test_own_callables_that_give_no_images_are_refused():
    plain = Cell("PGD", "none", "dlib", "dodging")
    wrongs = (lambda x: x * float("nan"), lambda x: x[:, :, ::2, ::2], lambda x: x[:0], lambda x: 1)
    for wrong in [lambda x, *_, wrong=wrong: wrong(x) for wrong in wrongs]:
        for one in (replace(plain, defence="mine"), replace(plain, attack="mine")):
            with pytest.raises(Invalid, match='"mine" must return finite images'):
                cell.measure(one, TINY, {"mine": wrong})
    learning = torch.nn.BatchNorm2d(3)
    with pytest.raises(Invalid, match="training mode"):
        cell.measure(replace(plain, defence="mine"), TINY, {"mine": torch.nn.Sequential(learning)})
    assert learning.num_batches_tracked == 0
    half = {"mine": lambda x, *_: x.half().requires_grad_()}
    assert cell.measure(replace(plain, attack="mine"), TINY, half)["linf"] == 0


def test_a_row_depends_on_settings_weights_and_own_code(monkeypatch):
    place = Cell("PGD", "mine", "dlib", "dodging")
    by_factor = {k: cell.version(place, TINY, {"mine": lambda x, k=k: x * k}) for k in (0.5, 0.9)}
    assert by_factor[0.5] != by_factor[0.9]
    text = "mine = lambda x: (lambda y: y * 0.5)(x)"  # of a notebook, in two kernels
    kernels = [{"__name__": "__main__"} for _ in range(2)]
    for number, kernel in enumerate(kernels):
        exec(compile(text, f"/tmp/ipykernel_{number}/1.py", "exec"), kernel)
    assert len({cell.version(place, TINY, kernel) for kernel in kernels}) == 1
    known = Cell("PGD", "jpeg", "dlib", "dodging")
    assert cell.version(known, TINY) == cell.version(known, replace(TINY))
    assert cell.version(known, TINY) != cell.version(known, replace(TINY, far=0.01))
    assert cell.version(known, TINY) != cell.version(replace(known, eps_255=1.0), TINY)
    before, other = cell.version(known, TINY), replace(known, recogniser="mobilefacenet")
    fetched = {"dlib": "1" * 64}  # as if it were to be fetched
    for thing, name, value in (
        (cell, "_code", lambda: "other code"),
        (cell, "_photos", lambda name: "other photos"),
        (cell.weights, "shipped", lambda: {"resgn": {"resgn.safetensors": "0" * 64}}),
        (cell.weights, "fetched", lambda: fetched),
        (cell.precision, "has_bfloat16", lambda device: not cpu_has_bfloat16),
        (cell.precision, "device", lambda name: torch.device("meta")),
        (cell.cache, "versions", lambda: {"diffusers": "0"}),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(thing, name, value)
            assert cell.version(known, TINY) != before, name
            if name == "fetched":
                without = cell.version(other, TINY)
                fetched["dlib"] = "2" * 64
                assert cell.version(other, TINY) == without  # it does not use these weights
    assert cell.version(known, TINY) == before


def test_a_row_depends_on_the_content_of_photos(tmp_path):
    person = tmp_path / "someone"
    person.mkdir()
    photo = person / "1.jpg"
    photo.write_bytes(b"a photo")
    known, settings = Cell("PGD", "jpeg", "dlib", "dodging"), replace(TINY, faces_name=str(tmp_path))
    before, stat = cell.version(known, settings), photo.stat()
    photo.write_bytes(b"another"[:7])
    os.utime(photo, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    cell._photos.cache_clear()
    assert cell.version(known, settings) != before


def test_a_row_depends_on_all_modules_that_a_cell_imports(monkeypatch):
    imports, reached, package = test_rooms.modules(), set(), test_rooms.PACKAGE
    waiting = ["benchmark.cell"]
    while waiting:
        name = waiting.pop()
        if name not in reached and name in imports:
            reached.add(name)
            waiting += [*imports[name], f"{name.rpartition('.')[0]}.__init__"]
    monkeypatch.setattr(cell.cache, "key", lambda files, own: {*files, own})
    hashed = {".".join(path.relative_to(package).with_suffix("").parts) for path in cell._code.__wrapped__()}
    assert {"networks.dlib", "store.weights", "attacks", "images", "store.__init__"} <= reached
    assert reached - {"benchmark.__init__"} <= hashed  # that one is a line of text
    assert not hashed & {"plots", "benchmark.grid", "cli"}


def test_a_row_depends_on_the_whole_module_of_an_own_function(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = "def half(x):\n    return 0.5 * x\n\n\ndef dark(x):\n    return half(x)\n"
    (tmp_path / "my_defences.py").write_text(text)
    import my_defences

    place = Cell("none", "dark", "dlib", "dodging")
    before = cell.version(place, TINY, {"dark": my_defences.dark})
    (tmp_path / "my_defences.py").write_text(text.replace("0.5", "0.9"))
    assert cell.version(place, TINY, {"dark": my_defences.dark}) != before


def test_what_works_in_place_spoils_no_other_cell():
    plain = Cell("PGD", "none", "dlib", "dodging")
    before = cell.measure(plain, TINY)["distance"]
    own = {"dark": lambda x: x.mul_(0.1), "darker": lambda x, objective: x.mul_(0.1)}
    cell.measure(replace(plain, defence="dark"), TINY, own)
    cell.measure(replace(plain, attack="darker"), TINY, own)
    assert cell.measure(plain, TINY)["distance"] == before


# -- many cells --


def cells(*defences):
    return [Cell(attack, defence, "dlib", "dodging") for defence in defences for attack in ("none", "FGSM")]


def numbers(rows):
    return rows.drop(columns="seconds")


def test_a_finished_cell_is_not_computed_twice_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    todo, done, measure = cells("none", "jpeg"), [], cell.measure

    def dying(one, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(one)
        return measure(one, **options)

    monkeypatch.setattr(grid, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        grid.run(todo, TINY, tmp_path)
    assert len(grid.read(todo, TINY, tmp_path)) == 2
    assert done == todo[:2]
    done.append("after the kill")
    rows = grid.run(todo, TINY, tmp_path)
    assert done[3:] == todo[2:]
    assert list(rows["attack"]) == ["none", "FGSM"] * 2
    pd.testing.assert_frame_equal(grid.run(todo, TINY, tmp_path), rows)
    assert len(done) == 5


def place(folder, one, settings=TINY):
    return grid._place(folder, one, cell.version(one, settings))


def cut_off(path, other):
    path.write_text(path.read_text()[:-20])


def emptied(path, other):
    path.write_text("")


def a_directory(path, other):
    path.unlink()
    path.mkdir()
    (path / "something").touch()


def edited(path, other):
    path.write_text(path.read_text().replace('"right": [1', '"right": [0'))


def of_another_cell(path, other):
    shutil.copy(other, path)


def of_another_version(path, other):
    found = cell.cache.read_json(path)
    cell.cache.write_json(path, found | {"key": "0" * 24})


def another_text(path, other):
    cell.cache.write_json(path, ["a list"])


@pytest.mark.parametrize(
    "damage", [cut_off, emptied, a_directory, edited, of_another_cell, of_another_version, another_text]
)
def test_a_file_that_is_no_finished_cell_is_computed_again_with_one_line(damage, tmp_path, monkeypatch, caplog):
    todo, done, measure = cells("none"), [], cell.measure
    monkeypatch.setattr(grid, "measure", lambda one, **options: done.append(one) or measure(one, **options))
    rows = grid.run(todo, TINY, tmp_path)
    assert not caplog.messages
    path = place(tmp_path, todo[0])
    damage(path, place(tmp_path, todo[1]))
    done.clear()
    again = grid.run(todo, TINY, tmp_path)
    assert done == todo[:1]
    (message,) = caplog.messages
    assert path.name in message
    assert message.endswith("again.")
    pd.testing.assert_frame_equal(numbers(again), numbers(rows))
    assert json.loads(path.read_text().splitlines()[0])["key"] == cell.version(todo[0], TINY)
    assert not list(tmp_path.glob(".*"))


def test_two_workers_give_the_same_rows(tmp_path):
    half = {"half": lambda images: images * 0.5}
    todo = [*cells("none"), *cells("half")]
    rows = grid.run(todo, TINY, tmp_path / "local", "local", workers=2, own=half)
    threads = torch.get_num_threads()
    cell._made.cache_clear()
    cell._enrolled.cache_clear()
    torch.set_num_threads(max(1, threads // 2))  # as many as a worker has: sums of other parts differ in the last bit
    alone = grid.run(todo, TINY, tmp_path / "single", own=half)
    torch.set_num_threads(threads)
    pd.testing.assert_frame_equal(numbers(rows), numbers(alone))
    with pytest.raises(ValueError, match='There is no defence "nothing"'):
        grid.run(cells("nothing"), TINY, tmp_path)


def test_the_command_computes_what_the_notebook_reads(tmp_path, capsys):
    notebook = profiles.NOTEBOOKS / f"{grid.NOTEBOOK}.ipynb"
    few = {
        **{"attack_names": '["none"]', "simple_names": '["jpeg"]', "paper_names": "[]", "curve_eps_255": "[]"},
        **{"sign_defences": "[]", "adaptive_recognisers": "[]", "recogniser_names": '["dlib"]'},
    }
    options = [part for item in few.items() for part in ("-p", *item)]
    assert cli.main(["bench", "--profile", "smoke", "--scheduler", "single", "--out", str(tmp_path), *options]) == 0
    assert "4 cells" in capsys.readouterr().out
    values = profiles.defaults(notebook) | profiles.parameters("smoke", notebook, few)
    folder = records.place(run.folder(tmp_path, few) / "results", "smoke", grid.NOTEBOOK).with_suffix("")
    rows = grid.read(grid.plan(values, ["dlib"])["static"], grid.settings(values), folder)
    assert len(rows) == 4
    assert cli.main(["bench", "-p", "pair_cuont", "3"]) == 2
    assert "did you mean pair_count" in capsys.readouterr().err


def test_recognisers_whose_weights_are_not_here_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert grid.present(["dlib", "facenet-casia", "mobilefacenet"]) == ["dlib", "mobilefacenet"]
    with pytest.raises(ValueError, match="did you mean mobilefacenet"):
        grid.present(["mobilefac"])


def test_the_plan_has_every_attack_defence_recogniser_and_goal():
    values = profiles.defaults(profiles.NOTEBOOKS / f"{grid.NOTEBOOK}.ipynb")
    parts = grid.plan(values, list(recognisers.NAMES[:2]) * 2)  # names that come twice count once
    assert len(parts["static"]) == len(set(parts["static"])) == 7 * 12 * 2 * 2
    assert len(parts["transfer"]) == 5 * 2 * 2 * 2
    assert {one.defence for one in parts["adaptive"]} == set(cell.DEFENCES)
    assert len(parts["moved"]) == 12 * 2 * 2
    assert all(one.source != one.recogniser for one in parts["transfer"] + parts["moved"])
    assert {one.eps_255 for one in parts["transfer"] + parts["moved"]} == {values["transfer_eps_255"]}
    assert {one.goal for one in parts["curve"]} == set(cell.GOALS)
    assert grid.settings(values).seeds == (0, 1)
    with pytest.raises(Invalid, match="None of the recognisers is here"):
        grid.plan(values, [])


def test_every_defence_meets_the_same_attackers():
    """A gradient or something in its place, BPDA, and a search without a gradient; the one without a defence too."""
    own = {"half": lambda x: x / 2, "rounds": lambda x: (x * 255).round() / 255}
    for defence in (*cell.DEFENCES, *own):
        ways = grid.ways(defence, own)
        assert "queries" in ways
        assert defence == "none" or "bpda" in ways
        assert {"gradient", "stand-in", "surrogate"} & {*ways} or defence == "rounds"
    assert "gradient" in grid.ways("half", own)
    assert "gradient" not in grid.ways("rounds", own)  # its slope is 0 nearly everywhere
    assert grid.ways("half") == ("bpda", "queries")  # nothing is known of it


@pytest.mark.parametrize(("defence", "way"), [("jpeg", "stand-in"), ("bit-depth", "stand-in"), ("blur", "bpda")])
def test_attackers_who_know_a_filter_do_better(defence, way):
    static, knowing = (
        cell.measure(Cell("PGD", defence, "dlib", "dodging", how, 2.0), SMALL) for how in ("static", way)
    )
    assert np.mean(knowing["distance"]) > np.mean(static["distance"])


def test_queries_alone_bring_the_distance_up():
    none, asked = (
        cell.measure(Cell(attack, "median", "dlib", "dodging", way, 8.0), replace(TINY, queries=40))
        for attack, way in (("none", "static"), ("PGD", "queries"))
    )
    assert np.mean(asked["distance"]) > np.mean(none["distance"])
    assert 0 < asked["linf"] <= 8 / 255 + 1e-5


def test_of_several_starts_the_best_is_kept():
    one, three = (
        cell.measure(Cell("PGD", "none", "dlib", "dodging", "gradient", 1.0), replace(TINY, restarts=n)) for n in (1, 3)
    )
    assert all(b >= a - 1e-3 for a, b in zip(one["distance"], three["distance"]))
    assert sum(three["distance"]) > sum(one["distance"])


# -- what the rows say --


def row(right, who, seed=None, **keys):
    filled = {"recogniser": "dlib", "goal": "dodging", "defence": "jpeg", "attack": "PGD", "way": "static"}
    filled |= {"eps_255": 2.0, "source": "", "l2": 1.0, "linf": 0.01, "seconds": {"attack": 0.1, "defence": 0.2}}
    return filled | {"right": right, "who": who, "seed": seed or [0] * len(right)} | keys


def test_worst_case_is_per_pair_and_summary_draws_people():
    rows = pd.DataFrame([row([1, 1, 0, 0], list("aabb")), row([1, 0, 1, 0], list("aabb"), way="bpda")])
    worst = statistics.worst(rows)
    assert worst["right"].tolist() == [[1, 0, 0, 0]]
    (line,) = statistics.summary(worst).to_dict("records")
    assert line["right"] == 25
    found = metrics.rate(worst["right"][0], list("aabb"))  # two people
    assert [line["low"], line["high"]] == pytest.approx([100 * bound for bound in found[1:]])
    assert (line["attack"], line["way"]) == ("worst", "of 2")


def test_a_defence_is_compared_with_another_pair_by_pair():
    who = list("aabbccdd")
    rows = pd.DataFrame([row([1] * 8, who), row([1, 0] * 4, who, defence="none"), row([0] * 8, who, defence="blur")])
    found = statistics.paired(rows, "none")
    assert found["points"].to_dict() == {"jpeg": 50, "blur": -50}
    assert (found["low"] < found["points"]).all()
    assert (found["high"] > found["points"]).all()
    with pytest.raises(Invalid, match='one row of "resgn", and there are 0'):
        statistics.paired(rows, "resgn")
    with pytest.raises(Invalid, match="different pairs"):
        statistics.paired(pd.concat([rows, pd.DataFrame([row([1], ["a"], defence="puface")])]), "none")


def test_two_records_are_compared_number_by_number():
    first, second = (
        {"numbers": [records.number(name, value, value - 5, value + 5, unit="%") for name, value in numbers.items()]}
        for numbers in ({"a": 10, "b": 50, "old": 1}, {"a": 30, "b": 53, "new": 2})
    )
    table = statistics.compare(first, second).set_index("name")
    assert list(table.index[:2]) == ["a", "b"]
    assert table.loc["a", ["difference", "apart"]].tolist() == [20, True]
    assert table.loc["b", ["difference", "apart"]].tolist() == [3, False]
    assert pd.isna(table.loc[["old", "new"], "difference"]).all()


def test_a_line_is_in_the_record_once():
    numbers, lines = [], statistics.summary(pd.DataFrame([row([1, 0], list("ab"))]))
    for _ in range(2):
        assert statistics.note(numbers, lines) is lines
    (entry,) = numbers
    assert (entry["name"], entry["value"], entry["n"]) == (statistics.label(lines.iloc[0]), 50, 2)


def test_rows_of_different_pairs_are_not_compared():
    for other in (row([1, 0], list("ab"), way="bpda"), row([1, 0, 1, 1], list("abba"), way="bpda")):
        rows = pd.DataFrame([row([1, 1, 0, 0], list("aabb")), other])
        for compare in (statistics.worst, statistics.ranks):
            with pytest.raises(Invalid, match="different pairs"):
                compare(rows)


def test_spread_is_between_seeds():
    lines = statistics.summary(pd.DataFrame([row([1, 1, 0, 0], list("abcd"), [0, 0, 1, 1])]))
    assert lines["spread"].item() == pytest.approx(np.std([100, 0], ddof=1))


def test_common_pairs_are_the_first_of_each_seed():
    many = row([1, 2, 3, 4, 5, 6], list("abcdef"), [0, 0, 0, 1, 1, 1])
    few = row([1, 2, 4, 5], list("abde"), [0, 0, 1, 1], defence="two-stage")
    cut = statistics.common(pd.DataFrame([many, few]))
    assert cut["right"].tolist() == [[1, 2, 4, 5]] * 2
    assert cut["who"].tolist() == [list("abde")] * 2


def test_ranks_tell_the_certain_from_the_close():
    who = [f"p{i}" for i in range(40)]
    bad, close, closer, good = [0.0] * 40, [0.0, 1.0] * 20, [1.0, 0.0] * 20, [1.0] * 40
    rows = pd.DataFrame([{"defence": n, "right": r, "who": who} for n, r in zip("abcd", (bad, close, closer, good))])
    table = statistics.ranks(rows)
    assert table.loc["d", ["rank", "low", "high"]].tolist() == [1, 1, 1]
    assert table.loc["a", ["rank", "low", "high"]].tolist() == [4, 4, 4]
    assert table.loc["b", ["rank", "low", "high"]].tolist() == [2.5, 2, 3]
    assert list(table.index)[::3] == ["d", "a"]


def test_lines_come_back_from_a_record():
    lines = statistics.summary(
        pd.DataFrame([row([1, 0, 1], list("abc")), row([0, 0, 0], list("abc"), source="mobilefacenet", eps_255=0.5)])
    )
    entries = [
        records.number(statistics.label(line), line["right"], line["low"], line["high"], n=line["n"])
        for line in lines.to_dict("records")
    ]
    back = statistics.lines({"numbers": [*entries, records.number("rank of jpeg", 1)]})
    columns = [*statistics.KEYS, "right", "low", "high", "n"]
    pd.testing.assert_frame_equal(back[columns], lines[columns], rtol=1e-5)
    assert list(statistics.lines({"numbers": [records.number("rank of jpeg", 1)]}).columns) == columns
