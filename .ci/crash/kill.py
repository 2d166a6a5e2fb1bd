"""Part 1: the busy run is killed at its N-th system call, for every N, and started again without help.

Only calls count whose effect outlives the process, or that tell the relay or another process something: between two
others the disk and the relay are in the same state, and a kill there would be the same kill. The run dies before the
N-th of them is made, and so after the one before it.
"""

import contextlib
import fcntl
import os
import time
from typing import NamedTuple

import ptrace
from busy import KNOWN_SECONDS, SETTLED_SECONDS, Busy
from relay import DIALECTS
from workshop import explained, read_status, states, stretched

CHANGES_FILES = [
    "openat", "open", "openat2", "creat", "write", "pwrite64", "writev", "rename", "renameat", "renameat2", "link",
    "linkat", "symlink", "symlinkat", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "truncate", "ftruncate",
    "fallocate", "utimensat", "fchmod", "fchmodat", "chmod", "fchown", "chown", "sendfile", "copy_file_range",
]  # fmt: skip
SYNCS = ["fsync", "fdatasync", "sync", "syncfs"]  # change nothing for a kill, but the process waits there
LOCKS = ["fcntl", "flock"]  # not leases: nobody sees these who does not write
SPEAKS = ["connect", "sendto", "sendmsg"]
STARTS = ["clone", "clone3", "fork", "vfork", "execve"]
CALLS = [*CHANGES_FILES, *SYNCS, *LOCKS, *SPEAKS, *STARTS]
LOCK_COMMANDS = {fcntl.F_SETLK, fcntl.F_SETLKW, 37, 38}  # and those of open file descriptions
CREATES = os.O_CREAT | os.O_TRUNC
FLAGS_ARGUMENT = {"open": 1, "openat": 2}


def counts(call):
    """Whether a kill before this call may differ from one before the next."""
    if call.name in FLAGS_ARGUMENT:
        return bool(call.arguments[FLAGS_ARGUMENT[call.name]] & CREATES)
    if call.name == "fcntl":
        return call.arguments[1] in LOCK_COMMANDS
    if call.name in ("write", "writev"):  # not to the pipes by which the process wakes itself
        return not call.descriptor().startswith(("anon_inode:", "pipe:"))
    return True


class Case(NamedTuple):
    dialect: str
    at: int

    @property
    def command(self):
        return f"kill --dialect {self.dialect} --at {self.at}"


def add_arguments(parser):
    parser.add_argument("--dialect", choices=DIALECTS, help="only this one")
    parser.add_argument("--at", type=int, help="only the kill before this call")


def missing():
    return ptrace.missing()


def remarks(notes):
    return []


class Killer:
    """Decides: kill at the so-many-th call that counts, from the opening of the lock on. at 0: never."""

    def __init__(self, at=0):
        self.at, self.count, self.last, self.begun = at, 0, "", False

    def __call__(self, call):
        self.begun = self.begun or "spoolgore.lock" in " ".join(call.paths())
        if self.begun and counts(call):
            self.count += 1
            if self.count == self.at:
                self.last = str(call)
                raise ptrace.Kill


def cases(workshop, options):
    """Every N of every dialect: as many as a run that is not killed has, and a few more, since runs differ."""
    found, count = [], 0
    for dialect in [options.dialect] if options.dialect else DIALECTS:
        if options.at:
            found.append(Case(dialect, options.at))
            continue
        if not (options.quick and count):
            count = calls_of_a_run(workshop, dialect, options)
        found += [Case(dialect, at) for at in range(1, count + 5)]
    return found[:: 20 if options.quick else options.every] * options.times


def calls_of_a_run(workshop, dialect, options):
    """How many calls there are at which it can be killed."""
    killer = Killer()
    with contextlib.closing(Busy(workshop, dialect, options.features)) as busy:
        live(busy, killer)
    return killer.count


def run(workshop, case, options):
    """Raises Failure."""
    busy, killer = Busy(workshop, case.dialect, options.features), Killer(case.at)
    with contextlib.closing(busy), explained(lambda: f"killed before {killer.last or 'nothing'}", busy.words):
        live(busy, killer)
        wreck, busy.may_miss_news = Wreck(busy), True
        busy.relay.wait_for_silence()
        busy.start_again()
        busy.judge(wreck.why_not_twice)


def live(busy, killer):
    busy.prepare()
    busy.start(decide=killer, calls=CALLS, but_not_to=(2,))
    busy.work()
    busy.daemon.wait()


class Wreck:
    """What a kill left behind, and so who may get his mail a second time."""

    def __init__(self, busy):
        self.busy, self.moment = busy, busy.daemon.tracer.killed_at or time.monotonic()
        self.names = set(os.listdir(busy.spool))
        self.entries = read_status(busy.status_path)

    def why_not_twice(self, mail, address, transactions):
        """Why this recipient should not have got the mail again; empty when that is in order.

        In order it is if the first of two transactions was under way: the relay had not said its last word yet, or had
        said it just now, so that it was not on the disk yet, and nothing else had been begun with this mail.
        """
        first, others = transactions[0], transactions[1:]
        if len(others) > 1:
            return "one kill explains two times"
        if others[0].began < self.moment:
            return "both times before the kill"
        if first.replied is None or first.replied > self.moment:
            return ""
        age = self.moment - first.replied
        if any(first.replied < each.began < self.moment for each in self.busy.relay.of_mail[mail]):
            return "its next transaction had begun already"
        if self.knows(mail, address):
            return "the status file knew of it"
        if age > stretched(SETTLED_SECONDS) and not self.was_renamed_just_now(mail):
            return f"that was done {age:.2f} s before the kill"
        return ""

    def knows(self, mail, address):
        """Whether the status file says that the recipient has the mail, under a name that its file had at the kill."""
        names = self.names & {mail, *RENAMED.get(mail, ())}
        entries = [self.entries.get(str(self.busy.spool / name), {}) for name in names]
        return any(states(entry).get(address) == "delivered" for entry in entries)

    def was_renamed_just_now(self, mail):
        """The status file may not know the new name yet of a mail that waits."""
        moments = [self.busy.done.get(name, 0) for name in RENAMED.get(mail, ())]
        return any(0 < self.moment - moment < stretched(KNOWN_SECONDS) for moment in moments)


RENAMED = {"part": ["moved"], "held": ["kept"]}
