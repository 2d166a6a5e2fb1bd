#!/usr/bin/env python3
"""Breaks spoolgore.py in every way that a machine can, starts it again, and counts who got which mail how often.

    python .ci/crash           every part; up to an hour
    python .ci/crash quick     some of every part, always the same; under a minute
    python .ci/crash PART      one part; with its flags, one case: python .ci/crash PART -h

The parts:

    kill        killed at every system call of a busy run, in each dialect (plain, PIPELINING, CHUNKING)
    errors      every system call fails, once and for a while
    power       every state that a power cut may leave, as far as it is not ruled out by a sync; and a real file system

It drives the program from outside only: its command line, files in the spool, the status file, the log, signals. So the
script under test may be any (--script), under any Python (--python) that has gevent and docopt.

How to read the table:

- Tried: runs with one kill, error, power cut, seed or shortage each, each on a spool of its own. Survived: those after
  which the program, started again where it had ended, had given every mail to everybody who was to have it, octet by
  octet, and to nobody twice but who was under way; what was given up lies in .failed with its reason; the status file
  could be read at every moment; no traceback was logged, and what failed healed by itself.
- Under the table stands each case that did not, with the command that repeats it. Threads and sockets have a will of
  their own: where a case does not fail again at once, --times 20 tries it so often.
- What this machine lacks is said, and how to get it; the other parts go on.

A process is not started from its interpreter for each case: zygote.py imports what the script imports, and forks.
Spools are in memory where that is to be had, since a kill does not lose what was written; else TMPDIR says where.
"""

import argparse
import multiprocessing
import os
import re
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import errors
import kill
import power
from features import features_of
from workshop import ROOT, CannotRun, Failure, Settings, Workshop, python_with_gevent

PARTS = {"kill": kill, "errors": errors, "power": power}
SHOWN = 8  # commands for each kind of failure


class Result(NamedTuple):
    """What became of one case. trouble: empty if it survived; where: what was done to it; note: for the remarks."""

    command: str
    trouble: str = ""
    where: str = ""
    log: str = ""
    note: str = ""


class Row(NamedTuple):
    """One line of the table."""

    part: str
    tried: str
    survived: str
    failed: str
    remarks: str


def main(argv):
    options = parse(argv)
    settings = Settings(options.script, options.python, options.jobs)
    os.environ.pop("NOTIFY_SOCKET", None)
    try:
        options.features = probe(settings)
        print(f"{machine(options)}; the script has {', '.join(options.features) or 'neither of the later features'}\n")
        results = {name: run_part(name, settings, options) for name in options.parts}
    except CannotRun as error:
        sys.exit(str(error))
    print_table([row(name, *found) for name, found in results.items()])
    failures = [result for found, _ in results.values() for result in found if result.trouble]
    print_failures(failures, options)
    sys.exit(1 if failures else 0)


# ---------------------------------------------------------- command line


def parse(argv):
    parser = argparse.ArgumentParser(
        "python .ci/crash", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--script", default=str(ROOT / "spoolgore.py"), help="the program under test")
    common.add_argument("--python", help="the interpreter that runs it; this one, or .venv's")
    common.add_argument("--jobs", type=int, default=2 * (os.cpu_count() or 1), help="cases at once; most only wait")
    common.add_argument("--times", type=int, default=1, help="try each case so often")
    common.add_argument("--log", action="store_true", help="show what the program said where it failed")
    common.add_argument("--every", type=int, default=1, help="only every so-many-th case")
    whole = argparse.ArgumentParser(add_help=False)
    commands = parser.add_subparsers(dest="part", metavar="PART")
    commands.add_parser("quick", parents=[common, whole], help="some of every part")
    for name, part in PARTS.items():
        part.add_arguments(commands.add_parser(name, parents=[common], help=part.__doc__.partition(":")[2].strip()))
    if not argv or argv[0].startswith("--"):
        argv = ["all", *argv]
        commands.add_parser("all", parents=[common, whole])
    options = parser.parse_args(argv)
    options.quick = options.part == "quick"
    options.parts = [options.part] if options.part in PARTS else list(PARTS)
    options.script = str(Path(options.script).resolve())
    options.python = options.python or python_with_gevent()
    options.started = time.monotonic()
    return options


def machine(options):
    version = ".".join(map(str, sys.version_info[:3]))
    return f"{os.cpu_count()} cores, Linux {os.uname().release}, Python {version}, {options.script}"


def probe(settings):
    """Which of the later features the script has."""
    workshop = Workshop(settings)
    try:
        return features_of(workshop)
    finally:
        workshop.close()


# ------------------------------------------------------------------ running


def run_part(name, settings, options):
    """(results, remarks) of one part."""
    part = PARTS[name]
    if lacking := part.missing():
        print(f"{name}: not run, {lacking}")
        return [], f"not run: {lacking}"
    context = multiprocessing.get_context("fork")
    started = time.monotonic()
    with context.Pool(settings.jobs, enter, (name, settings, options)) as pool:
        cases = pool.apply(find_cases)
        print(f"{name}: {len(cases)} cases", flush=True)
        results = []
        for result in pool.imap_unordered(run_case, cases):
            results.append(result)
            if result.trouble:
                print(f"{name}: {result.command}: {result.where}: {result.trouble}", flush=True)
                print(result.log if options.log else "", end="", flush=True)
    if hasattr(part, "tidy"):
        part.tidy([result.command for result in results if result.trouble])
    remarks = part.remarks([result.note for result in results if result.note])
    return results, ", ".join([f"{time.monotonic() - started:.0f} s", *remarks])


def enter(name, settings, options):
    """What each process of the pool works with."""
    global workshop, part, chosen
    sys.setswitchinterval(0.0002)  # the tracer's thread does not wait for long
    workshop, part, chosen = Workshop(settings), PARTS[name], options
    multiprocessing.util.Finalize(workshop, workshop.close, exitpriority=1)


def find_cases():
    return part.cases(workshop, chosen)


def run_case(case):
    try:
        return Result(case.command, note=part.run(workshop, case, chosen) or "")
    except Failure as failure:
        return Result(case.command, str(failure), failure.where, failure.log)
    except Exception:  # noqa: BLE001 -- one case must not end all others
        traceback.print_exc()
        return Result(case.command, "a fault of this program, see the traceback")


# ---------------------------------------------------------------- the table


def row(name, results, remarks):
    failed = sum(bool(result.trouble) for result in results)
    return Row(name, f"{len(results):,}", f"{len(results) - failed:,}", f"{failed:,}", remarks)


def print_table(rows):
    """As Markdown that is fit to be read as it is."""
    cells = [Row("part", "tried", "survived", "failed", "remarks"), *rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    print("\n".join(["", lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]))


def print_failures(failures, options):
    """Some of each kind, with the command that repeats it. All were printed when they happened."""
    kinds = {}
    for failure in failures:
        kinds.setdefault(kind_of(failure.trouble), []).append(failure)
    script = f" --script {shlex.quote(options.script)}" if options.script != str(ROOT / "spoolgore.py") else ""
    for same in sorted(kinds.values(), key=len, reverse=True):
        print(f"\n{len(same)} x {same[0].trouble}")
        for failure in same[:SHOWN]:
            print(f"    python .ci/crash {failure.command}{script}  # {failure.where}")
        if len(same) > SHOWN:
            print(f"    and {len(same) - SHOWN} more, see above")


def kind_of(trouble):
    """What is the same in failures of one kind: not who, where, when or how often."""
    trouble = re.sub(r"\S+@x\.example of \S+", "somebody", trouble)
    trouble = re.sub(r"there after .*|; .*", "", re.sub(r"/\S+", "PATH", trouble))
    trouble = re.sub(r"(?<=does not heal: ).* (?=still)", "", trouble)
    return re.sub(r"\d+(\.\d+)?", "N", trouble)


if __name__ == "__main__":
    main(sys.argv[1:])
