"""Part 2: a system call of the busy run fails, once or for a while; then all is well again.

The program goes on, or ends with one clear line. It heals by itself: the harness sends no signal that a user would not
have sent anyway, but lets the clock run fast, since much is tried again in a minute only.

A failing call is named by what it is made on and its number among those, from the opening of the lock on, which is the
same in most runs: the second openat of .spoolgore.js. "For a while" is that call and the next 50 of its kind, whatever
they are made on, in three seconds at most, or all of its kind for one second.

Not among them: epoll_ctl, at whose failure libev ends the process.
"""

import collections
import contextlib
import errno
import math
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import ptrace
from busy import Busy
from kill import Wreck
from relay import DIALECTS
from workshop import Failure, explained, wait_for

FILES = ("EIO", "EACCES", "ENOMEM")
ERRORS = {  # what each call may fail with; see their manual pages
    "openat": ("EIO", "EACCES", "EMFILE", "ENFILE", "ENOMEM"),
    "read": ("EIO",),
    "pread64": ("EIO",),
    "readlink": FILES,
    "newfstatat": FILES,
    "lstat": FILES,
    "stat": FILES,
    "fstat": ("EIO", "ENOMEM"),
    "statx": FILES,
    "getdents64": ("EIO",),
    "write": ("EIO", "ENOSPC"),
    "pwrite64": ("EIO", "ENOSPC"),
    "fsync": ("EIO", "ENOSPC"),
    "fdatasync": ("EIO", "ENOSPC"),
    "ftruncate": ("EIO", "ENOSPC"),
    "rename": ("EIO", "EACCES", "ENOSPC"),
    "renameat": ("EIO", "EACCES", "ENOSPC"),
    "renameat2": ("EIO", "EACCES", "ENOSPC"),
    "link": ("EIO", "EACCES", "ENOSPC"),
    "linkat": ("EIO", "EACCES", "ENOSPC"),
    "unlink": ("EIO", "EACCES"),
    "unlinkat": ("EIO", "EACCES"),
    "mkdir": ("EIO", "EACCES", "ENOSPC"),
    "mkdirat": ("EIO", "EACCES", "ENOSPC"),
    "utimensat": ("EIO", "EACCES"),
    "fchmod": ("EIO",),
    "fcntl": ("EAGAIN",),  # leases
    "flock": ("EIO", "ENOLCK"),
    "inotify_init1": ("EMFILE", "ENOMEM"),
    "inotify_add_watch": ("ENOSPC", "ENOMEM", "EACCES"),
    "socket": ("EMFILE", "ENOMEM"),
    "connect": ("ENETUNREACH", "EADDRNOTAVAIL", "ENOMEM"),
    "setsockopt": ("ENOMEM",),
    "getsockname": ("ENOMEM",),
    "sendto": ("EIO", "ENOMEM", "ECONNRESET"),
    "recvfrom": ("EIO", "ENOMEM", "ECONNRESET"),
    "clone": ("EAGAIN", "ENOMEM"),
    "clone3": ("EAGAIN", "ENOMEM"),
    "mmap": ("ENOMEM",),
    "eventfd2": ("EMFILE", "ENOMEM"),
    "epoll_create1": ("EMFILE", "ENOMEM"),
    "pipe2": ("EMFILE",),
    "execve": ("EIO", "ENOMEM"),
}
ERRORS_ON = {  # of which only some are possible there, or some more
    ("openat", ".spoolgore.lock"): ("EIO", "EACCES", "EMFILE", "ENFILE", "ENOMEM", "ENOSPC"),
    ("openat", ".spoolgore.js.new"): ("EIO", "EACCES", "EMFILE", "ENFILE", "ENOMEM", "ENOSPC"),
    ("write", "log"): ("EIO", "ENOSPC", "EAGAIN"),
    ("write", "eventfd"): (),
    ("read", "eventfd"): (),
    ("newfstatat", "library"): (),  # of Python's own import
    ("readlink", "library"): (),
    ("getdents64", "library"): (),
    ("fcntl", ".spoolgore.lock"): ("EIO", "ENOLCK", "EAGAIN"),
}
STATS = {"stat", "lstat", "newfstatat"}
ON_SOCKETS = {"sendto", "recvfrom", "connect", "setsockopt", "socket", "mmap", "read", "getsockname"}
CONVERSATION = {"sendto", "recvfrom", "connect", "write"}  # differs from dialect to dialect
SPANS = ("once", "50", "second")
LEASE_AND_LOCK = {1024, 5, 6, 7, 36, 37, 38}  # the commands of fcntl that may fail
HEALING_SECONDS = 20
MINUTE = 61
IDLE_SECONDS = 0.4  # so long it is watched when it has nothing to do
SAME_LINES = 3  # more than it has causes to say the same
IMPATIENCE = 2.5  # a step of the run that an error has undone is not waited for any longer


class Case(NamedTuple):
    dialect: str
    call: str
    on: str
    number: int
    error: str
    span: str
    start: bool = False  # in the start of a daemon that finds the state of an earlier one

    @property
    def command(self):
        on, start = f" --on '{self.on}'" if self.on else "", " --start" if self.start else ""
        return (
            f"errors --dialect {self.dialect} --call {self.call}{on} --number {self.number} --error {self.error} "
            f"--for {self.span}{start}"
        )


def add_arguments(parser):
    parser.add_argument("--dialect", choices=DIALECTS)
    parser.add_argument("--call", choices=ERRORS)
    parser.add_argument("--on", default="", help="only calls on this: a file's name, socket, inotify, ...")
    parser.add_argument("--number", type=int)
    parser.add_argument("--error")
    parser.add_argument("--for", dest="span", choices=SPANS)
    parser.add_argument("--start", action="store_true", help="in the start that finds the state of an earlier daemon")


def missing():
    return ptrace.missing()


def remarks(notes):
    counted = collections.Counter(notes)
    words = {"ended": "ended and said why", "not reached": "not reached"}
    return [f"{counted[note]} {text}" for note, text in words.items() if counted[note]]


# ------------------------------------------------------------------ cases


def cases(workshop, options):
    if options.number:
        names = [options.error] if options.error else ERRORS[options.call]
        spans = [options.span] if options.span else SPANS
        place = (options.dialect or "pipelining", options.call, options.on, options.number)
        return [Case(*place, error, span, options.start) for error in names for span in spans] * options.times
    found = list(in_start(workshop, options.dialect or "pipelining", options))
    for dialect in [options.dialect] if options.dialect else ["pipelining"] if options.quick else DIALECTS:
        some = in_run(workshop, dialect, options)
        found += [case for case in some if dialect in (options.dialect, "pipelining") or case.call in CONVERSATION]
    if options.call:
        found = [case for case in found if case.call == options.call and options.error in (None, case.error)]
    return found[:: 60 if options.quick else options.every] * options.times


def in_run(workshop, dialect, options):
    """At each kind of call, on each thing that it is made on: the first, the middle one, the last, once; and from the
    first and the middle one on for a while."""
    recorder = Injector(None)
    with contextlib.closing(Busy(workshop, dialect, options.features)) as busy:
        busy.prepare()
        busy.start(decide=recorder, calls=ERRORS, cold=True)
        live(busy, recorder)
        busy.daemon.stop()
    whiles = set()
    for (call, on), total in sorted(recorder.counts.items()):
        first = recorder.counts_of_start[call, on] + 1
        some = sorted({first, (first + total) // 2, total}) if first <= total else []
        for error in errors_of(call, on):
            yield from (Case(dialect, call, on, number, error, "once") for number in some)
            if some and (call, error) not in whiles:
                whiles.add((call, error))
                yield from (Case(dialect, call, on, some[0], error, span) for span in SPANS[1:])


def in_start(workshop, dialect, options):
    """Every call between the opening of the lock and the first words of a daemon that has something to find."""
    recorder = Injector(None)
    with contextlib.closing(Busy(workshop, dialect, options.features)) as busy:
        begin_again(busy, recorder, ERRORS)
        busy.daemon.stop()
    for (call, on), total in sorted(recorder.counts_of_start.items()):
        for number in range(1, total + 1) if call != "mmap" else range(1, total + 1, 5):
            yield from (Case(dialect, call, on, number, error, "once", True) for error in errors_of(call, on))


def errors_of(call, on):
    found = ERRORS_ON.get((call, on), ERRORS[call])
    may_be_mail = not on.startswith(".") and (call == "openat" or (call in STATS and on != "spool"))
    if may_be_mail:  # one that may not be read is held until its file changes
        found = [error for error in found if error != "EACCES"]
    return found


def begin_again(busy, decide, calls):
    """A daemon on a spool with a past: some was delivered, some deferred, some given up."""
    busy.prepare()
    busy.start()
    busy.wait_for_first()
    busy.daemon.stop()
    busy.renames = False  # who has a mail that is renamed while no daemon looks is not known
    busy.start(decide=decide, calls=calls, cold=True)
    wait_for(lambda: busy.daemon.started() or not busy.daemon.is_alive())


class Injector:
    """Decides: these calls fail. case None: none does, they are only counted."""

    def __init__(self, case):
        self.case = case
        self.counts, self.counts_of_start = collections.Counter(), collections.Counter()
        self.begun = self.started = False
        self.failed = []  # (when, text) of each
        self.until = 0.0
        self.left = 0

    def __call__(self, call):
        if not self.begun:
            self.begun = call.name == "openat" and call.path(1).endswith("spoolgore.lock")
        if not self.begun or (call.name == "fcntl" and call.arguments[1] not in LEASE_AND_LOCK):
            return None
        on = place(call)
        if not self.started and on == "log" and b"--- starting" in call.memory(call.arguments[1], 64):
            self.started = True
        self.count(call.name, on)
        return self.answer(call, on) if self.case else None

    def count(self, name, on):
        for counts in (self.counts, *([] if self.started else [self.counts_of_start])):
            counts[name, on] += 1

    def answer(self, call, on):
        case = self.case
        number = sum(n for (name, where), n in self.counts.items() if name == case.call and case.on in ("", where))
        if call.name != case.call:
            return None
        if case.on in ("", on) and number == case.number and not self.failed:
            self.until = time.monotonic() + (1 if case.span == "second" else 3)
            self.left = {"once": 1, "50": 51, "second": math.inf}[case.span]
        if self.is_over() or case.error not in errors_of(call.name, on):
            return None
        self.left -= 1
        self.failed.append((time.monotonic(), f"{call}"))
        return getattr(errno, case.error)

    def summary(self):
        first = self.failed[0][1] if self.failed else "none"
        return f"{len(self.failed)} calls failed, first {first}"

    def is_over(self):
        """Whether no call fails any more."""
        return time.monotonic() > self.until or self.left <= 0


def place(call):
    """What a call is made on, in a word that is the same in each run."""
    paths = call.paths()
    if paths:
        return word(paths[0])
    if call.name in ptrace.ON_DESCRIPTORS:
        return "log" if call.name == "write" and call.arguments[0] == 2 else word(call.descriptor())
    return ""


def word(path):
    kind = re.match(r"(socket|pipe|anon_inode):\[?(\w*)", path)
    if kind:
        return kind[2] if kind[1] == "anon_inode" else kind[1]
    if path.endswith((".py", ".pyc", ".so")) or "/lib/" in path or path.startswith(("/etc/", "/usr/")):
        return "library"
    return os.path.basename(path.rstrip("/"))


# -------------------------------------------------------------------- run


def run(workshop, case, options):
    """Raises Failure. Returns "ended" if the daemon did, and said why, "not reached" if no such call was made."""
    injector = Injector(case)
    busy = Busy(workshop, case.dialect, options.features)
    with contextlib.closing(busy), explained(injector.summary, busy.words):
        return disturbed(busy, injector)


def disturbed(busy, injector):
    case = injector.case
    busy.step_seconds = IMPATIENCE
    calls = {case.call, "openat", "write"}
    began = time.monotonic()
    if case.start:
        begin_again(busy, injector, calls)
    else:
        busy.prepare()
        busy.start(decide=injector, calls=calls, cold=True)
    live(busy, injector)
    if busy.daemon.is_alive():
        check_cpu(busy.daemon, time.monotonic() - began)
        check_lock(busy)
        busy.daemon.stop()
    wreck = None
    if busy.daemon.poll():
        check_ending(busy.daemon)
        wreck, busy.may_miss_news = Wreck(busy), True
        busy.relay.wait_for_silence()
        busy.start_again()
    busy.judge(lambda *twice: why_not_twice(busy, injector, wreck, *twice))
    check_repetitions(busy)
    if not injector.failed:
        return "not reached"
    return "ended" if wreck else ""


def live(busy, injector):
    """The busy run until every mail has gone its way by itself; only then it is flushed, to no purpose."""
    busy.work(finish=False)
    if busy.daemon.is_alive():
        heal(busy, injector)
        busy.daemon.signal("SIGURG")
        time.sleep(0.2)


def heal(busy, injector):
    """Until every mail has gone its way. Raises Failure if that does not come by itself."""
    wait_for(injector.is_over, 5)
    end = time.monotonic() + HEALING_SECONDS
    while busy.mails_left() and time.monotonic() < end and busy.daemon.is_alive():
        wait_for(lambda: not busy.mails_left() or not busy.daemon.is_alive(), 0.6)
        busy.clock.advance(MINUTE)
    if (left := busy.mails_left()) and busy.daemon.is_alive():
        minutes = HEALING_SECONDS / 0.6
        raise Failure(f"does not heal: {' '.join(sorted(left))} still there after {minutes:.0f} minutes of its clock")


def check_ending(daemon):
    """A daemon that ends by itself says why in one clear line, and exits with 1."""
    status = daemon.poll()
    if status < 0:
        raise Failure(f"it died of signal {-status}; {daemon.last_words()}")
    if status not in (1, 75):
        raise Failure(f"exit status {status}; {daemon.last_words()}")
    line = (daemon.log().splitlines() or [""])[-1]
    if not re.match(r"\d{4}/\d\d/\d\d [\d:]+ \S", line) or line[20:] in map(os.strerror, errno.errorcode):
        raise Failure(f"it ended without a clear line; {daemon.last_words()}")


def check_lock(busy):
    """The spool is still this daemon's: a second one must not start."""
    status = busy.run_beside()
    if status != 1:
        raise Failure(f"it has lost its lock: a second daemon starts (exit status {status})")
    if not busy.daemon.is_alive():
        raise Failure(f"it ended when a second daemon tried to start; {busy.daemon.last_words()}")


def check_cpu(daemon, seconds):
    """It waits for what it cannot do, and does not try at once again and again. seconds: since its start."""
    if (used := cpu(daemon.pid)) > 1 + seconds / 4:
        raise Failure(f"it spins: {used:.1f} s of CPU in {seconds:.1f} s")
    check_rest(daemon)


def check_rest(daemon):
    """When nothing is to be done it does nothing."""
    before = cpu(daemon.pid)
    time.sleep(IDLE_SECONDS)
    if (used := cpu(daemon.pid) - before) > IDLE_SECONDS / 5:
        raise Failure(f"it spins when idle: {used:.2f} s of CPU in {IDLE_SECONDS} s")


def cpu(pid):
    """Seconds that all threads of a process have run."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def check_repetitions(busy):
    """No line is said again and again for the same cause."""
    for daemon in busy.logs:
        said = collections.Counter(line[20:] for line in daemon.log().splitlines())
        line, count = max(said.items(), key=lambda each: each[1], default=("", 0))
        if count > SAME_LINES:
            raise Failure(f"said {count} times: {line}")


def why_not_twice(busy, injector, wreck, mail, address, transactions):
    """A doubt about a connection on which a call failed is a reason to send again, if the log says so; so is the end of
    the daemon, as a kill is."""
    lines = [line for daemon in busy.logs for line in daemon.log().splitlines() if address in line]
    if injector.case.call in ON_SOCKETS and injector.failed and any("may have arrived" in line for line in lines):
        return ""
    return wreck.why_not_twice(mail, address, transactions) if wreck else "no doubt was said, no kill"
