"""Part 5: there is too little of something, or too much; then all is well again.

Each case is a shortage on a spool of its own. The program says what is wrong, once, goes on with what it can, and heals
by itself.
"""

import contextlib
import os
import resource
import subprocess
import time
from typing import NamedTuple

from busy import DAY, Busy, check_log
from errors import MINUTE, check_lock, check_repetitions, check_rest
from workshop import CannotRun, Failure, explained, make_mail, wait_for

HEALING_SECONDS = 40
FLOOD, SMALL_FLOOD = 100_000, 2_000
PAUSE, SHORT_PAUSE = 60, 3
SHORTAGE_SECONDS = 1.5
NOBODY = 65534


class Case(NamedTuple):
    name: str

    @property
    def command(self):
        return f"resources --case '{self.name}'"


def add_arguments(parser):
    parser.add_argument("--case", choices=CASES, help="only this one")


def missing():
    return ""


def remarks(notes):
    return sorted(set(notes))


def cases(workshop, options):
    names = [options.case] if options.case else list(CASES)
    return [Case(name) for name in names][:: options.every] * options.times


def run(workshop, case, options):
    """Raises Failure. Returns why the case could not be tried, if so."""
    busy = Busy(workshop, "pipelining", options.features, status_elsewhere="status" in case.name)
    busy.quick = options.quick
    busy.flags[busy.flags.index("-rate") + 1] = "100/s"
    busy.flags[busy.flags.index("-concurrency") + 1] = 20
    try:
        with contextlib.closing(busy), explained(lambda: "", busy.words):
            CASES[case.name](busy)
    except CannotRun as reason:
        return f"not tried: {case.name}, {reason}"
    return ""


# ---------------------------------------------------------------- the cases


def few_descriptors(busy):
    """20 from the start on, and a hundred mails."""
    put_many(busy, 100, 3)
    busy.start(limits=[[resource.RLIMIT_NOFILE, 20, 20]])
    finish(busy)


def no_descriptors(busy):
    """Suddenly none is to be had; mails come all the same."""
    put_some_of_all(busy)
    busy.start()
    expect(lambda: busy.relay.transactions, "a transaction")
    with limited(busy, resource.RLIMIT_NOFILE, 8):
        put_many(busy, 30, 2)
        time.sleep(SHORTAGE_SECONDS)
    finish(busy)


def no_memory(busy):
    """Not one octet more than it has; mails come all the same, large ones among them."""
    put_some_of_all(busy)
    busy.start()
    expect(lambda: busy.relay.transactions, "a transaction")
    with limited(busy, resource.RLIMIT_AS, virtual_memory(busy.daemon.pid)):
        put_many(busy, 50, 5)
        put_many(busy, 5, 1, octets=1_000_000, prefix="large")
        time.sleep(SHORTAGE_SECONDS)
    finish(busy)


def no_threads(busy):
    """No thread can be started, which -rate and the status file want."""
    user = somebody_else(busy)
    put_some_of_all(busy)
    for path in (busy.home, busy.spool, *busy.spool.iterdir()):
        os.chown(path, *user)
    busy.start(limits=[low(resource.RLIMIT_NPROC, 1)], user=user)
    time.sleep(SHORTAGE_SECONDS)
    raise_limit(busy, resource.RLIMIT_NPROC, user)
    finish(busy)


def full_disk(busy):
    """No room for the status file; then there is."""
    with small_disk(busy) as disk:
        put_some_of_all(busy)
        disk.start_full()
        wait_until_tried(busy)
        busy.clock.advance(MINUTE)
        time.sleep(SHORTAGE_SECONDS)
        disk.make_room()
        finish(busy)


def full_disk_and_kill(busy):
    """No room for the status file, somebody is given up, and the daemon is killed."""
    with small_disk(busy) as disk:
        busy.put(make_mail("four", ["fine.a@x.example", "later.b@x.example", "never.c@x.example"]))
        busy.put(make_mail("sad", ["never.sad@x.example"]))
        disk.start_full()
        wait_until_tried(busy)
        time.sleep(SHORTAGE_SECONDS)
        busy.daemon.kill()
        disk.make_room()
        busy.relay.wait_for_silence()
        busy.start_again()
        busy.judge(lambda *first: "")  # who has a partly delivered mail is not known then: the README says so


def closed_spool(busy):
    """The spool's mode is 0 for a while."""
    put_some_of_all(busy)
    busy.start(powerless=True)
    expect(lambda: busy.relay.transactions, "a transaction")
    wait_until_tried(busy)
    with closed(busy.spool):
        busy.clock.advance(MINUTE)  # what was deferred is tried
        time.sleep(2 * SHORTAGE_SECONDS)
    put_many(busy, 10, 2)
    finish(busy)


def closed_failed(busy):
    """The mode of .failed is 0 for a while: what was given up is not forgotten."""
    busy.put(make_mail("back", ["fine.back@x.example", "once.back@x.example"]))
    busy.start(powerless=True)
    expect(lambda: busy.knows(".failed/back", "once.back@x.example", "given up"), "a mail in .failed")
    with closed(busy.failed):
        time.sleep(2 * SHORTAGE_SECONDS)  # scans
        busy.put(make_mail("one", ["fine.one@x.example"]))  # so that the status is written
        time.sleep(SHORTAGE_SECONDS)
    busy.move("back")
    finish(busy)


def closed_status(busy):
    """The directory of the status file is closed while somebody is given up."""
    busy.put(make_mail("first", ["fine.first@x.example"]))
    busy.start(powerless=True)
    expect(lambda: busy.relay.transactions, "a transaction, which comes after the status was read")
    with closed(busy.status_path.parent):
        put_some_of_all(busy)
        wait_until_tried(busy)
        time.sleep(SHORTAGE_SECONDS)
    finish(busy)


def jumping_clock(busy):
    """An hour back, a day forth, a day back, an hour forth, while some mails wait."""
    put_some_of_all(busy)
    busy.start()
    wait_until_tried(busy)
    for seconds in (-3600, DAY, -DAY, 3600, -600):
        busy.clock.advance(seconds)
        busy.put(make_mail(f"at{abs(seconds)}{seconds < 0}", ["fine.clock@x.example"]))
        time.sleep(1.2)
    busy.clock.advance(2 * MINUTE)
    if not wait_for(lambda: not busy.mails_left(), 10):
        raise Failure(f"the clock was set, and {' '.join(busy.mails_left())} wait for longer than they should")
    finish(busy)


def stopped(busy):
    """SIGSTOP in mid-transaction; the relay hangs up on idle connections meanwhile."""
    put_some_of_all(busy)
    busy.put(make_mail("held", ["fine.held@x.example"]))
    busy.relay.hold("held")
    busy.start()
    expect(lambda: busy.relay.is_held("held"), "the mail that the relay holds up")
    busy.daemon.signal("SIGSTOP")
    busy.relay.release("held")
    time.sleep(1)
    for conversation in list(busy.relay.conversations):
        if conversation.transaction is None:
            conversation.close()
    put_many(busy, 10, 2)
    time.sleep(SHORT_PAUSE if busy.quick else PAUSE)
    busy.daemon.signal("SIGCONT")
    finish(busy)


def flood(busy):
    """More files in a few seconds than inotify has room for."""
    count = SMALL_FLOOD if busy.quick else FLOOD
    busy.flags[busy.flags.index("-rate") :] = ["-concurrency", 50]
    busy.relay.offers = ("PIPELINING", "CHUNKING")
    busy.start()
    expect(busy.daemon.started, "a start")
    put_many(busy, count, 1)
    finish(busy, seconds=count / 500 + 20)


CASES = {
    "20 descriptors": few_descriptors,
    "no descriptors for a while": no_descriptors,
    "no memory for a while": no_memory,
    "no threads for a while": no_threads,
    "a full disk for a while": full_disk,
    "a full disk, then killed": full_disk_and_kill,
    "spool closed for a while": closed_spool,
    ".failed closed for a while": closed_failed,
    "status closed for a while": closed_status,
    "a clock that jumps": jumping_clock,
    "stopped for a while": stopped,
    "100,000 files in a few seconds": flood,
}


# --------------------------------------------------------------- shortages


@contextlib.contextmanager
def limited(busy, kind, most):
    """The running daemon has no more of it."""
    before = resource.prlimit(busy.daemon.pid, kind)
    resource.prlimit(busy.daemon.pid, kind, (most, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(busy.daemon.pid, kind, before)


def low(kind, soft):
    """A limit to start with, for zygote.py; it can be raised again."""
    return [kind, soft, resource.getrlimit(kind)[1]]


def raise_limit(busy, kind, user=None):
    """By a process of the daemon's user: without a capability that is not in every container, root may not."""
    child = os.fork()
    if not child:
        try:
            if user and os.geteuid() == 0:
                os.setresgid(*[user[1]] * 3)
                os.setresuid(*[user[0]] * 3)
            resource.prlimit(busy.daemon.pid, kind, (resource.getrlimit(kind)[1],) * 2)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def virtual_memory(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def somebody_else(busy):
    """The user and the group for a daemon that limits apply to: root has none on processes."""
    if os.geteuid():
        return os.geteuid(), os.getegid()
    question = f"import os; os.setuid({NOBODY}); import gevent, email; print(os.access(email.__file__, os.R_OK))"
    answer = subprocess.run([busy.workshop.settings.python, "-c", question], capture_output=True, text=True)
    if answer.stdout != "True\n":
        raise CannotRun("other users may not read this interpreter: run it with --python or as another user than root")
    return NOBODY, NOBODY


@contextlib.contextmanager
def small_disk(busy):
    """A disk that can be full: the spool on a small file system if root is to be had."""
    if os.geteuid():
        yield SmallFiles(busy)
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k,mode=755", "tmpfs", busy.spool], check=True)
    try:
        yield SmallDisk(busy)
    finally:
        if busy.daemon:
            busy.daemon.kill()
        subprocess.run(["umount", "-l", busy.spool], check=True)


class SmallDisk:
    """A small file system, filled by a file."""

    def __init__(self, busy):
        self.busy, self.ballast = busy, busy.spool / ".ballast"

    def start_full(self):
        with contextlib.suppress(OSError), open(self.ballast, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        self.busy.start()

    def make_room(self):
        self.ballast.unlink()


class SmallFiles:
    """The same by a limit on the size of files, the log among them; there is room for the pid."""

    def __init__(self, busy):
        self.busy = busy

    def start_full(self):
        self.busy.start(limits=[low(resource.RLIMIT_FSIZE, 50)])

    def make_room(self):
        raise_limit(self.busy, resource.RLIMIT_FSIZE)


@contextlib.contextmanager
def closed(directory):
    mode = directory.stat().st_mode & 0o7777
    directory.chmod(0)
    try:
        yield
    finally:
        directory.chmod(mode)


# ------------------------------------------------------------ mails and end


def put_some_of_all(busy):
    """Each kind of fate."""
    busy.put(make_mail("one", ["fine.one@x.example"]))
    busy.put(make_mail("part", ["fine.part@x.example", "later.part@x.example"]))
    busy.put(make_mail("four", ["fine.a@x.example", "later.b@x.example", "never.c@x.example"], ["fine.d@x.example"]))
    busy.put(make_mail("large", ["fine.large@x.example"], octets=150_000))


def put_many(busy, count, each, octets=300, prefix="many"):
    for number in range(count):
        name = f"{prefix}{number}"
        busy.put(make_mail(name, [f"fine.{name}.{of}@x.example" for of in range(each)], octets=octets))


def wait_until_tried(busy):
    """Until the relay has been asked for everybody."""
    everybody = [(mail.name, address) for mail in busy.mails.values() for address in mail.recipients]
    expect(lambda: all(busy.has(*one) for one in everybody), "the relay to be asked for everybody", 0.05)


def expect(condition, what, pause=0.004):
    """What a case builds on, however long that takes when others want the processors, too. Raises Failure."""
    if not wait_for(condition, pause=pause):
        raise Failure(f"still waiting for {what}")


def finish(busy, seconds=HEALING_SECONDS):
    """It heals by itself, and ends when it is told to. Raises Failure."""
    began = time.monotonic()
    while (left := busy.mails_left()) and time.monotonic() < began + seconds and busy.daemon.is_alive():
        pause = 0.02 + len(left) / 20_000  # to count many takes long
        wait_for(lambda: not busy.mails_left() or not busy.daemon.is_alive(), 0.6, pause)
        busy.clock.advance(MINUTE)
    if not busy.daemon.is_alive():
        raise Failure(f"it ended, exit status {busy.daemon.poll()}; {busy.daemon.last_words()}")
    if left := busy.mails_left():
        raise Failure(f"does not heal: {len(left)} mails, {' '.join(sorted(left)[:9])} still there")
    check_rest(busy.daemon)
    check_lock(busy)
    if status := busy.daemon.stop():
        raise Failure(f"exit status {status} in the end; {busy.daemon.last_words()}")
    check_log(busy.daemon)
    busy.judge(lambda *first: "no doubt, no kill")
    check_repetitions(busy)
