"""The command ``faceadv``: run the notebooks, fetch and check data and weights, train what ships."""

import importlib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from errno import EACCES, EDQUOT, EEXIST, EISDIR, ENOSPC, ENOTDIR, EPERM, EROFS

from click import Argument, Command, Group, Option, UsageError, get_current_context, version_option
from click.exceptions import Exit

from faceadv import __version__
from faceadv.errors import Invalid, UserError, sentence
from faceadv.store import paths, threads
from faceadv.training import RECIPES

__all__ = ["main"]

# what a user can mend about a file or a folder: its rights, a full disk, something else in its place
MENDABLE = (EACCES, EPERM, EROFS, ENOSPC, EDQUOT, ENOTDIR, EISDIR, EEXIST)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 1 if a notebook or a check failed.

    2: wrong usage, or something that the user can mend, said in one sentence. 130: interrupted. All other exceptions
    are raised, and with FACEADV_DEBUG those as well.
    """
    threads.settle()  # before a command imports torch
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    try:
        paths.settle()
        with cli.make_context("faceadv", list(sys.argv[1:] if argv is None else argv)) as context:
            return _show(cli.invoke(context))
    except (Exit, UsageError) as e:
        if isinstance(e, UsageError):  # the other one comes from --help and --version
            e.show()
        return e.exit_code
    except BrokenPipeError:  # as of `faceadv weights list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError, KeyboardInterrupt) as e:
        mendable = isinstance(e, (UserError, KeyboardInterrupt)) or e.errno in MENDABLE
        if os.environ.get("FACEADV_DEBUG") or not mendable:
            raise
        print(f"faceadv: {sentence(e)}", file=sys.stderr)
        return 130 if isinstance(e, KeyboardInterrupt) else 2


def _show(result):
    """Print what a command returned: a path, a list of paths, or one of (ok, sentence). Returns the exit status."""
    if result is None or isinstance(result, int):
        return int(result or 0)
    lines = result if isinstance(result, list) else [result]
    for line in lines:
        print(f"[{'OK' if line[0] else 'FAIL'}] {line[1]}" if isinstance(line, tuple) else line)
    return int(any(isinstance(line, tuple) and not line[0] for line in lines))


def _once(context, parameter, pairs):
    """The values of ``-p`` by their names. Raises ``Invalid`` for a name that is given twice."""
    twice = {name for name, value in pairs if sum(name == other for other, _ in pairs) > 1}
    if twice:
        raise Invalid(f"-p {min(twice)} is given more than once: give it once (several values: with commas).")
    return dict(pairs)


def _load(name):
    """A module of the package, imported only when it is needed, so that ``--help`` is quick."""
    return importlib.import_module(f"faceadv.{name}")


def _run(names, profile, overrides, out, fresh, update, **where):
    scheduler, workers, jobs = where["scheduler"], where["workers"], where["jobs"]
    run, profiles, names = _load("course.run"), _load("course.profiles"), list(names) or ["all"]
    points = profiles.spread(run.select(names), overrides) if overrides else [{}]
    several = len(points) > 1
    if update and (profile not in ("orl", "lfw") or overrides):
        raise Invalid("--update uses the profile orl or lfw as it is: leave other profiles and -p out.")
    if not several and (scheduler != "single" or workers is not None):
        raise Invalid("--scheduler and --workers are for several values of a parameter, such as -p eps_255 1,2.")
    if jobs != 1 and (several or update):
        raise Invalid("--jobs is for notebooks without --update and with one value each: for several, see --workers.")
    # SIGTERM ends the run as Ctrl-C does, so that no kernel is left
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if update:
            results = run.update(names, profile, out=out, fresh=fresh)
        elif several:
            _, results = run.sweep(names, profile, overrides, out, scheduler, workers, fresh=fresh)
        else:
            results = run.run(names, profile, points[0], out=out, fresh=fresh, jobs=jobs)
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(run.summary(results))
    place = out if several else os.path.join(out, os.path.relpath(run.folder(out, points[0]), out))
    shown = ["sweep.csv", "sweep.png"] if several else ["index.html"]
    made = [os.path.normpath(os.path.join(place, name)) for name in shown]
    print("Open", " and ".join(path for path in made if os.path.exists(path)))
    return any(result.status == "failed" for result in results)


def _record(name):
    """A record of the benchmark: a file, or by its profile one that ships."""
    records, notebook = _load("records"), _load("benchmark.grid").NOTEBOOK
    return records.committed(name, notebook) if name in ("lfw", "orl") else records.read(name)


def _bench(profile, overrides, out, scheduler, workers, compare, tables):
    if compare and tables:
        raise Invalid("--compare prints, --tables writes: give one of them.")
    if compare:
        table = _load("benchmark.statistics").compare(*map(_record, compare))
        print(table.to_string(index=False, na_rep="", float_format="{:.1f}".format))
        return None
    if tables:
        return list(map(str, _load("benchmark.tables").write(map(_record, ("lfw", "orl")), tables)))
    grid, profiles, run = (_load(name) for name in ("benchmark.grid", "course.profiles", "course.run"))
    notebook = profiles.NOTEBOOKS / f"{grid.NOTEBOOK}.ipynb"
    overrides, *more = profiles.spread([notebook], overrides)
    if more:
        raise Invalid("faceadv bench takes one value of each parameter: for several, use faceadv run 07.")
    values = profiles.defaults(notebook) | profiles.parameters(profile, notebook, overrides)
    place = run.folder(out, overrides) / "results" / profiles.label(profile) / grid.NOTEBOOK
    cells = [cell for part in grid.plan(values, grid.present(values["recogniser_names"])).values() for cell in part]
    rows = grid.run(cells, grid.settings(values), place, scheduler, workers)
    given = "".join(f" -p {name} {shlex.quote(value)}" for name, value in overrides.items())
    print(f"{len(rows)} cells are in {place}. To read them: faceadv run 07 --profile {profile}{given} --out {out}")


def _list(**where):
    kind = get_current_context().parent.info_name
    for row in _load({"data": "store.datasets", "weights": "store.weights"}[kind]).listing(**where):
        place = row.get("path") or row["found"] or f"not here: faceadv {kind} fetch {row['name']}"
        facts = filter(None, [row["what"], row["size"], row.get("licence"), str(place)])
        print(f"{row['name']:18}", f"\n{'':19}".join(facts))


def _weights_fetch(name):
    weights = _load("store.weights")
    return [weights.fetch(one) for one in ([row["name"] for row in weights.listing()] if name == "all" else [name])]


def _release(chosen, course, for_students):
    made = _load("course.assignments").release(chosen, course)
    return [*made, _load("course.exchange").students(course)] if for_students else made


def _grade(chosen, course):
    rows = _load("course.assignments").grade(chosen, course)
    for row in rows:
        unread = [key for key, value in row.items() if value is None]
        shown = row["error"] if "error" in row else f"{row['points']:g} of {row['of']:g}"
        waits = f", to be read: {', '.join(unread)}" if unread else ""
        print(f"{row['student']} {row['assignment']}: {shown}{waits}")
    table, pages = (os.path.join(course, name) for name in ("grades.csv", "feedback"))
    print(f"All points are in {table}, feedback pages in {pages}.")
    return any("error" in row for row in rows)


def _deidentify(source, target, models, ssim):
    made = _load("deidentify")
    rows = made.folder(source, target, models, ssim=ssim)
    nets = [*models, made.unseen(models)]
    faces = [row for row in rows if "face" in row]
    for row in rows:
        said = [f"{'hidden from' if row[f'{net}: hidden'] else 'recognised by'} {net}" for net in nets if "face" in row]
        said += [f"SSIM {row['SSIM']:.3f}"] if "face" in row else []
        said += [f"lost: {row['lost']}"] if row.get("lost") else []
        face = f" face {row['face']}" if "face" in row else ""
        print(f"{row['photo']}{face}: {', '.join([row['state'], *said])}")
    for net in nets:
        unused = "" if net in models else ", which the protection did not use"
        print(f"{sum(row[f'{net}: hidden'] for row in faces)} of {len(faces)} faces are hidden from {net}{unused}.")
    faceless, left = (sum(row["state"].startswith(s) for row in rows) for s in (made.NO_FACE, made.LEFT_OUT))
    print(f"{faceless} photos without a face were written without metadata, {left} files were left out.")
    report, page = (os.path.join(target, name) for name in (made.REPORT, made.PAGE))
    print(f"The list is in {report}. Pictures are in {page}, with the faces as they were: do not publish it.")


def _add(group, name, call, what, *parameters):
    """Add a command to a group. ``call`` is a function of this module, or the "module:function" of another."""

    def imported(**options):
        module, function = call.split(":")
        return getattr(_load(module), function)(**options)

    group.add_command(Command(name, callback=call if callable(call) else imported, params=[*parameters], help=what))


cli = Group("faceadv", help="Adversarial faces: a course in notebooks.", context_settings={"show_default": True})
version_option(__version__)(cli)
data = Group("data", help="List, fetch and check data sets.")
weights = Group("weights", help="List, fetch and check the weights of networks.")
sets = Group("assignments", help="Problem sets: student versions, checks, grades.")
for group in (data, weights, sets):
    cli.add_command(group)

NAME, NOTEBOOK = Argument(["name"]), Argument(["notebook"])
NOTEBOOKS = Argument(["names"], nargs=-1, metavar="[NN ...|all]")
SETS = Argument(["chosen"], nargs=-1, metavar="[NAME ...]")
SOURCE, TARGET = Argument(["source"], metavar="IN_DIR"), Argument(["target"], metavar="OUT_DIR")
LFW = Option(["--profile"], default="lfw", metavar="P", help="A set of parameters.")
OWN = Option(["--profile"], default="orl", metavar="P", help="A set of parameters: a name, or a file MINE.yaml.")
VALUES = r"A parameter; for run, several values with commas make one run each (\, is a comma in a value)."
P = Option(["-p", "overrides"], nargs=2, multiple=True, metavar="NAME VALUE", callback=_once, help=VALUES)
BUILD, OUT = (Option(["--out"], default=name, metavar="DIR", help="Folder of results.") for name in ("build", None))
WHERE = "local: one process for each core; single: this process; or the address of a Dask scheduler."
LOCAL, SINGLE = (Option(["--scheduler"], default=name, metavar="ADDRESS", help=WHERE) for name in ("local", "single"))
WORKERS = Option(["--workers"], type=int, metavar="N", help="Processes of a local scheduler.")
ROOT = Option(["--root"], metavar="DIR", help="Folder with data sets instead of FACEADV_DATA.")
TWO = Option(["--compare"], nargs=2, metavar="A B", help="Only compare two records: files, or lfw, or orl.")
TABLES = Option(["--tables"], metavar="DIR", help="Only write the shipped records' long table: CSV and Parquet.")
JOBS = Option(["--jobs"], default=1, metavar="N", help="How many notebooks run at a time.")
COURSE = Option(["--course"], default="course", metavar="DIR", help="Folder of the course.")
ZIP, PLATFORM = Argument(["archive"], metavar="FILE.zip"), Argument(["platform"], metavar="moodle|canvas")
FOR_STUDENTS = Option(["--for-students"], is_flag=True, help="Also COURSE/for-students.zip, all without solutions.")
FRESH = Option(["--fresh"], is_flag=True, help="Run even what has not changed.")
UPDATE = Option(["--update"], is_flag=True, help="Write results/ and the committed outputs anew (orl or lfw).")
MODELS = Option(["--model", "models"], default=("dlib", "mobilefacenet"), multiple=True, help="A recogniser to fool.")
LEAST = Option(["--ssim"], default=0.95, metavar="S", help="What is left of each face; less hides more.")
RESUME = Option(["--resume"], is_flag=True, help="Go on from the last checkpoint.")
SEED = Option(["--seed"], default=0, metavar="N", help="The seed of all random numbers.")

_add(cli, "run", _run, "Run notebooks; all by default.", NOTEBOOKS, OWN, P, BUILD, FRESH, SINGLE, WORKERS, JOBS, UPDATE)
_add(cli, "bench", _bench, "Compute notebook 07's cells in parallel.", OWN, P, BUILD, LOCAL, WORKERS, TWO, TABLES)
_add(cli, "check", "course.report:report", "Whether everything here is as it should be.")
_add(cli, "deidentify", _deidentify, "De-identify a folder of photos into a new folder.", SOURCE, TARGET, MODELS, LEAST)
_add(cli, "train", "training.loop:run", f"Train {', '.join(RECIPES)}.", NAME, LFW, RESUME, SEED, ROOT, OUT)
_add(cli, "ship", "training.loop:ship", "Put a network that was trained here into the package.", NAME, LFW, ROOT, OUT)
_add(data, "list", _list, "The data sets, and which are here.", ROOT)
_add(data, "fetch", "store.datasets:fetch", "Download one, checked.", NAME, ROOT)
_add(data, "check", "store.datasets:check", "Whether one is whole.", NAME, ROOT)
_add(weights, "list", _list, "The weights, and which are here.")
_add(weights, "fetch", _weights_fetch, "Download those of one network, or all, checked.", NAME)
_add(weights, "check", "store.weights:check", "Whether those that are here are whole.")
_add(sets, "release", _release, "Write the student versions, of all by default.", SETS, COURSE, FOR_STUDENTS)
_add(sets, "collect", "course.exchange:collect", "Take what students handed in out of a zip.", NAME, ZIP, COURSE)
_add(sets, "export", "course.exchange:export", "Write grades as Moodle or Canvas imports them.", PLATFORM, COURSE)
_add(sets, "check", "course.assignments:check", "For students: run the tests that they can see.", NOTEBOOK)
_add(sets, "grade", _grade, "Grade COURSE/submitted/STUDENT/NAME/NAME.ipynb of all students.", SETS, COURSE)
