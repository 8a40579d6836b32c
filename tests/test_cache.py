"""The cache: nothing damaged is used, nothing is made twice, and a key tells apart what differs."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from faceadv import cli, cloaks, faces, recognisers
from faceadv.benchmark import cell
from faceadv.course import run
from faceadv.errors import Failed
from faceadv.store import cache

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made():
    """``made()`` is the array of the cache; ``made.count`` is how often it was computed."""

    def get():
        return cache.array("room", "name", "key", compute)

    def compute():
        get.count += 1
        return VALUES

    get.count = 0
    return get


@pytest.fixture
def home(root, made):
    made()
    return root / "room" / "name-key"


def test_made_once_with_checksum_shape_and_version(home, made):
    np.testing.assert_array_equal(made(), VALUES)
    assert made.count == 1
    note = json.loads((home / "entry.json").read_text())
    assert note["version"] == cache.VERSION
    facts = note["files"]["array.npy"]
    assert (facts["shape"], facts["dtype"], facts["bytes"]) == ([3, 4], "<f4", (home / "array.npy").stat().st_size)
    assert len(facts["sha256"]) == 64


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def another_array(path):
    np.save(path, VALUES.T)


def a_directory(path):
    path.unlink()
    path.mkdir()


def change_note(**change):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | change))


DAMAGES = {
    "a flipped byte": ("array.npy", flip),
    "cut short": ("array.npy", lambda path: os.truncate(path, path.stat().st_size - 3)),
    "empty": ("array.npy", lambda path: path.write_bytes(b"")),
    "a directory": ("array.npy", a_directory),
    "another array": ("array.npy", another_array),
    "lost": ("array.npy", Path.unlink),
    "no note": ("entry.json", Path.unlink),
    "an empty note": ("entry.json", lambda path: path.write_text("")),
    "a note that is a list": ("entry.json", lambda path: path.write_text("[]")),
    "a note that is no text": ("entry.json", lambda path: path.write_bytes(b"\xff\xfe")),
    "another version": ("entry.json", change_note(version=cache.VERSION + 1)),
    "files without facts": ("entry.json", change_note(files={"array.npy": None})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again_and_one_line_says_so(home, made, damage, caplog):
    file, spoil = DAMAGES[damage]
    np.testing.assert_array_equal(made(), VALUES)  # its checksum has been computed before
    spoil(home / file)
    np.testing.assert_array_equal(made(), VALUES)
    assert made.count == 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("name-key in the cache is damaged (")
    assert "\n" not in line
    np.testing.assert_array_equal(made(), VALUES)
    assert made.count == 2  # mended


def test_something_else_in_the_place_of_an_entry(home, made):
    shutil.rmtree(home)
    home.write_text("a file")
    np.testing.assert_array_equal(made(), VALUES)
    shutil.rmtree(home)
    home.symlink_to("nowhere")
    np.testing.assert_array_equal(made(), VALUES)
    assert made.count == 3


def test_an_entry_of_several_files_in_folders():
    def write(folder):
        (folder / "deep").mkdir()
        (folder / "deep" / "a.txt").write_text("a")
        (folder / "b.txt").write_text("b")

    home = cache.entry("room", "name", "key", write)
    flip(home / "deep" / "a.txt")
    assert cache.entry("room", "name", "key", write) == home
    assert (home / "deep" / "a.txt").read_text() == "a"


def test_names_of_any_folder(root):
    for name in ("photos [2024]/../x", "", "..", "ä" * 300, "a*b?"):
        home = cache.entry("room", name, "key", lambda folder: (folder / "a").write_text("a"))
        assert home.parent == root / "room"
        assert home.name.endswith("-key")


def test_what_killed_runs_left_is_cleared(root, made):
    code = (
        "import os, signal; from faceadv.store import cache\n"
        "def make(folder):\n"
        "    (folder / 'half').write_text('half'); print(folder, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache.entry('room', 'name', 'key', make)"
    )
    killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False)
    assert (Path(killed.stdout.decode().strip()) / "half").exists()
    other = root / "room" / ".name-key2.1-abcd"  # of another entry, which may be at work
    other.mkdir()
    made()
    assert sorted(os.listdir(root / "room")) == [other.name, "name-key"]


def test_a_failure_leaves_nothing(root):
    def fail(folder):
        (folder / "half").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.entry("room", "name", "key", fail)
    assert os.listdir(root / "room") == []


def test_a_lock_is_waited_for_or_refused(caplog):
    def enter(wait):
        with cache.lock("name", "Somebody is at work.", wait):
            return "entered"

    with ThreadPoolExecutor(2) as pool:
        with cache.lock("name"), cache.lock("name"):  # the same thread may
            with pytest.raises(Failed, match=r"^Somebody is at work\.$"):
                pool.submit(enter, False).result()
            assert caplog.messages == []
            waiting = pool.submit(enter, True)
            while not caplog.messages:
                time.sleep(0.01)
            assert not waiting.done()
        assert waiting.result() == "entered"
    assert caplog.messages == ["Somebody is at work."]
    assert enter(False) == "entered"


def test_two_processes_at_once_make_it_once(root, tmp_path):
    code = (
        "import sys, time; import numpy as np; from faceadv.store import cache\n"
        "def make():\n"
        "    open(sys.argv[1], 'a').write('made '); time.sleep(0.5); return np.ones(3)\n"
        "print(cache.array('room', 'name', 'key', make).sum())"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "log")]
    running = [subprocess.Popen(arguments, stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in running] == [b"3.0"] * 3
    assert (tmp_path / "log").read_text() == "made "


def refuse(number):
    def refused(path, *args, **kwargs):
        raise OSError(number, os.strerror(number), str(path))

    return refused


@pytest.fixture(params=[errno.EROFS, errno.EACCES, errno.ENOSPC])
def read_only(request, monkeypatch):
    """Nothing can be written, as on a read-only mount. (Rights alone do not stop root.)"""

    def lock():
        for name in ("mkdir", "write_text", "touch"):
            monkeypatch.setattr(Path, name, refuse(request.param))
        return os.strerror(request.param).lower()

    return lock


def test_a_read_only_cache_that_holds_what_is_needed_works(home, made, read_only):
    read_only()
    np.testing.assert_array_equal(made(), VALUES)
    assert made.count == 1


def test_a_cache_that_cannot_be_written_is_one_sentence(root, made, read_only):
    reason = read_only()
    with pytest.raises(Failed) as caught:
        made()
    assert str(caught.value) == f"The cache under {root} cannot be written ({reason}): set FACEADV_CACHE."


def test_the_command_line_prints_that_sentence_with_exit_2(root, monkeypatch, capsys):
    root.write_text("a file in the place of the folder")
    monkeypatch.setattr("faceadv.store.datasets.check", lambda name, root: cache.array("room", "name", "key", list))
    assert cli.main(["data", "check", "orl"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told == [f"faceadv: The cache under {root} cannot be written (not a directory): set FACEADV_CACHE."]


def test_other_errors_are_not_about_the_cache(tmp_path):
    def unreadable(folder):
        refuse(errno.EACCES)(tmp_path / "photos" / "a.jpg")

    with pytest.raises(PermissionError, match=r"a\.jpg"):
        cache.entry("room", "name", "key", unreadable)


class Reader:
    """Counts how often files are read whole."""

    def __init__(self, monkeypatch):
        self.count, real = 0, Path.read_bytes

        def read(path):
            self.count += 1
            return real(path)

        monkeypatch.setattr(Path, "read_bytes", read)


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / f"{name}.jpg" for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode() * 10)
    return paths


def later(monkeypatch):
    """Some seconds have passed since the files were written."""
    now = cache.time.time()
    monkeypatch.setattr(cache.time, "time", lambda: now + 10)


def test_content_notices_a_changed_byte_and_reads_no_file_twice(photos, monkeypatch):
    later(monkeypatch)
    reader = Reader(monkeypatch)
    first = cache.content("photos", photos)
    assert (len(first), reader.count) == (64, 3)
    assert cache.content("photos", photos) == first
    assert reader.count == 3
    times = photos[1].stat().st_atime_ns, photos[1].stat().st_mtime_ns
    photos[1].write_bytes(b"B.jpg" * 10)
    os.utime(photos[1], ns=times)  # as rsync and tar do
    changed = cache.content("photos", photos)
    assert changed != first
    assert cache.content("photos", photos[::-1]) != changed
    assert cache.content("photos", photos[:2]) != changed
    photos[1].write_bytes(b"b.jpg" * 10)
    assert cache.content("photos", photos) == first


def test_content_of_new_files_is_not_kept(photos, root, monkeypatch):
    # two changes within one tick of the disk's clock look like one
    frozen = photos[0].stat().st_mtime_ns
    first = cache.content("photos", photos)
    photos[0].write_bytes(b"A.jpg" * 10)
    os.utime(photos[0], ns=(frozen, frozen))
    assert cache.content("photos", photos) != first
    assert not root.exists()


def test_content_without_a_cache_that_can_be_written(photos, root, monkeypatch):
    expected = cache.content("photos", photos)
    later(monkeypatch)
    root.write_text("a file in the place of the folder")
    assert cache.content("photos", photos) == expected


def test_the_checksum_of_a_file_is_computed_once(tmp_path, monkeypatch):
    path, count, real = tmp_path / "a", [], cache.hashlib.file_digest
    path.write_bytes(b"a")
    monkeypatch.setattr(cache.hashlib, "file_digest", lambda *args: count.append(1) or real(*args))
    later(monkeypatch)
    assert {cache.sha256(path) for _ in range(3)} == {cache.hashlib.sha256(b"a").hexdigest()}
    assert len(count) == 1
    path.write_bytes(b"b")
    assert cache.sha256(str(path)) == cache.hashlib.sha256(b"b").hexdigest()


def test_a_key_tells_apart_what_differs(tmp_path):
    for name, data in (("a", b"x"), ("b", b"y")):
        (tmp_path / name).write_bytes(data)
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 3, 3, padding=1)
    strided = torch.nn.Conv2d(3, 3, 3, padding=1, stride=2)
    strided.load_state_dict(layer.state_dict())
    another = torch.nn.Conv2d(3, 3, 3, padding=1)
    another.load_state_dict(layer.state_dict())
    another.scale = 2.0  # an option that is neither a weight nor in its text
    inside, without = torch.nn.Sequential(another), torch.nn.Sequential(layer)
    half = torch.ones(2, dtype=torch.bfloat16)
    zeros = np.zeros((2, 3), np.float32)
    different = [
        *([], [[]], {}, None, False, True, 0, 1, 1.5, "", "1", "True", "null", b"", b"1", "bytes 1 1"),
        *([1, 2], [[1, 2]], [1, [2]], [[1], 2], [12], ["1", "2"], {"a": 1}, {"a": "1"}, ["a", 1], [["a", 1]], {1: 1}),
        *(zeros, zeros.T, zeros[:0], zeros.astype(np.float64), zeros.astype(np.int32), zeros + 1, zeros.reshape(-1)),
        *(-zeros, np.array(0.0), tmp_path / "a", tmp_path / "b", str(tmp_path / "a"), layer, strided),
        *(another, inside, without, half, half * 2, half.float(), half.half()),
    ]
    keys = [cache.key(part) for part in different] + [cache.key(), cache.key(1, 2), cache.key("1", "2")]
    assert len(set(keys)) == len(different) + 3
    assert {len(key) for key in keys} == {24}
    assert set(keys[0]) <= set("0123456789abcdef")


def test_a_key_is_of_content_alone(tmp_path):
    shutil.copyfile(__file__, tmp_path / "copy")
    zeros = np.zeros((2, 3), np.float32)
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 2)
    copy = torch.nn.Linear(2, 2).train(not layer.training).requires_grad_(False)
    copy.load_state_dict(layer.state_dict())
    copy.helper, copy._counter = print, 7  # what has no content, and what is private
    for one, other in (
        (Path(__file__), tmp_path / "copy"),
        (zeros, np.zeros((3, 2), np.float32).T),
        (zeros, torch.zeros(2, 3, requires_grad=True)),
        (layer, copy),
        ({"a": 1, "b": [2]}, {"b": (np.int64(2),), "a": 1}),
    ):
        assert cache.key(one) == cache.key(other)
    with torch.no_grad():
        copy.bias[0] += 1e-3
    assert cache.key(copy) != cache.key(layer)  # computed anew


@pytest.mark.parametrize("part", [object(), {1, 2}, np.array([object()]), [lambda: 1]])
def test_what_has_no_content_is_refused(part):
    with pytest.raises(TypeError):
        cache.key(part)


def test_json(tmp_path, caplog):
    path, value = tmp_path / "new" / "a.json", {"ä": [1, 2.5, None, "line\nline\u2028"], "b": True}
    assert cache.read_json(path) is None
    assert caplog.records == []
    cache.write_json(path, value)
    assert cache.read_json(path) == value
    with pytest.raises(ValueError, match="JSON"):
        cache.write_json(path, [float("nan")])
    assert cache.read_json(path) == value
    for spoil in (flip, lambda path: os.truncate(path, 9), lambda path: path.write_bytes(b"\xff\n"), a_directory):
        caplog.clear()
        spoil(path)
        assert cache.read_json(path) is None
        assert [record.getMessage() for record in caplog.records] == ["a.json is damaged and is made again."]
        cache.write_json(path, value)
        assert cache.read_json(path) == value


def test_an_array_of_nothing():
    for _ in range(2):
        assert cache.array("room", "nothing", "key", lambda: np.zeros((0, 128), np.float32)).shape == (0, 128)


def test_a_note_that_names_no_file(home, made):
    (home / "entry.json").write_text(json.dumps({"version": cache.VERSION, "files": {}}))
    np.testing.assert_array_equal(made(), VALUES)
    assert made.count == 2


class Key(Exception):
    """Carries a key out of the function that made it."""


def key_of(function, *arguments):
    with pytest.raises(Key) as caught:
        function(*arguments)
    return str(caught.value)


def test_every_key_knows_the_versions_of_all_libraries(tmp_path, monkeypatch):
    array = cache.array

    def told(room, name, key, make):
        if room == "digests":
            return array(room, name, key, make)
        raise Key(key)

    monkeypatch.setenv("FACEADV_DATA", str(tmp_path / "data"))  # without LFW
    (tmp_path / "photos" / "ann").mkdir(parents=True)
    (tmp_path / "photos" / "ann" / "1.jpg").write_bytes(b"photo")
    photos, network = str(tmp_path / "photos"), torch.nn.Flatten()
    recogniser = recognisers.Recogniser("toy", network, 1.0)
    chips = type("Faces", (), {"chips": np.zeros((1, 3, 2, 2), np.uint8)})
    place, settings = cell.Cell("none", "none", "dlib", "dodging"), cell.Settings(faces_name=photos)

    def keys():
        with monkeypatch.context() as patch:
            patch.setattr(cache, "array", told)
            return [
                key_of(recognisers.embed_faces, recogniser, chips),
                key_of(cloaks.cached, "toy", None, torch.full((1, 3, 2, 2), 0.5), []),
                faces.fingerprint(photos),
                cell.version(place, settings),
                run._surroundings(),
            ]

    versions = dict.fromkeys(cache.LIBRARIES, "1")
    assert {"torch", "torchvision", "numpy", "pillow", "facenet-pytorch", "diffusers"} <= versions.keys()
    monkeypatch.setattr(cache.metadata, "version", versions.get)
    seen = [keys()]
    for library in versions:
        versions[library] = "2"
        seen.append(keys())
    for of_one in zip(*seen):
        assert len(set(of_one)) == len(seen)
