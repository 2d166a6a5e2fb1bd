"""What every part needs: a place for spools, daemons started and watched from outside, mails, and waiting."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import ptrace

AT_FIRST_USE = ["pprint", "gevent.threadpool", "gevent.resolver.thread", "encodings.idna", "encodings.utf_8_sig"]
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PATIENCE = 30  # seconds after which something hangs
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000
TRACEBACK = re.compile(r"Traceback|unexpected error|^\s+File \"|<Greenlet|Exception ignored", re.MULTILINE)


class CannotRun(Exception):
    """Something is missing here; the text says what, and how to get it."""


class Failure(Exception):
    """A promise was broken, or the program is so far gone that the case cannot go on; the text says how."""

    where = ""  # what was done to the program, in words
    log = ""  # what the program said


@contextlib.contextmanager
def explained(where, log):
    """A Failure that comes from inside says where and shows the log; both are functions."""
    try:
        yield
    except Failure as failure:
        failure.where, failure.log = where(), log()
        raise


class Settings(NamedTuple):
    """What is the same for every case of a run."""

    script: str
    python: str
    jobs: int


def wait_for(condition, seconds=PATIENCE, pause=0.004):
    """condition()'s first true value, or its last one when the time is over."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(pause)
    return value


def stretched(seconds):
    """As long as that may take when others want the processors, too."""
    return seconds * min(4, max(1, os.getloadavg()[0] / (os.cpu_count() or 1)))


def add_seed_arguments(parser, count, first):
    """The flags of a part whose cases are seeds."""
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--seeds", type=int, default=count, help=f"so many, from {first} on; {count:,} if not given")


def seeds_of(options, first, quick):
    """The seeds that were asked for; quick: how many there are of them in a quick run."""
    if options.seed is not None:
        return [options.seed] * options.times
    count = quick if options.quick else options.seeds
    return [*range(first, first + count)][:: options.every] * options.times


def keep_mounts_private():
    """Our mounts are in our namespace alone: a sandbox that copies all, as a browser's does, would keep them alive."""
    libc = ctypes.CDLL(None)
    if os.geteuid() == 0 and libc.unshare(CLONE_NEWNS) == 0:
        libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)


class Workshop:
    """A directory for the spools of one process of ours, and a zygote that starts daemons; nothing is left."""

    def __init__(self, settings):
        self.settings = settings
        place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a disk's syncs take most of the time
        self.directory = Path(tempfile.mkdtemp(prefix="spoolgore-crash-", dir=place))
        self.directory.chmod(0o755)  # another user may have to get at his spool
        self.count = 0
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        keep_mounts_private()
        self._zygotes = {}

    def close(self):
        for zygote in self._zygotes.values():
            zygote.stdin.close()
            zygote.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def new(self, name):
        """A new directory of this name, in a new one of its own; of the same length each time."""
        self.count += 1
        path = self.directory / f"{self.count:07}" / name
        path.mkdir(parents=True)
        return path

    def drop(self, path):
        """Remove what new() gave."""
        shutil.rmtree(path.parent, ignore_errors=True)

    def fork(self, request, cold=False):
        """The pid of a new process of the script. cold: gevent and Python import at its first use what they import
        then, else that is there already."""
        if cold not in self._zygotes:
            self._zygotes[cold] = self._start_zygote(() if cold else AT_FIRST_USE)
        zygote = self._zygotes[cold]
        zygote.stdin.write(json.dumps(request).encode() + b"\n")
        zygote.stdin.flush()
        return int(zygote.stdout.readline())

    def _start_zygote(self, modules):
        zygote = subprocess.Popen(
            [self.settings.python, HERE / "zygote.py", self.settings.script, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "HARNESS": str(os.getpid()), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        if zygote.stdout.readline() != b"ready\n":
            raise CannotRun(f"{self.settings.python} cannot run {self.settings.script}, see above")
        return zygote


class Daemon:
    """The script as a process, seen from outside."""

    def __init__(self, workshop, spool, flags, decide=None, calls=(), but_not_to=(), clock=None, cold=False, **request):
        """decide, calls, but_not_to: how ptrace.Tracer follows it, and at which calls; clock: a Clock; cold: see
        Workshop.fork; request: see zygote.py."""
        self.spool, self.log_path = Path(spool), Path(spool).parent / f"log{time.monotonic_ns()}"
        self.tracer, self._status = None, None
        gate = f"{self.log_path}.gate" if decide else None
        if gate:
            os.mkfifo(gate)
            request["filter"] = ptrace.seccomp_filter(calls, but_not_to).hex()
        self.pid = workshop.fork(
            {
                "argv": [*map(str, flags), str(spool)],
                "cwd": str(self.spool.parent),
                "log": str(self.log_path),
                "output": os.devnull,
                "clock": clock and str(clock.path),
                "gate": gate,
                **request,
            },
            cold,
        )
        if gate:
            self.tracer = ptrace.Tracer(self.pid, decide, lambda: os.close(os.open(gate, os.O_WRONLY)))

    # -- its life

    def poll(self):
        """The exit status as subprocess has it; None while it runs."""
        if self.tracer:
            return self.tracer.wait(0)
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def is_alive(self):
        return self.poll() is None

    def wait(self, seconds=PATIENCE):
        """The exit status. Raises Failure, and ends it, when it takes longer."""
        if self.tracer:
            self.tracer.wait(seconds)
        wait_for(lambda: not self.is_alive(), seconds)
        if self.is_alive():
            self.kill()
            raise Failure(f"it does not end within {seconds} s; its last words: {self.last_words()}")
        return self.poll()

    def signal(self, name):
        """Send it a signal; nothing happens if it has ended."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, getattr(signal, name))

    def kill(self):
        """Without any warning; waits until it is gone."""
        self.signal("SIGKILL")
        wait_for(lambda: not self.is_alive(), 5)

    def stop(self, seconds=15):
        """SIGTERM; its exit status."""
        self.signal("SIGTERM")
        return self.wait(seconds)

    # -- its words

    def log(self):
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def has_said(self, text):
        return text in self.log()

    def last_words(self):
        return " / ".join(self.log().splitlines()[-3:])

    def started(self):
        return self.has_said("--- starting Spoolgore")


class Clock:
    """The wall clock of a daemon, so many seconds ahead of ours."""

    def __init__(self, path, ahead=0.0):
        self.path, self.ahead = Path(path), 0.0
        self.path.write_bytes(struct.pack("d", 0.0))
        self.advance(ahead)

    def advance(self, seconds):
        self.ahead += seconds
        with open(self.path, "r+b") as file:
            file.write(struct.pack("d", self.ahead))


# ------------------------------------------------------------------- mails


class Mail(NamedTuple):
    """A mail as an application writes it, and as a relay is to get it."""

    name: str
    recipients: list
    text: bytes
    content: bytes


def make_mail(name, to, bcc=(), octets=300, line_end=b"\n", receivers=(), sender=None):
    """A mail that is told by the local part of its sender. receivers: instead of the header's, as envelope lines."""
    fields = [f"From: {name} <{sender or name}@app.example>", f"To: {', '.join(to)}", f"Subject: {name}"]
    fields += ["Date: Tue, 24 Nov 2026 06:37:24 +0000", f"Message-ID: <{name}@app.example>"]
    hidden = [f"Bcc: {', '.join(bcc)}"] if bcc else []
    envelope = [f"X-Receiver: {address}" for address in receivers]
    text = [*envelope, *fields[:2], *hidden, *fields[2:], "", *body(octets)]
    content = [*fields, "", *body(octets)]
    return Mail(name, [*(receivers or (*to, *bcc))], joined(text, line_end), joined(content, b"\r\n"))


def joined(lines, line_end):
    return b"".join(line.encode("utf-8") + line_end for line in lines)


def body(octets):
    """Lines that a careless hand would change: dots, blanks at the end, letters that are not ASCII."""
    lines = [".", "..", ".dot", "\tblanks behind  ", "Grüße", "From here on:", "", "."]
    return lines + ["x" * 70] * ((octets - 60) // 71)


class Hand:
    """What applications and people do to files. Each thing is one change of a directory, or of a file's content."""

    def create(self, path, text):
        with open(path, "wb") as file:
            file.write(text)

    def append(self, file, text):
        """To a file that is open."""
        file.write(text)

    def rename(self, old, new):
        """Raises FileNotFoundError when it is gone."""
        os.rename(old, new)

    def link(self, old, new):
        os.link(old, new)

    def put(self, spool, mail):
        """As an application should: aside, then renamed."""
        aside = os.path.join(spool, f".{mail.name}.tmp")
        self.create(aside, mail.text)
        self.rename(aside, os.path.join(spool, mail.name))


# ---------------------------------------------------------- the status file


def read_status(path):
    """The status file's entries by path. Raises Failure for anything that no daemon should leave behind."""
    try:
        entries = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise Failure(f"the status file does not parse: {error}") from None
    if not isinstance(entries, dict):
        raise Failure("the status file is no JSON object")
    for name, entry in entries.items():
        if not all(is_recipient(recipient) for recipient in recipients(entry)):
            raise Failure(f"malformed entry in the status file: {name}: {entry}")
    return entries


def recipients(entry):
    return [recipient for key in ("To", "Cc", "Bcc") for recipient in entry.get(key) or ()]


def is_recipient(recipient):
    return recipient["Status"] in (0, 1, 2) and isinstance(recipient["Error"], str) and "@" in recipient["Address"]


def states(entry):
    """A dict from address to "waiting", "delivered" or "given up"."""
    return {recipient["Address"]: state(recipient) for recipient in recipients(entry)}


def state(recipient):
    if recipient["Status"] != 2:
        return "waiting"
    return "given up" if recipient["Error"] else "delivered"


# ------------------------------------------------------------------ python


def python_with_gevent():
    """This python, or the one in .venv."""
    venv = ROOT / ".venv/bin/python"
    if find_spec("gevent") and find_spec("docopt"):
        return sys.executable
    if venv.exists():
        return str(venv)
    install = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
    raise CannotRun(f"gevent and docopt are missing: {install}")
