"""The parts of the daemon and the users of its spool, driven by lot in one process; see fuzz.py.

    python turmoil.py SCRIPT

Plays the seeds that come as lines of JSON on standard input, each with the path of an empty spool, in a process of its
own; for each there is a line of JSON on standard output.
"""

import collections
import contextlib
import importlib.util
import io
import json
import os
import random
import select
import signal
import sys
import traceback
import types
from os import fork, waitpid  # as they are before gevent has its way with them

from users import Users, drawn
from workshop import TRACEBACK, Failure

STEPS, PEACE_ROUNDS = 40, 8
SECONDS = 60  # no seed takes longer, unless it hangs
WHAT_HAPPENS = {"use": 6, "see_events": 2, "scan": 1, "deliver": 3, "step_clock": 1, "flush": 1, "save": 1, "reload": 1,
                "suspend": 1, "restart": 2}  # fmt: skip


class Turmoil:
    """A spool, those who use it, and its daemon. seed: what is done to it; program: the script, as a module."""

    def __init__(self, program, seed, spool):
        self.program, self.chance, self.spool, self.story = program, random.Random(seed), spool, []
        self.users = Users(self, spool)
        self.options = program.parse_options(["-smtpaddr", "-", "-attempts", "2", spool])
        self.now, self.is_peace = 1.8e9, False
        self.taken = collections.Counter()  # (Message-ID, recipient) -> how often the relay took it
        self.words = program.log.stream = io.StringIO()

    def play(self):
        """Raises Failure."""
        self.start()
        self.save()
        descriptors = os.listdir("/proc/self/fd")
        for _ in range(STEPS):
            self.do(drawn(self.chance, WHAT_HAPPENS))
            self.check()
        self.make_peace()
        if len(os.listdir("/proc/self/fd")) != len(descriptors):
            raise Failure("descriptors are lost")

    def use(self):
        self.users.use()

    def do(self, what):
        self.story.append(what)
        getattr(self, what)()

    # -- the daemon

    def start(self):
        """As serve() does, but for its loop, its keepers and its relay."""
        program, spool = self.program, self.program.Spool(self.spool)
        self.queue = program.Queue()
        self.status = program.Status(self.queue, spool)
        turnstile = program.Turnstile([], spool.path(".spoolgore.rate"), self.clock)
        self.daemon = program.Spooler(self.options, spool, self.queue, self.status, turnstile, self.clock)
        self.daemon.keep = lambda name, work: None
        self.daemon.keepers["watch"] = types.SimpleNamespace(dead=False)
        nothing = lambda: None  # noqa: E731
        self.daemon.relay = types.SimpleNamespace(down="", relays=[], poke=nothing, tend=nothing, send=self.send)
        spool.lock()
        self.status.load()
        self.status.commit = self.commit
        self.queue.look_again(self.daemon.due_at)
        self.watch = program.Watch(spool.directory, spool.path(".spoolgore.lock"))
        self.scan()

    def clock(self):
        return self.now

    def commit(self, mail):
        """Status.commit, where nobody else writes."""
        if mail.news > self.status.written:
            self.save()
        return mail.news <= self.status.written

    def stop(self):
        if self.daemon.suspended:
            self.daemon.take_edit(is_last=True)
            self.status.thaw()
        self.save()
        self.watch.close()
        os.close(self.daemon.spool._lock)

    def restart(self):
        """Unless something is left out that needs one."""
        is_looked_for = any(mail.identity for mail in self.queue.away if mail.state == self.program.LEFT)
        seen = all(map(self.users.is_seen, self.users.held()))
        if seen and not is_looked_for and not any(self.users.outside.iterdir()):
            self.stop()
            self.start()

    def save(self):
        self.status.save()

    def scan(self):
        if not self.daemon.suspended:
            self.daemon.scan()

    def flush(self):
        self.daemon.flush()

    def reload(self):
        self.daemon.reload()

    def suspend(self):
        self.daemon.suspend()

    def step_clock(self):
        self.now += self.chance.choice([1, 70, 400, -100])
        self.daemon.check_clock()

    def see_events(self):
        while select.select([self.watch.handle], [], [], 0)[0]:
            for mask, name in self.watch.wait():
                with contextlib.suppress(OSError):  # as the daemon does
                    self.daemon.lookout.noticed(mask, name)

    def deliver(self):
        """Some of what is due."""
        self.queue.release(self.now)
        while not self.daemon.suspended and (mail := self.queue.take()):
            self.story.append(f"  flies: {os.path.basename(mail.path)}")
            delivery = self.program.Delivery(self.daemon, mail)
            delivery.run()
            delivery.landed(None)
            if not self.is_peace and self.chance.random() < 0.3:
                break

    # -- the relay

    def send(self, sender, addresses, message):
        """A transaction, in which the spool may be used."""
        if not self.is_peace and self.chance.random() < 0.35:
            for what in self.chance.choices(["use", "use", "use", "see_events", "scan", "reload"], k=3):
                self.do(what)
        name = message.message_id
        return {address: self.outcome(name, address, address == addresses[0]) for address in addresses}

    def outcome(self, name, address, is_first):
        verdicts, outcome = self.program.Verdict, self.program.Outcome
        lot = 0 if self.is_peace else self.chance.random()
        if lot < 0.5:
            self.taken[name, address] += 1
            self.story.append(f"  {address} has {name}")
            return outcome(verdicts.DELIVERED, "ok")
        if lot < 0.9:
            return outcome(verdicts.DEFERRED, "451 later")
        return outcome(verdicts.REFUSED if is_first else verdicts.AGAIN, "552 too many recipients")

    # -- the judge

    def check(self):
        """What holds at every moment. Raises Failure."""
        for (name, address), times in self.taken.items():
            if address not in self.users.mails[name]:
                raise Failure(f"{address} got {name}, which is not his")
            if times > 1:
                raise Failure(f"{address} got {name} twice")
        if fault := TRACEBACK.search(self.words.getvalue()):
            raise Failure(f"a traceback: {fault[0]}")
        self.check_queue()

    def check_queue(self):
        mails = self.queue.mails
        counted = collections.Counter(mail.state for mail in mails.values())
        counted[self.program.LEFT] = self.queue.counts[self.program.LEFT]  # of those the queue keeps no count
        if wrong := [state for state, count in self.queue.counts.items() if count != counted[state]]:
            raise Failure(f"the queue's count is wrong: {wrong}")
        if [path for path, mail in mails.items() if mail.path != path]:
            raise Failure("a mail is in the queue under another path than its own")

    def make_peace(self):
        """All goes well from now on, and everybody must be served. Raises Failure."""
        self.story.append("peace")
        self.is_peace = True
        for _ in range(PEACE_ROUNDS):
            self.users.bring_all_back()
            self.see_events()
            self.now += 4000
            self.flush()
            for _ in range(6):
                self.now += 100
                self.scan()
                self.deliver()
            self.check()
            if not self.users.left() and not self.queue.mails:
                break
        self.check_end()

    def check_end(self):
        if left := self.users.left():
            raise Failure(f"does not heal: {' '.join(left)} still there")
        if self.queue.mails:
            raise Failure(f"entries of files that are gone: {' '.join(map(os.path.basename, self.queue.mails))}")
        for name, to in self.users.mails.items():
            if lacks := [address for address in to if not self.taken[name, address]]:
                raise Failure(f"{name} is lost for {' '.join(lacks)}")
        if self.queue.known.keys() - {mail.identity[:2] for mail in self.queue.away if mail.identity}:
            raise Failure("files are remembered that nobody looks for")


# ------------------------------------------------------------- as a script


def main(script):
    program = imported(script)
    print("ready", flush=True)
    for line in sys.stdin:
        if not (child := fork()):
            signal.alarm(SECONDS)
            print(json.dumps(played(program, *json.loads(line))), flush=True)
            os._exit(0)
        if status := waitpid(child, 0)[1]:
            print(json.dumps({"trouble": f"it hangs, or was ended by wait status {status}", "story": ""}), flush=True)


def imported(script):
    spec = importlib.util.spec_from_file_location("spoolgore", script)
    module = sys.modules["spoolgore"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def played(program, seed, spool):
    turmoil, trouble = Turmoil(program, seed, spool), ""
    try:
        turmoil.play()
    except Failure as failure:
        trouble = str(failure)
    except Exception:  # noqa: BLE001 -- whoever is to blame
        trouble = traceback.format_exc().replace("\n", " / ")
    story = "\n".join([*turmoil.story, turmoil.words.getvalue()])
    return {"trouble": trouble, "story": story, "uses": turmoil.users.uses}


if __name__ == "__main__":
    main(*sys.argv[1:])
