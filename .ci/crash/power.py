"""Part 3: the power is cut, and of what was not synced any part may be on the disk.

A busy run is recorded: every change of a directory or of a file's content, and every sync. Then, for each moment of
the run, the states are made that a file system may leave which orders nothing but what was synced:

- A change of a directory (create, link, rename, unlink, mkdir) whose directory was not synced since may have happened
  or not, each by itself, but none by half. A rename between two directories lasts when either is synced. What was put
  into a directory that is itself lost is lost with it.
- Content that was not synced since it was written may be there, not there, or torn: with half of what was written.
- What applications and people do to the spool is synced by them: they are not under test.

With up to four changes in doubt every subset is tried; with more all of them, none, each prefix, each alone, all but
each, and some at random, seeded. Equal states are tried once. In each state a daemon is started, with the relay
knowing what it had been given until then. Nobody may be lost, and again goes only what was delivered in the last
moments. "Ordered" in a failure means that it also happens where a file system keeps the order of its changes, as most
do; "unordered" that it takes one that does not.

A status file on another file system (-json) is the second mode: its syncs say nothing about the spool.

Where root, mkfs.ext4 and a loop device are to be had, the power is also cut for real: ext4 is shut down without
flushing its journal (EXT4_IOC_SHUTDOWN) at some of the calls of part 1, in a run without -rate, whose syncs would
make all the rest last.
"""

import contextlib
import fcntl
import functools
import glob
import itertools
import os
import pickle
import random
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from typing import NamedTuple

import kill
import ptrace
from busy import DAY, Busy
from relay import DIALECTS
from workshop import Failure, Hand, explained, stretched

AGAIN_SECONDS = 2.0  # what was delivered so shortly before the cut may go again
PAUSE = 2.5  # longer than that
EXHAUSTIVE, RANDOM = 4, 6  # so many changes in doubt are tried in every subset; so many random subsets of more
RECORDING = "spoolgore-power"
MODES = ("home", "elsewhere")  # where the status file is: in the spool, or on another file system
CALLS = [*kill.CHANGES_FILES, *kill.SYNCS]
UNKNOWN = {
    "creat",
    "rmdir",
    "symlink",
    "symlinkat",
    "sync",
    "syncfs",
    "sendfile",
    "copy_file_range",
    "fallocate",
    "truncate",
}
CONTENT = {"write", "pwrite64", "writev", "ftruncate"}
EXT4_IOC_SHUTDOWN, NOLOGFLUSH = 0x8004587D, 2
EVERY_REAL = 4  # calls between two real cuts


class Case(NamedTuple):
    mode: str
    dialect: str
    recording: str  # the file; empty for a real cut
    number: int  # of the state, or of the call

    @property
    def command(self):
        what = f"--recording {self.recording} --state" if self.recording else f"--dialect {self.dialect} --real --at"
        return f"power --mode {self.mode} {what} {self.number}"


def add_arguments(parser):
    parser.add_argument("--mode", choices=MODES, help="where the status file is; both, if not given")
    parser.add_argument("--dialect", choices=DIALECTS, default="pipelining")
    parser.add_argument("--recording", help="a file that an earlier run has left")
    parser.add_argument("--state", type=int, help="only this one")
    parser.add_argument("--real", action="store_true", help="only real cuts")
    parser.add_argument("--at", type=int, help="only the real cut before this call")


def missing():
    return ptrace.missing()


def remarks(notes):
    ages = [float(note) for note in notes if note]
    found = [f"sent again {max(ages):.1f} s after its delivery at the latest"] if ages else []
    return found + ([f"no real cuts: {missing_for_real()}"] if missing_for_real() else [])


def tidy(commands):
    """Recordings that no command of a failed case needs go."""
    for path in glob.glob(os.path.join(tempfile.gettempdir(), f"{RECORDING}-{os.getpid()}-*")):
        if not any(path in command for command in commands):
            os.unlink(path)


def missing_for_real():
    """What a real power cut lacks here; empty if nothing."""
    if os.geteuid():
        return "they need root"
    if not shutil.which("mkfs.ext4", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin"):
        return "mkfs.ext4 is missing (Debian: apt install e2fsprogs)"
    if not os.path.exists("/dev/loop-control"):
        return "there is no loop device (modprobe loop; in a container: --privileged)"
    return ""


# ------------------------------------------------------------------- cases


def cases(workshop, options):
    found = []
    for mode in [options.mode] if options.mode else MODES:
        if not options.real:
            found += modelled_cases(workshop, mode, options.dialect, options)
        if options.state is None and not missing_for_real():
            found += real_cases(workshop, mode, options.dialect, options)
    return found * options.times


def modelled_cases(workshop, mode, dialect, options):
    recording = options.recording or record(workshop, mode, dialect, options)
    if options.state is not None:
        return [Case(mode, dialect, recording, options.state)]
    count = len(load(recording).states)
    return [
        Case(mode, dialect, recording, number) for number in range(0, count, 20 if options.quick else options.every)
    ]


def real_cases(workshop, mode, dialect, options):
    if options.at:
        return [Case(mode, dialect, "", options.at)]
    killer, step = kill.Killer(), EVERY_REAL * (10 if options.quick else options.every)
    with contextlib.closing(Busy(workshop, dialect, options.features).without_rate()) as busy:
        kill.live(busy, killer)
    return [Case(mode, dialect, "", at) for at in range(step // 2, killer.count, step)]


# --------------------------------------------------------------- recording


class Event(NamedTuple):
    """Something that happened to the disk. Files are numbers, since they change their names."""

    moment: float
    kind: str  # create, link, rename, unlink, mkdir: of directories; content; sync
    places: tuple = ()  # paths; of a rename both
    file: int = 0
    text: bytes = b""
    durable: bool = False
    covers: int = 0  # a sync: so many events had happened when it began


folder = functools.lru_cache(maxsize=None)(os.path.dirname)  # asked a million times


class Recorder(Hand):
    """Notes what the daemon does, as decisions of ptrace.Tracer, and what the hand does; files by number."""

    def __init__(self, busy):
        self.directories = {str(busy.spool), str(busy.failed), str(busy.status_path.parent)}
        self.events, self.files, self.numbers = [], {}, itertools.count(1)
        self.lock = threading.RLock()
        self.notes = {"link": self.note_link, "rename": self.note_rename, "unlink": self.note_unlink}
        self.notes.update(mkdir=self.note_mkdir, utimens=None, fchmod=None, chmod=None, fchown=None, chown=None)

    # -- the daemon

    def __call__(self, call):
        with self.lock:
            if call.name in kill.FLAGS_ARGUMENT:
                return self.at_open(call)
            if call.name in CONTENT:
                return self.at_write(call)
            if call.name in kill.SYNCS and call.name not in UNKNOWN:
                return self.at_sync(call)
            paths = call.paths()
            if not any(self.is_ours(path) for path in paths):
                return None
            if call.name in UNKNOWN:
                raise NotImplementedError(f"the model of a disk does not know {call.name}")
            return self.when_done(self.notes[call.name.replace("at", "").rstrip("2")], *paths)

    def is_ours(self, path):
        return os.path.dirname(path) in self.directories and not path.endswith(".lock")

    def when_done(self, note, *what):
        """What is to be noted if the call succeeds."""

        def result(code):
            with self.lock:
                if code >= 0 and note:
                    note(*what)

        return result

    def at_open(self, call):
        path = call.path(kill.FLAGS_ARGUMENT[call.name] - 1)
        flags = call.arguments[kill.FLAGS_ARGUMENT[call.name]]
        if not self.is_ours(path) or not flags & kill.CREATES:
            return None
        if flags & os.O_CREAT and not os.path.lexists(path):
            return self.when_done(self.note_create, path)
        return self.when_done(self.note_content, path, path) if flags & os.O_TRUNC else None

    def at_write(self, call):
        path = call.descriptor()
        if not self.is_ours(path) or path not in self.files:  # it may be removed already
            return None
        return self.when_done(self.note_content, path, f"/proc/{call.process}/fd/{call.arguments[0]}")

    def at_sync(self, call):
        path, begun = call.descriptor(), len(self.events)
        if path in self.directories:
            return self.when_done(self.note, "sync", (path,), 0, b"", False, begun)
        if self.is_ours(path):
            return self.when_done(self.note, "sync", (), self.files[path], b"", False, begun)
        return None

    # -- what happened

    def note(self, kind, *what):
        self.events.append(Event(time.monotonic(), kind, *what))

    def note_create(self, path, durable=False):
        self.files[path] = next(self.numbers)
        self.note("create", (path,), self.files[path], b"", durable)

    def note_content(self, path, source, durable=False):
        with open(source, "rb") as file:
            self.note("content", (), self.files[path], file.read(), durable)

    def note_rename(self, old, new, durable=False):
        self.files[new] = self.files.pop(old)
        self.note("rename", (old, new), self.files[new], b"", durable)

    def note_link(self, old, new, durable=False):
        self.files[new] = self.files[old]
        self.note("link", (new,), self.files[new], b"", durable)

    def note_unlink(self, path):
        self.note("unlink", (path,), self.files.pop(path))

    def note_mkdir(self, path):
        self.note("mkdir", (path,))

    # -- the hand: what it does lasts; it is noted before the daemon can see it

    def create(self, path, text):
        with self.lock:
            super().create(path, text)
            self.note_create(str(path), durable=True)
            self.note_content(str(path), path, durable=True)

    def append(self, file, text):
        with self.lock:
            super().append(file, text)
            self.note_content(str(file.name), file.name, durable=True)

    def rename(self, old, new):
        with self.lock:
            super().rename(old, new)
            self.note_rename(str(old), str(new), durable=True)

    def link(self, old, new):
        with self.lock:
            super().link(old, new)
            self.note_link(str(old), str(new), durable=True)


class Recording(NamedTuple):
    """A run, and the states in which the disk may have been."""

    home: str
    mails: dict
    spooled: dict
    done: dict
    transactions: list
    moments: list  # of the events, and the end
    states: list  # of State
    features: tuple


class State(NamedTuple):
    """What the disk may hold, from after the first event until after the last, and whether a file system that keeps the
    order of its changes leaves it, too. files: (path, number, content)."""

    first: int
    last: int
    ordered: bool
    directories: frozenset
    files: tuple


def record(workshop, mode, dialect, options):
    """The path of a new recording."""
    busy = Busy(workshop, dialect, options.features, status_elsewhere=mode == "elsewhere")
    with contextlib.closing(busy):
        busy.hand = recorder = Recorder(busy)
        busy.pause = stretched(PAUSE)
        busy.prepare()
        begun = len(recorder.events)
        busy.start(decide=recorder, calls=CALLS, but_not_to=(2,))
        busy.work()
        if busy.daemon.wait():
            raise Failure(f"the run that is to be recorded fails; {busy.daemon.last_words()}")
        base = {str(busy.spool), str(busy.status_path.parent)}
        moments = [event.moment for event in recorder.events] + [time.monotonic() + DAY]
        found = Recording(
            str(busy.home),
            busy.mails,
            busy.spooled,
            busy.done,
            [transaction for transaction in busy.relay.transactions if transaction.accepted],
            moments,
            list(states(recorder.events, range(begun, len(recorder.events), 5 if options.quick else 1), base)),
            options.features,
        )
    handle, path = tempfile.mkstemp(prefix=f"{RECORDING}-{os.getppid()}-{mode}-")  # of the pool's process
    with open(handle, "wb") as file:
        pickle.dump(found, file)
    return path


@functools.lru_cache
def load(path):
    with open(path, "rb") as file:
        return pickle.load(file)


# --------------------------------------------------------------- the model


def states(events, numbers, base):
    """Every State that a cut may leave after these events, equal ones once."""
    chance, found = random.Random(1), {}
    for number in numbers:
        past = events[: number + 1]
        doubtful, contents = in_doubt(past), list(variants(past))
        for subset in subsets(doubtful, chance):
            missed = set(doubtful) - set(subset)
            directories, names = tree(past, missed, base)
            ordered = is_ordered(past, missed)
            for content in contents:
                files = tuple(sorted((path, file, content.get(file, b"")) for path, file in names.items()))
                key = frozenset(directories), files
                before = found.get(key, State(number, number, False, *key))
                found[key] = before._replace(last=number, ordered=ordered or before.ordered)
    return list(found.values())


def in_doubt(past):
    """The numbers of the events that no sync has made last: changes of directories."""
    synced = {}
    for event in past:
        if event.kind == "sync" and event.places:
            synced[event.places[0]] = max(event.covers, synced.get(event.places[0], 0))
    found = []
    for number, event in enumerate(past):
        if event.kind in ("content", "sync") or event.durable:
            continue
        if not any(number < synced.get(folder(place), 0) for place in event.places):
            found.append(number)
    return found


def subsets(numbers, chance):
    """Those that happened, of those in doubt."""
    if len(numbers) <= EXHAUSTIVE:
        for size in range(len(numbers) + 1):
            yield from itertools.combinations(numbers, size)
        return
    for end in range(len(numbers) + 1):
        yield numbers[:end]
    for one in numbers:
        yield [one]
        yield [number for number in numbers if number != one]
    for _ in range(RANDOM):
        yield [number for number in numbers if chance.random() < 0.5]


def is_ordered(past, missed):
    """Whether on each file system, the spool's and that of the status file, only the last changes are missing."""
    gone = set()
    for number in range(min(missed, default=len(past)), len(past)):
        event = past[number]
        systems = {folder(place).endswith("/status") for place in event.places}
        if number in missed:
            gone |= systems
        elif systems & gone and event.kind != "sync":
            return False
    return True


def tree(past, missed, base):
    """The directories, and a dict from path to file, when these events have not happened."""
    directories, names = set(base), {}
    for number, event in enumerate(past):
        if number in missed or event.kind in ("content", "sync"):
            continue
        if event.kind == "mkdir":
            directories.add(event.places[0])
        if event.kind in ("unlink", "rename") and names.get(event.places[0]) == event.file:
            del names[event.places[0]]
        if event.kind in ("create", "link", "rename"):
            names[event.places[-1]] = event.file
    return directories, {path: file for path, file in names.items() if folder(path) in directories}


def variants(past):
    """Dicts from file to content: all that was written is there, what was not synced is not there, or torn."""
    written, lasting, when = {}, {}, {}
    for number, event in enumerate(past):
        if event.kind == "content":
            written[event.file], when[event.file] = event.text, number
            if event.durable:
                lasting[event.file] = event.text
        elif event.kind == "sync" and event.file:
            before = [each for each in past[: event.covers] if each.kind == "content" and each.file == event.file]
            lasting[event.file] = before[-1].text if before else b""
    yield written
    lost = {file: lasting.get(file, b"") for file in written}
    if lost != written:
        yield lost
        yield {file: torn(lost[file], text) for file, text in written.items()}


def torn(old, new):
    """Half of what was written."""
    start = len(old) if new.startswith(old) else 0
    return new[: (start + len(new)) // 2] if new != old else new


# ------------------------------------------------------------------- run


def run(workshop, case, options):
    """Raises Failure. Returns the age of the oldest mail that was sent again, in seconds."""
    return run_modelled(workshop, case) if case.recording else run_real(workshop, case, options)


def run_modelled(workshop, case):
    recording = load(case.recording)
    state = recording.states[case.number]
    until = recording.moments[state.last + 1]
    busy = Busy(workshop, case.dialect, recording.features, case.mode == "elsewhere").without_rate()
    busy.may_miss_news = True
    with contextlib.closing(busy), explained(lambda: description(recording, state), busy.words):
        busy.mails = recording.mails
        materialize(busy, recording, state)
        busy.write_anew()
        restart(busy)
        ages, since = Ages(until), recording.moments[state.first]
        # only what was done before the first moment at which the disk may be like this is sure to have been done
        busy.spooled = {what: when for what, when in recording.spooled.items() if when <= since}
        busy.done = {what: when for what, when in recording.done.items() if when <= since}
        restarted = list(busy.relay.transactions)
        for moment in (until, since):  # to have it again is judged by the last moment, to be lost by the first
            busy.relay.forget()
            for transaction in (*recording.transactions, *restarted):
                if transaction in restarted or transaction.accepted <= moment:
                    busy.relay.begin(transaction)
            busy.judge(ages.why_not_again)
        return f"{ages.oldest:.2f}" if ages.oldest else ""


def materialize(busy, recording, state):
    """Make the state on the disk, with our paths in place of those of the recording: they are of the same length."""
    old, new = recording.home, str(busy.home)
    if len(old) != len(new):
        raise AssertionError(f"{old} and {new} differ in length")
    for directory in state.directories:
        os.makedirs(directory.replace(old, new), exist_ok=True)
    first = {}
    for path, file, text in state.files:
        path = path.replace(old, new)
        if file in first:
            os.link(first[file], path)
            continue
        first[file] = path
        with open(path, "wb") as handle:
            handle.write(text.replace(old.encode(), new.encode()))


def restart(busy):
    """One life, a day later: everything is due, and nobody is deferred a first time."""
    busy.clock.advance(DAY)
    busy.relay.turned_away.update((mail.name, address) for mail in busy.mails.values() for address in mail.recipients)
    status = busy.run_once()
    if status and not busy.mails_left():
        raise Failure(f"exit status {status} of the restart; {busy.daemon.last_words()}")


class Ages:
    """Who got his mail again, and how long after the first time the power went."""

    def __init__(self, moment):
        self.moment, self.oldest = moment, 0.0

    def why_not_again(self, mail, address, transactions):
        first, others = transactions[0], transactions[1:]
        age = self.moment - first.accepted
        self.oldest = max(self.oldest, age)
        if len(others) > 1:
            return "one cut explains two times"
        if age > stretched(AGAIN_SECONDS):
            return f"it was delivered {min(age, DAY):.1f} s before the cut"
        return ""


def description(recording, state):
    names = [path.replace(recording.home, "").lstrip("/") for path, _, _ in state.files]
    order = "ordered" if state.ordered else "unordered"
    return f"{order}, after {state.first} to {state.last} of {len(recording.moments) - 1} events: {' '.join(names)}"


# ---------------------------------------------------------------- for real


class Lasting(Hand):
    """A hand that syncs what it does, as applications should."""

    def create(self, path, text):
        super().create(path, text)
        sync(path)

    def append(self, file, text):
        super().append(file, text)
        os.fsync(file.fileno())

    def rename(self, old, new):
        super().rename(old, new)
        sync(os.path.dirname(new))

    def link(self, old, new):
        super().link(old, new)
        sync(os.path.dirname(new))


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class PowerCut(kill.Killer):
    """Kills the file system, and then the process."""

    def __init__(self, at, mounted):
        super().__init__(at)
        self.mounted = mounted

    def __call__(self, call):
        try:
            super().__call__(call)
        except ptrace.Kill:
            shut_down(self.mounted)
            raise


def shut_down(directory):
    """The file system forgets what is not on its disk, and writes no more."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.ioctl(handle, EXT4_IOC_SHUTDOWN, struct.pack("I", NOLOGFLUSH))
    finally:
        os.close(handle)


def run_real(workshop, case, options):
    busy = Busy(workshop, case.dialect, options.features, case.mode == "elsewhere", Lasting()).without_rate()
    busy.may_miss_news = busy.may_lose_disk = True
    image, cut = busy.home / "image", PowerCut(case.number, busy.spool)
    with contextlib.closing(busy), explained(lambda: f"cut before {cut.last or 'nothing'}", busy.words):
        make_file_system(image)
        with mounted(image, busy):
            (busy.spool / "lost+found").rmdir()
            with contextlib.suppress(OSError):  # of the hand, whose disk is gone too
                kill.live(busy, cut)
            busy.daemon.wait()
            busy.relay.wait_for_silence()
            moment = busy.daemon.tracer.killed_at or time.monotonic()
            busy.break_off_writing()
        with mounted(image, busy):
            busy.write_anew()
            restart(busy)
            ages = Ages(moment)
            busy.judge(ages.why_not_again)
        return f"{ages.oldest:.2f}" if ages.oldest else ""


def make_file_system(image):
    with open(image, "wb") as file:
        file.truncate(32 << 20)
    tool("mkfs.ext4", "-q", "-F", image)


@contextlib.contextmanager
def mounted(image, busy):
    tool("mount", "-o", "loop", image, busy.spool)
    try:
        yield
    finally:
        if busy.daemon:
            busy.daemon.kill()
        tool("umount", busy.spool)


def tool(*command):
    environ = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    if done.returncode:
        raise Failure(f"{command[0]}: {done.stderr.strip()}")
