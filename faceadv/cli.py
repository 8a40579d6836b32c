"""The command ``faceadv``: run the notebooks, fetch and check data and weights, train what ships."""

import argparse
import importlib
import os
import signal
import sys

from faceadv.errors import Invalid
from faceadv.store.paths import nearest

TRAINERS = {
    "mobile": "faceadv.training.mobile:main",
    "resgn": "faceadv.training.resgn:main",
    "puface": "faceadv.training.puface:main",
    "a3gn": "faceadv.training.a3gn:main",
    "prior": "faceadv.training.prior:main",
}


def main(argv=None):
    """Run one command and return its exit status: 0, 1 for a failure, 2 for a request that makes no sense.

    Errors that are to be expected are one sentence on stderr; FACEADV_DEBUG=1 shows the traceback.
    """
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except KeyboardInterrupt:
        print("faceadv: interrupted.", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as e:
        if os.environ.get("FACEADV_DEBUG"):
            raise
        print(f"faceadv: {' '.join(str(e).split()) or type(e).__name__}", file=sys.stderr)
        return 2 if isinstance(e, ValueError) else 1


def _parser():
    parser = argparse.ArgumentParser(prog="faceadv", description="Adversarial faces: a course in notebooks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run notebooks, keep the executed copies and an index page")
    run.add_argument("names", nargs="*", metavar="NN", help="notebooks by number or name; all of them by default")
    run.add_argument("--profile", help="a named set of parameters: smoke, orl (the default), lfw or paper")
    run.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="one parameter, for all named; several values, with commas, make one run each",
    )
    run.add_argument("--out", default="build", metavar="DIR", help="where executed copies go (build)")
    run.add_argument("--fresh", action="store_true", help="run even what has not changed")
    run.add_argument("--scheduler", default="single", metavar="ADDRESS", help="for several values: as for bench")
    run.add_argument("--workers", type=int, metavar="N", help="processes of a local scheduler")
    run.add_argument(
        "--update",
        action="store_true",
        help="regenerate the committed notebooks and results/ with profile orl",
    )
    run.set_defaults(command=_run)

    bench = commands.add_parser("bench", help="compute the cells of notebook 07, on several processes or machines")
    bench.add_argument("--profile", default="orl", help="smoke, orl (the default), lfw or paper")
    bench.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="one parameter")
    bench.add_argument(
        "--scheduler",
        default="local",
        metavar="ADDRESS",
        help="local (the default): a process a core; single: this process; or the address of a Dask scheduler",
    )
    bench.add_argument("--workers", type=int, metavar="N", help="processes of a local scheduler")
    bench.add_argument("--out", default="build", metavar="DIR", help="where finished cells go (build)")
    bench.set_defaults(command=_bench)

    for kind, what in (("data", "data sets"), ("weights", "network weights")):
        group = commands.add_parser(kind, help=f"list, fetch and check {what}").add_subparsers(
            required=True, metavar="ACTION"
        )
        actions = {
            "list": group.add_parser("list", help=f"the {what}, and which are here"),
            "fetch": group.add_parser("fetch", help="download one, checked"),
            "check": group.add_parser("check", help="whether what is here is whole"),
        }
        for action, sub in actions.items():
            if action == "fetch" or (action == "check" and kind == "data"):
                sub.add_argument("name", metavar="NAME")
            if kind == "data":
                sub.add_argument("--root", metavar="DIR", help="folder with data sets instead of FACEADV_DATA")
            sub.set_defaults(command=globals()[f"_{kind}_{action}"])

    sets = commands.add_parser("assignments", help="problem sets: student versions, checks, grades").add_subparsers(
        required=True, metavar="ACTION"
    )
    for action, what in (
        ("release", "write the student versions"),
        ("grade", "run the tests on COURSE/submitted/STUDENT/NAME/NAME.ipynb; writes feedback and grades.csv"),
    ):
        sub = sets.add_parser(action, help=what)
        sub.add_argument("names", nargs="*", metavar="NAME", help="ps1, ps2, …; all by default")
        sub.add_argument("--course", default="course", metavar="DIR", help="folder of the course (course)")
        sub.set_defaults(command=globals()[f"_assignments_{action}"])
    sub = sets.add_parser("check", help="for students: run the tests that they can see")
    sub.add_argument("notebook", metavar="NOTEBOOK")
    sub.set_defaults(command=_assignments_check)

    commands.add_parser("check", help="whether everything here is as it should be").set_defaults(command=_check)

    deidentify = commands.add_parser("deidentify", help="de-identify a folder of photos")
    deidentify.add_argument("source", metavar="IN_DIR", help="JPEG and PNG photos, in folders or not")
    deidentify.add_argument("target", metavar="OUT_DIR", help="a new folder, for the photos and report.csv")
    deidentify.add_argument("--model", default="dlib", help="the recogniser to protect from (dlib)")
    deidentify.set_defaults(command=_deidentify)

    train = commands.add_parser("train", help="train a network that ships")
    train.add_argument("name", metavar="NAME", help=", ".join(TRAINERS))
    train.add_argument("--profile", default="lfw", help="lfw by default: what ships is trained on it")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    train.set_defaults(command=_train)
    return parser


def _run(args):
    from faceadv.course import profiles, run

    names, overrides = args.names or ["all"], dict(args.p)
    # a polite kill ends like Ctrl-C, so that no kernel is left
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.update:
            if args.profile not in (None, "orl") or overrides:
                raise Invalid("--update regenerates the notebooks with profile orl as it is: no other profile, no -p.")
            results = run.update(names, out=args.out, fresh=args.fresh)
        elif (
            any("," in value for value in overrides.values()) and len(profiles.spread(run.select(names), overrides)) > 1
        ):
            _, results = run.sweep(
                names, args.profile or "orl", overrides, args.out, args.scheduler, args.workers, fresh=args.fresh
            )
            print(run.summary(results))
            print(f"All numbers are in {os.path.join(args.out, 'sweep.csv')}, each run in a folder beside it.")
            if os.path.exists(os.path.join(args.out, "sweep.png")):
                print(f"A figure of some is in {os.path.join(args.out, 'sweep.png')}.")
            return int(any(result.status == "failed" for result in results))
        elif args.scheduler != "single" or args.workers:
            raise Invalid("--scheduler and --workers are for several values of a parameter, such as -p eps_255 1,2.")
        else:
            results = run.run(names, args.profile or "orl", overrides, out=args.out, fresh=args.fresh)
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(run.summary(results))
    print(f"Open {os.path.join(args.out, 'index.html')}")
    return int(any(result.status == "failed" for result in results))


def _assignments_release(args):
    from faceadv.course import assignments

    for path in assignments.release(args.names, args.course):
        print(path)
    return 0


def _assignments_check(args):
    from faceadv.course import assignments

    return _report(assignments.check(args.notebook))


def _assignments_grade(args):
    from faceadv.course import assignments

    rows = assignments.grade(args.names, args.course)
    for row in rows:
        unread = [key for key, value in row.items() if value is None]
        shown = row["error"] if "error" in row else f"{row['points']:g} of {row['of']:g}"
        waits = f", to be read: {', '.join(unread)}" if unread else ""
        print(f"{row['student']} {row['assignment']}: {shown}{waits}")
    print(
        f"{os.path.join(args.course, 'grades.csv')} has every task, {os.path.join(args.course, 'feedback')} the pages."
    )
    return int(any("error" in row for row in rows))


def _bench(args):
    from faceadv import records
    from faceadv.benchmark import grid
    from faceadv.course import profiles

    notebook = profiles.NOTEBOOKS / f"{grid.NOTEBOOK}.ipynb"
    values = profiles.defaults(notebook) | profiles.parameters(args.profile, notebook, dict(args.p))
    parts = grid.plan(values, grid.present(values["recogniser_names"]))
    folder = records.place(os.path.join(args.out, "results"), args.profile, grid.NOTEBOOK).with_suffix("")
    cells = [cell for part in parts.values() for cell in part]
    rows = grid.run(cells, grid.settings(values), folder, args.scheduler, args.workers)
    print(f"{len(rows)} cells are in {folder}. Read them: faceadv run 07 --profile {args.profile} --out {args.out}")
    return 0


def _data_list(args):
    from faceadv.store import datasets

    for row in datasets.listing(args.root):
        where = row["found"] or f"not here: faceadv data fetch {row['name']}"
        print(f"{row['name']:8} {row['what']}\n         {row['size']}; {row['licence']}\n         {where}")
    return 0


def _data_fetch(args):
    from faceadv.store import datasets

    _known(args.name, datasets.listing(args.root), "data set")
    print(datasets.fetch(args.name, root=args.root))
    return 0


def _data_check(args):
    from faceadv.store import datasets

    _known(args.name, datasets.listing(args.root), "data set")
    return _report(datasets.check(args.name, root=args.root))


def _weights_list(args):
    from faceadv.store import weights

    for row in weights.listing():
        state = f"{row['size']}, {row['path']}" if row["found"] else f"not here: faceadv weights fetch {row['name']}"
        print(f"{row['name']:18} {row['what']}\n{'':18} {state}")
    return 0


def _weights_fetch(args):
    from faceadv.store import weights

    row = _known(args.name, weights.listing(), "network with weights")
    print(row["path"] if row["found"] else weights.fetch(args.name))
    return 0


def _weights_check(args):
    from faceadv.store import weights

    return _report(weights.check())


def _check(args):
    from faceadv.course import report

    return _report(report.report())


def _deidentify(args):
    from faceadv import deidentify

    unseen = "mobile" if args.model != "mobile" else "dlib"
    rows = deidentify.folder(args.source, args.target, args.model, unseen)
    faces = [row for row in rows if "face" in row]
    for row in rows:
        shown = f", {row['before']:.2f} -> {row['after']:.2f}, SSIM {row['ssim']:.3f}" if "face" in row else ""
        print(f"{row['photo']}{' face ' + str(row['face']) if 'face' in row else ''}: {row['state']}{shown}")
    hidden, unknown = sum(row["protected"] for row in faces), sum(row["unseen after"] >= 1 for row in faces)
    print(
        f"{hidden} of {len(faces)} faces are no longer recognised by {args.model}, and {unknown} by {unseen}, "
        f"which the protection was not made for. {os.path.join(args.target, deidentify.REPORT)} has the list."
    )
    return 0


def _train(args):
    from faceadv.course import profiles

    if args.name not in TRAINERS:
        raise Invalid(f'There is nothing called "{args.name}" to train{nearest(args.name, TRAINERS)}.')
    if args.profile not in profiles.names():
        profiles.load(args.profile)  # says which there are
    module, function = TRAINERS[args.name].split(":")
    print(getattr(importlib.import_module(module), function)(profile=args.profile, resume=args.resume))
    return 0


def _known(name, rows, what):
    """The row of that name. Raises ``ValueError``."""
    for row in rows:
        if row["name"] == name:
            return row
    names = [row["name"] for row in rows]
    raise Invalid(f'There is no {what} "{name}"{nearest(name, names)}; there are {", ".join(names)}.')


def _report(results):
    for ok, text in results:
        print(f"[{'OK' if ok else 'FAIL'}] {text}")
    return int(not all(ok for ok, _ in results))


if __name__ == "__main__":
    sys.exit(main())
