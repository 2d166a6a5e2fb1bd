"""The busy run: one life of a daemon that uses everything, and what must have become of every mail in the end.

A run is cut short, or disturbed, by the parts; they then start the program again and ask the same judge.
"""

import collections
import contextlib
import json
import os
import time
from pathlib import Path

from relay import DIALECTS, Relay
from workshop import TRACEBACK, Clock, Daemon, Failure, Hand, make_mail, read_status, recipients, states, wait_for

RATE, WINDOW = 16, 1.0  # recipients, and seconds in which no more of them may go out
SETTLED_SECONDS = 0.6  # so soon after the relay's word the disk knows of it, or is being told
KNOWN_SECONDS = 2.5  # so soon the status file knows that a waiting mail has a new name
STEP_SECONDS = 20  # what a step of the run waits for takes a moment, or never comes
DAY = 86400
HALF = 350  # octets: all of the header and some of the body


class Busy:
    """The spool, the relay, the daemon and the hand that works on the spool.

    Mails, by name: "one" has one recipient; "four" has four, of which one is deferred and one refused for good;
    "large" is over 128 KB; "two" has two names; "place" is written in place; "part" is renamed to "moved" while one of
    its recipients waits and the other has it; "held" is renamed to "kept" in mid-transaction; "back" comes back from
    .failed; of "edit" a recipient is taken for delivered by an edit during SIGTSTP; "late" is spooled then;
    "envelope" names its recipients in envelope lines.
    """

    def __init__(self, workshop, dialect, features=(), status_elsewhere=False, hand=None):
        self.workshop, self.features, self.hand = workshop, features, hand or Hand()
        self.spool = workshop.new("spool")
        self.home = self.spool.parent
        self.status_path = self.home / "status" / "status.js" if status_elsewhere else self.spool / ".spoolgore.js"
        self.status_path.parent.mkdir(exist_ok=True)
        self.failed = self.spool / ".failed"
        self.clock = Clock(self.home / "clock")
        self.relay = Relay(DIALECTS[dialect])
        self.flags = ["-smtpaddr", self.relay.address, "-tls", "off", "-helo", "app.example", "-concurrency", 4]
        self.flags += ["-timeout", 5, "-freq", 1, "-attempts", 5, "-fail5xx", "-rate", f"{RATE}/s"]
        self.flags += ["-json", self.status_path] if status_elsewhere else []
        if "failcommand" in features:
            self.flags += ["-failcommand", self.failcommand()]
        self.mails = {}  # name -> Mail
        self.spooled = {}  # name -> when it was there
        self.done = {}  # what the hand did -> when
        self.half_written = None
        self.daemon = None
        self.logs = []
        self.step_seconds = STEP_SECONDS
        self.renames = True  # whether waiting mails are renamed
        self.may_miss_news = False  # whether -failcommand may have missed what happened
        self.may_lose_disk = False  # with which the command may still be running
        self.pause = 0  # seconds in which nothing happens, in the middle and at the end

    def failcommand(self):
        """A shell command that keeps what it is told, and what there is then in .failed and in the status file."""
        told = f"{self.home}/told.$$"
        look = f"ls {self.failed} > {told}.failed; cat {self.status_path} > {told}.status"  # cp skips what is replaced
        return f"{{ {look}; }} 2> {told}.errors; cat > {told}"

    def close(self):
        if self.daemon:
            self.daemon.kill()
        if self.half_written:
            self.half_written.close()
        self.relay.close()
        self.workshop.drop(self.spool)

    # -- the run

    def prepare(self):
        """What is there before the daemon starts."""
        self.put(make_mail("one", ["fine.one@x.example"]))
        self.write_half(make_mail("place", ["fine.place@x.example"]))
        self.put(make_mail("part", ["fine.part@x.example", "later.part@x.example"]))
        self.put(make_mail("back", ["fine.back@x.example", "once.back@x.example"], line_end=b"\r\n"))
        self.put(
            make_mail("four", ["fine.a@x.example", "later.b@x.example", "never.c@x.example"], ["fine.d@x.example"])
        )
        self.put(make_mail("edit", ["fine.edit@x.example", "later.edit@x.example"]))
        self.put(make_mail("large", ["fine.large@x.example"], octets=150_000))
        self.put(make_mail("two", ["fine.e@x.example", "fine.f@x.example"]))
        self.hand.link(self.spool / "two", self.spool / "two-again")
        self.put(make_mail("held", ["fine.held@x.example", "later.held@x.example"]))
        self.relay.hold("held")
        self.put(make_mail("last", ["fine.last@x.example"]))

    def start(self, **options):
        self.daemon = Daemon(self.workshop, self.spool, self.flags, clock=self.clock, **options)
        self.logs.append(self.daemon)

    def work(self, finish=True):
        """What the hand does to the spool while the daemon runs. Ends early when the daemon does. finish: the daemon is
        to send what waits, and then to end."""
        with contextlib.suppress(Ended):
            for step in (self.rename_in_flight, self.write_rest, self.rename_waiting, self.move_back):
                step()
            time.sleep(self.pause)
            self.edit()
            self.until(lambda: self.has("late", "fine.late@x.example"))
            if finish:
                self.flush_and_wait()
                time.sleep(self.pause)
                self.daemon.signal("SIGTERM")
                self.until(lambda: False)

    def wait_for_first(self):
        """Until the relay has dealt with everybody who was there at the start, and with nobody for now."""
        self.finish_writing()
        self.relay.release("held")
        self.until(self.first_are_done)

    def first_are_done(self):
        return all(self.has(*first) for first in FIRST) and not self.relay.is_busy()

    def rename_in_flight(self):
        self.until(lambda: self.relay.is_held("held"))
        self.rename("held", "kept")
        self.relay.release("held")

    def write_rest(self):
        self.until(lambda: self.has("one", "fine.one@x.example"))
        self.finish_writing()

    def rename_waiting(self):
        self.until(lambda: self.knows("part", "fine.part@x.example", "delivered"))
        self.rename("part", "moved")

    def move_back(self):
        self.until(lambda: self.knows(".failed/back", "once.back@x.example", "given up"))
        self.until((self.failed / "back").exists)
        was_told = "failcommand" not in self.features or self.until(
            lambda: any("once.back@" in told.read_text() for told in self.told())
        )
        if was_told:  # else the command may run yet, and would not find the mail where it was put
            self.move("back")

    def edit(self):
        self.until(lambda: self.knows("edit", "fine.edit@x.example", "delivered"))
        self.until(self.first_are_done)
        self.daemon.signal("SIGTSTP")
        self.until(lambda: self.daemon.has_said("is suspended"))
        self.put(make_mail("late", ["fine.late@x.example"]))
        if "envelope" in self.features:
            self.put(make_mail("envelope", ["nobody@x.example"], receivers=["fine.g@x.example", "later.h@x.example"]))
        self.take_for_delivered("edit", "later.edit@x.example")
        for _ in range(3):  # it says so when it could not
            self.daemon.signal("SIGHUP")
            if self.until(lambda: self.daemon.has_said("status reloaded")):
                break

    def flush_and_wait(self):
        for _ in range(2):  # what was in flight at the first has its turn at the second
            self.daemon.signal("SIGURG")
            self.until(lambda: not self.mails_left(), 2)

    # -- what the hand does, one thing each

    def put(self, mail):
        self.mails[mail.name] = mail
        self.hand.put(self.spool, mail)
        self.spooled[mail.name] = time.monotonic()

    def rename(self, old, new):
        """Nothing happens if it is gone already."""
        with contextlib.suppress(FileNotFoundError):
            if self.renames:
                self.hand.rename(self.spool / old, self.spool / new)
                self.done[new] = time.monotonic()

    def move(self, name):
        with contextlib.suppress(FileNotFoundError):
            self.hand.rename(self.failed / name, self.spool / name)
            self.done[name] = time.monotonic()

    def write_half(self, mail):
        self.mails[mail.name] = mail
        self.spooled[mail.name] = time.monotonic()
        self.hand.create(self.spool / mail.name, mail.text[:HALF])
        self.half_written = open(self.spool / mail.name, "ab", buffering=0)

    def finish_writing(self):
        file, self.half_written = self.half_written, None
        if file:
            with file:
                self.hand.append(file, self.mails["place"].text[HALF:])

    def break_off_writing(self):
        """The writer dies with what it has written."""
        file, self.half_written = self.half_written, None
        if file:
            file.close()

    def write_anew(self):
        """A writer that was interrupted writes it again, if half of it is there."""
        mail = self.mails["place"]
        with contextlib.suppress(FileNotFoundError):
            if (self.spool / mail.name).read_bytes() != mail.text:
                self.hand.put(self.spool, mail)

    def take_for_delivered(self, name, address):
        """Edit the status file as people do: another file, renamed."""
        entries = read_status(self.status_path)
        found = [r for r in recipients(entries.get(str(self.spool / name), {})) if r["Address"] == address]
        for recipient in found:
            recipient.update(Status=2, Error="")
        aside = self.status_path.with_name(".edited")
        self.hand.create(aside, json.dumps(entries, indent="\t").encode())
        moment = time.monotonic()  # before the change is noted, and after all that was before it
        self.hand.rename(aside, self.status_path)
        if found:
            self.done["edit"] = moment

    # -- what can be seen

    def until(self, condition, seconds=None):
        """Whether it came true. Raises Ended when the daemon ends before."""
        wait_for(lambda: condition() or not self.daemon.is_alive(), seconds or self.step_seconds)
        if condition():
            return True
        if not self.daemon.is_alive():
            raise Ended
        return False

    def has(self, name, address):
        """Whether the relay has dealt with this recipient: took the mail for him, or turned him away."""
        return self.relay.has_taken(name, address) or self.relay.turned_away[name, address]

    def knows(self, name, address, wanted):
        """Whether the status file has this recipient of this file in the wanted state."""
        with contextlib.suppress(Failure):
            return states(read_status(self.status_path).get(str(self.spool / name), {})).get(address) == wanted
        return False

    def mails_left(self):
        return [name for name in os.listdir(self.spool) if not name.startswith(".")]

    def without_rate(self):
        """-rate syncs a file before each transaction, and makes us wait."""
        at = self.flags.index("-rate")
        del self.flags[at : at + 2]
        return self

    # -- after it

    def start_again(self, **options):
        """Two more lives without any help: what is due, and, a day later, what was deferred."""
        self.finish_writing()
        self.relay.release("held")
        self.run_once(**options)
        self.check_rate()
        self.clock.advance(DAY)
        status = self.run_once(**options)
        if status:
            raise Failure(f"exit status {status} though nothing is left to do; {self.daemon.last_words()}")

    def run_once(self, **options):
        self.daemon = Daemon(self.workshop, self.spool, ["-once", *self.flags], clock=self.clock, **options)
        self.logs.append(self.daemon)
        status = self.daemon.wait()
        if status not in (0, 75):
            raise Failure(f"exit status {status} of a restart; {self.daemon.last_words()}")
        return status

    def run_beside(self):
        """The exit status of a second daemon, while the first has the spool."""
        beside = Daemon(self.workshop, self.spool, ["-once", *self.flags], clock=self.clock)
        return beside.wait()

    def words(self):
        """What all its daemons have said."""
        return "".join(daemon.log() for daemon in self.logs)

    # -- the judge

    def judge(self, may_come_twice):
        """Every promise but those about a kill. may_come_twice(mail, address, transactions) decides about duplicates.
        Raises Failure."""
        self.check_logs()
        entries = read_status(self.status_path)
        for name in self.spooled:
            for address in self.mails[name].recipients:
                self.check_recipient(self.mails[name], address, entries, may_come_twice)
        self.check_contents()
        self.check_what_was_told(entries)
        if left := self.mails_left():
            raise Failure(f"left in the spool: {' '.join(sorted(left))}")
        stale = [path for path in entries if not os.path.exists(path)]
        if stale:
            raise Failure(f"entries without a file: {stale}")

    def check_recipient(self, mail, address, entries, may_come_twice):
        times = self.relay.times(mail.name, address)
        kind = address.partition(".")[0]
        given_up = states(entries.get(self.path_in_failed(mail.name), {})).get(address) == "given up"
        may_be_given_up = kind == "never" or (kind == "once" and mail.name not in self.done)
        if not times and not (given_up and may_be_given_up) and not self.was_edited(mail.name, address):
            raise Failure(f"{address} of {mail.name} is lost")
        if times and self.was_edited(mail.name, address) and times[-1].began > self.done["edit"]:
            raise Failure(f"{address} of {mail.name} got it although an edit says that he has it")
        if given_up and mail.text != (self.failed / mail.name).read_bytes():
            raise Failure(f"{mail.name} in .failed is not what it was")
        if given_up and not self.reason(entries, mail.name, address).startswith("550 5.1.1"):
            raise Failure(f"{address} of {mail.name} was given up for {self.reason(entries, mail.name, address)!r}")
        if len(times) > 1 and (why := may_come_twice(mail.name, address, times)):
            raise Failure(f"{address} of {mail.name} got it {len(times)} times: {why}")

    def was_edited(self, name, address):
        return (name, address) == ("edit", "later.edit@x.example") and "edit" in self.done

    def path_in_failed(self, name):
        return str(self.failed / name)

    def reason(self, entries, name, address):
        return next(r["Error"] for r in recipients(entries[self.path_in_failed(name)]) if r["Address"] == address)

    def check_contents(self):
        for transaction in self.relay.transactions:
            if transaction.accepted and transaction.content != self.mails[transaction.mail].content:
                raise Failure(f"{transaction.mail} arrived with another content")

    def told(self):
        """The files in which the command has kept its standard input."""
        return self.home.glob("told.*[0-9]")

    def check_what_was_told(self, entries):
        """-failcommand is run after the mail lies in .failed with its reason, once each time; a kill may prevent it."""
        times = collections.Counter()
        for told in self.told():
            text, there = told.read_text(), Path(f"{told}.failed").read_text().split()
            could_not_look = self.may_lose_disk and Path(f"{told}.errors").read_text()
            for name, address in GIVEN_UP:
                if address not in text or could_not_look:
                    continue
                times[name] += 1
                entry = read_status(f"{told}.status").get(self.path_in_failed(name), {})
                if name not in there or states(entry).get(address) != "given up":
                    known = f"{' '.join(there) or 'nothing'} was there, the status had {states(entry)}"
                    raise Failure(f"-failcommand was told of {name} before it was in .failed and on the disk; {known}")
        if twice := [name for name, count in times.items() if count > 1]:
            raise Failure(f"-failcommand was told more than once of {' '.join(twice)}")
        is_due = any(address in self.mails[name].recipients for name, address in GIVEN_UP if name in self.mails)
        if "failcommand" in self.features and is_due and not self.may_miss_news and not times:
            raise Failure("-failcommand was not run")

    def check_logs(self):
        for daemon in self.logs:
            check_log(daemon)

    def check_rate(self):
        """No window has more recipients than -rate allows, whatever happened."""
        taken = sorted((t.accepted, len(t.recipients)) for t in self.relay.transactions if t.accepted)
        for number, (moment, _) in enumerate(taken):
            count = sum(count for when, count in taken[number:] if when - moment < WINDOW)
            if count > RATE:
                raise Failure(f"{count} recipients went out within {WINDOW:g} s, -rate allows {RATE}")


class Ended(Exception):
    """The daemon is gone, and the run with it."""


GIVEN_UP = [("four", "never.c@x.example"), ("back", "once.back@x.example")]
FIRST = [  # who is dealt with before the status is edited
    ("one", "fine.one@x.example"), ("part", "later.part@x.example"), ("back", "once.back@x.example"),
    ("four", "fine.d@x.example"), ("edit", "later.edit@x.example"), ("large", "fine.large@x.example"),
    ("two", "fine.f@x.example"), ("held", "later.held@x.example"), ("last", "fine.last@x.example"),
    ("place", "fine.place@x.example"),
]  # fmt: skip


def check_log(daemon):
    """Raises Failure for a traceback, or for what should never have to be said."""
    log = daemon.log()
    if found := TRACEBACK.search(log):
        line = [line for line in log[found.start() :].splitlines() if line and not line.startswith((" ", "Traceback"))]
        raise Failure(f"a traceback in the log: {line[0] if line else log[found.start() :][:200]}")
    if "corrupt" in log:
        raise Failure("it found its status file corrupt")
