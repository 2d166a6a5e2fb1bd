#!/usr/bin/env python3
"""Breaks spoolgore.py in every way that a machine can, starts it again, and counts who got which mail how often.

    python .ci/crash           every part; up to an hour
    python .ci/crash quick     some of every part, always the same; under a minute
    python .ci/crash PART      one part; with its flags, one case: python .ci/crash PART -h

The parts:

    kill        killed at every system call of a busy run, in each dialect (plain, PIPELINING, CHUNKING)
    errors      every system call fails, once and for a while
    power       every state that a power cut may leave, as far as it is not ruled out by a sync; and a real file system
    relay       a relay that lies, is silent, babbles, hangs up
    resources   too few descriptors, no memory, a full disk, a clock that jumps, and more
    fuzz        its users rename, hold, swap, touch and bring back files at any moment
    judges      broken copies of the program, which the other parts must find; not in quick

It drives the program from outside only, but for fuzz: its command line, files in the spool, the status file, the log,
signals. So the script under test may be any (--script), under any Python (--python) that has gevent and docopt.

How to read the table:

- Tried: runs with one kill, error, power cut, seed or shortage each, each on a spool of its own. Survived: those after
  which the program, started again where it had ended, had given every mail to everybody who was to have it, octet by
  octet, and to nobody twice but who was under way; what was given up lies in .failed with its reason; the status file
  could be read at every moment; no traceback was logged, and what failed healed by itself.
- Under the table stands each case that did not, with the command that repeats it. Threads and sockets have a will of
  their own: where a case does not fail again at once, --times 20 tries it so often.
- What this machine lacks is said, and how to get it; the other parts go on. With CI=true in the environment that is a
  failure.

A process is not started from its interpreter for each case: zygote.py imports what the script imports, and forks.
Spools are in memory where that is to be had, since a kill does not lose what was written; else TMPDIR says where.
"""

import argparse
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

if sys.platform != "linux":
    sys.exit("It needs Linux: use a virtual machine, or a container that may use ptrace.")

import errors
import fuzz
import hostile
import judges
import kill
import power
import resources
from features import features_of
from workshop import ROOT, CannotRun, Failure, Settings, Workshop, python_with_gevent

PARTS = {
    "kill": kill,
    "errors": errors,
    "power": power,
    "relay": hostile,
    "resources": resources,
    "fuzz": fuzz,
    "judges": judges,
}
CASE_SECONDS = 600  # no case takes longer, unless something hangs that should not
SHOWN = 8  # commands for each kind of failure


class Result(NamedTuple):
    """What became of one case. trouble: empty if it survived; where: what was done to it; note: for the remarks."""

    part: str
    command: str
    trouble: str = ""
    where: str = ""
    log: str = ""
    note: str = ""
    seconds: float = 0.0


class Row(NamedTuple):
    """One line of the table."""

    part: str
    tried: str
    survived: str
    failed: str
    remarks: str


def main(argv):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # as an exception, so that everything is cleaned up
    os.environ.pop("NOTIFY_SOCKET", None)
    results = []
    try:
        options = parse(argv)
        remarks = run_all(options, results)
    except CannotRun as error:
        sys.exit(str(error))
    finally:
        power.tidy([result.command for result in results if result.trouble])
    print_table([row(name, [each for each in results if each.part == name], remarks[name]) for name in options.parts])
    failures = [result for result in results if result.trouble]
    print_failures(failures, options)
    untried = [name for name in options.parts if not any(each.part == name for each in results)]
    print(f"\n{time.monotonic() - options.started:.0f} s in all{'; not tried: ' * bool(untried)}{', '.join(untried)}")
    sys.exit(1 if failures or (untried and os.environ.get("CI") == "true") else 0)


# ---------------------------------------------------------- command line


def parse(argv):
    parser = argparse.ArgumentParser(
        "python .ci/crash", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--script", default=str(ROOT / "spoolgore.py"), help="the program under test")
    common.add_argument("--python", help="the interpreter that runs it; this one, or .venv's")
    common.add_argument("--jobs", type=int, default=3 * (os.cpu_count() or 1), help="cases at once; most only wait")
    common.add_argument("--times", type=int, default=1, help="try each case so often")
    common.add_argument("--log", action="store_true", help="show what the program said where it failed")
    common.add_argument("--every", type=int, default=1, help="only every so-many-th case")
    commands = parser.add_subparsers(dest="part", metavar="PART")
    commands.add_parser("quick", parents=[common], help="some of every part")
    parsers = {name: commands.add_parser(name, parents=[common], help=summary(part)) for name, part in PARTS.items()}
    for name, part in PARTS.items():
        part.add_arguments(parsers[name])
    if not argv or argv[0].startswith("--"):
        argv = ["all", *argv]
        commands.add_parser("all", parents=[common])
    options = parser.parse_args(argv)
    options.quick = options.part == "quick"
    options.parts = [options.part] if options.part in PARTS else list(PARTS)[: -1 if options.quick else None]
    options.script = str(Path(options.script).resolve())
    options.python = options.python or python_with_gevent()
    options.started = time.monotonic()
    options.defaults = {name: vars(parsers[name].parse_args([])) for name in options.parts}
    return options


def options_of(part, options):
    """With the flags of this part, given or not."""
    return argparse.Namespace(**{**options.defaults[part], **vars(options)})


def summary(part):
    return part.__doc__.partition(": ")[2].partition("\n")[0]


def machine(options):
    version = ".".join(map(str, sys.version_info[:3]))
    return f"{os.cpu_count()} cores, Linux {os.uname().release}, Python {version}, {options.script}"


# ------------------------------------------------------------------ running


def run_all(options, results):
    """Fill the results of all parts that were asked for; returns a dict from part to remarks."""
    settings = Settings(options.script, options.python, options.jobs)
    remarks = {name: [lacking] for name in options.parts if (lacking := PARTS[name].missing())}
    able = [name for name in options.parts if name not in remarks]
    with multiprocessing.get_context("fork").Pool(settings.jobs, enter, (settings, options)) as pool:
        options.features = pool.apply(probe)
        print(f"{machine(options)}; features: {', '.join(options.features) or 'none of the later ones'}\n")
        running = []
        for name, cases in pool.imap_unordered(find_cases, [(name, options_of(name, options)) for name in able]):
            print(f"{name}: {len(cases):,} cases", flush=True)
            running += [pool.apply_async(run_case, [(name, case, options_of(name, options))]) for case in cases]
        for each in running:
            results.append(shown(each.get(), options))
        pool.close()
        pool.join()
    for name in able:
        remarks[name] = PARTS[name].remarks([each.note for each in results if each.part == name and each.note])
    return remarks


def enter(settings, options):
    """What each process of the pool has."""
    global workshop
    sys.setswitchinterval(0.0002)  # the tracer's thread does not wait for long
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of every finally
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that leads us ends us
    signal.signal(signal.SIGALRM, too_long)
    workshop = Workshop(settings)
    multiprocessing.util.Finalize(workshop, workshop.close, exitpriority=1)


def probe():
    """Which of the later features the script has."""
    return features_of(workshop)


def find_cases(task):
    name, options = task
    return name, PARTS[name].cases(workshop, options)


def run_case(task):
    name, case, options = task
    began = time.monotonic()
    signal.alarm(CASE_SECONDS)
    result = Result(name, case.command)
    try:
        result = result._replace(note=PARTS[name].run(workshop, case, options) or "")
    except Failure as failure:
        result = result._replace(trouble=str(failure), where=failure.where, log=failure.log)
    except Exception:  # noqa: BLE001 -- one case must not end all others
        result = result._replace(trouble="a fault of .ci/crash itself", log=traceback.format_exc())
    signal.alarm(0)
    return result._replace(seconds=time.monotonic() - began)


def too_long(*_):
    raise Failure(f"it took longer than {CASE_SECONDS} s")


def shown(result, options):
    """The result, of which what failed is printed at once."""
    if result.trouble:
        print(": ".join(filter(None, [result.command, result.where, result.trouble])), flush=True)
        print(result.log if options.log or result.trouble.startswith("a fault") else "", end="", flush=True)
    return result


# ---------------------------------------------------------------- the table


def row(name, results, remarks):
    failed = sum(bool(result.trouble) for result in results)
    remarks = [f"{sum(result.seconds for result in results):,.0f} s, several at once"] * bool(results) + remarks
    return Row(name, f"{len(results):,}", f"{len(results) - failed:,}", f"{failed:,}", "; ".join(remarks))


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
            print(f"    python .ci/crash {failure.command}{script}{failure.where and '  # '}{failure.where}")
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
