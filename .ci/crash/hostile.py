"""Part 4: relays that lie, are silent, babble and hang up, from a seed.

Forty mails of one to five recipients go to one to three relays. At each step of each conversation a relay may do the
right thing or a wrong one; after some seconds it comes to its senses, and every mail must go its way. The relays know
what they took, and what the daemon can know of that:

- "yes": one clear 2xx to the content, for a recipient and a sender that were clearly accepted. It is settled then.
- "no": clearly not.
- "maybe": 2xx and nothing else, but more replies than were asked for: the daemon may take it for delivered or not.
- "hidden": there was a reply too many before, and then one too few: as many came as were asked for, and each passes for
  the one before it. Nobody can know that the mail was taken, nor say that it may have been.
- "doubt": anything else. It is not delivered, and may go again; if it does, the log says that it may have arrived.

A reply that was not asked for comes in one write with the next one that was. If it came alone and early, a client that
asks for several things at once could not tell them apart.
"""

import contextlib
import os
import random
import re
import socket
import struct
import time
from typing import NamedTuple

from busy import check_log
from relay import Conversation, Relay, Transaction, address_of, local_part
from workshop import (
    Clock,
    Daemon,
    Failure,
    Hand,
    add_seed_arguments,
    explained,
    make_mail,
    read_status,
    seeds_of,
    states,
    wait_for,
)

MAILS, RECIPIENTS, RELAYS = 40, 5, 3
SEEDS, QUICK_SEEDS = 500, 10
HOSTILE_SECONDS, HEALING_SECONDS = 3.0, 30
ATTEMPTS, MINUTE = 4, 61
SILENCE = 2.5  # seconds; the daemon would wait for 600 after the content
FAULTS = ("wrong", "many", "half", "silence", "slow", "reset", "close", "421", "garbage", "surplus", "flood")
QUIET_FAULTS = ("wrong", "many", "close")  # after a surplus reply: what comes in the same write as that
CODES = (b"220", b"221", b"250", b"299", b"334", b"354", b"450", b"451", b"452", b"454", b"500", b"501", b"502", b"503",
         b"504", b"530", b"550", b"552", b"553", b"554")  # fmt: skip
GARBAGE = (b"\x00\xff\xfe\x01\r\n", b"hello\r\n", b"2500 fine\r\n", b"25 fine\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n",
           b"\r\n", b"250_fine\r\n", b"-250 fine\r\n", b"\xe2\x80\xa8250 fine\r\n")  # fmt: skip
CLAIMABLE = {"yes", "maybe", "hidden"}  # what the relay's words may be when the daemon says that a mail was sent
OFFERS = ("PIPELINING", "CHUNKING", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES", "SIZE 1000000", "DSN")


class Case(NamedTuple):
    seed: int

    @property
    def command(self):
        return f"relay --seed {self.seed}"


def add_arguments(parser):
    add_seed_arguments(parser, SEEDS, first=1)


def missing():
    return ""


def remarks(notes):
    return [f"{sum(map(int, notes)):,} mails came twice, after a doubt"] if notes else []


def cases(workshop, options):
    return [Case(seed) for seed in seeds_of(options, first=1, quick=QUICK_SEEDS)]


# ---------------------------------------------------------------- the relay


class HostileRelay(Relay):
    """One of several that share their knowledge."""

    def __init__(self, seed, number, rate, first=None):
        """rate: the share of steps at which it does something wrong."""
        super().__init__()
        self.seed, self.number, self.rate = seed, number, rate
        self.connections = 0
        self.impolite = []
        if first:
            self.transactions, self.of_mail = first.transactions, first.of_mail
            self.changed, self.impolite = first.changed, first.impolite

    def conversation(self, sock):
        self.connections += 1
        return Hostile(self, sock, random.Random(f"{self.seed} {self.number} {self.connections}"))

    def refuse(self, seconds):
        """Nobody listens for a while."""
        where = self.listener.getsockname()
        self.stop_listening()
        time.sleep(seconds)
        self.listen(where)


class Hostile(Conversation):
    """One connection, and what happens at each of its steps."""

    def __init__(self, relay, sock, chance):
        super().__init__(relay, sock)
        self.chance = chance
        self.offers = [offer for offer in OFFERS if chance.random() < 0.6]
        self.shifted = False  # a reply was said that nobody had asked for, or none where one was
        self.script = [f"connection {relay.number}.{relay.connections}"]  # what was said, for people

    def line(self):
        line = super().line()
        self.script.append(f"  {line[:80].decode('ascii', 'replace')}")
        return line

    # -- the steps

    def greet(self):
        self.reply(b"220 relay.example ESMTP\r\n")

    def on_EHLO(self, line):
        lines = [b"relay.example", *(offer.encode() for offer in self.offers)]
        self.reply(b"".join(b"250-%s\r\n" % text for text in lines[:-1]) + b"250 %s\r\n" % lines[-1])

    def on_other(self, line):
        self.reply(b"250 2.0.0 fine\r\n")

    def on_QUIT(self, line):
        self.reply(b"221 2.0.0 bye\r\n")

    def on_RSET(self, line):
        self.transaction = None
        self.reply(b"250 2.0.0 fine\r\n")

    def on_MAIL(self, line):
        transaction = Transaction(local_part(line))
        transaction.told, transaction.clear, transaction.script = {}, True, self.script
        self.relay.begin(transaction)
        said = self.reply(b"250 2.1.0 fine\r\n")
        transaction.clear = said is not None
        self.transaction = transaction if said is None or is_positive(said) else None

    def on_RCPT(self, line):
        if not self.transaction:
            return self.say(b"503 5.5.1 MAIL first\r\n")
        transaction, address = self.transaction, address_of(line)
        said = self.reply(b"250 2.1.5 fine\r\n")
        transaction.asked[address] = said is None or is_positive(said)
        if said is None:
            transaction.told[address] = "doubt"
        return None

    def on_DATA(self, line):
        if not self.transaction or not self.transaction.recipients:
            return self.say(b"554 5.5.1 no valid recipients\r\n")
        said = self.reply(b"354 go on\r\n")
        if said is not None and not said.startswith(b"354"):
            return None  # it does not wait for content
        stuffed = self.until(b"\r\n.\r\n", before=b"\r\n")
        return self.take(stuffed.replace(b"\r\n..", b"\r\n.")[2:] + b"\r\n")

    def take(self, content):
        """The content is there: what it comes to, and what is said about it."""
        transaction, self.transaction = self.transaction, None
        fault = self.choose()
        said = self.wrong_code(b"250") if fault == "wrong" else b"250 2.0.0 taken\r\n"
        extra = self.any_code() if fault == "surplus" else b""
        told = self.told(fault, said, extra)
        took = told in ("yes", "maybe", "hidden") or (told == "doubt" and self.chance.random() < 0.5)
        with self.relay.changed:
            transaction.content = content
            transaction.accepted = time.monotonic() if took else None
            for address in transaction.recipients:
                unclear = not transaction.clear or transaction.told.get(address)
                transaction.told[address] = "doubt" if unclear and told not in ("no", "hidden") else told
        if extra and self.chance.random() < 0.5:
            said, extra = extra, said
        try:
            self.perform(fault, said, extra)
            self.answer()
        except OSError:  # nobody heard it
            transaction.told = dict.fromkeys(transaction.told, "doubt")
            raise

    def told(self, fault, said, extra):
        """What the daemon can know of its mail from this reply."""
        if fault == "421" or (fault == "wrong" and not is_positive(said)):
            return "no"
        if fault == "close" and self.shifted:
            return "hidden"
        if fault not in (None, "wrong", "many", "slow", "surplus") or (extra and not is_positive(extra)):
            return "doubt"
        return "maybe" if extra or self.shifted else "yes"

    # -- right and wrong

    def reply(self, right):
        """Say something. Returns the reply that the client hears, None if it is none; EOFError ends the connection."""
        if "PIPELINING" not in self.offers and self.unread:
            self.relay.impolite.append(bytes(self.unread[:60]))
        fault = self.choose()
        said = self.wrong_code(right[:3]) if fault == "wrong" else right
        return self.perform(fault, said, self.any_code() if fault == "surplus" else b"")

    def choose(self):
        if self.chance.random() >= self.relay.rate:
            return None
        return self.chance.choice(QUIET_FAULTS if self.shifted else FAULTS)

    def any_code(self):
        return self.chance.choice(CODES) + b" 5.0.0 says the relay\r\n"

    def wrong_code(self, right):
        return self.chance.choice([code for code in CODES if code != right]) + b" 4.0.0 says the relay\r\n"

    def perform(self, fault, said, extra):
        self.script.append(f"    {fault or ''} {said[-60:]} {extra}")
        if fault in ("half", "silence", "reset", "close", "421", "flood"):
            getattr(self, f"do_{fault.replace('421', 'farewell')}")(said)
            raise EOFError
        if fault == "garbage":
            self.shifted = True
            garbage = self.chance.choice(GARBAGE)
            self.script.append(f"    {garbage}")
            self.say(garbage)
            return None
        if fault == "slow":
            self.do_slow(said)
        else:
            many = b"".join(said[:3] + b"-line %d\r\n" % number for number in range(self.chance.randint(1, 60)))
            self.say((many if fault == "many" else b"") + said + extra)
            self.shifted = self.shifted or bool(extra)
        return said

    def do_half(self, said):
        self.answer()
        self.sock.sendall(said[: self.chance.randint(1, len(said) - 1)])
        time.sleep(self.chance.choice((0, 0.1, 1.5)))

    def do_silence(self, said):
        self.answer()
        self.sock.settimeout(SILENCE)
        while self.sock.recv(65536):
            pass

    def do_slow(self, said):
        self.answer()
        cut = self.chance.randint(1, len(said) - 1)
        for part in (said[:cut], said[cut:]):
            time.sleep(self.chance.random() * 0.3)
            self.sock.sendall(part)

    def do_reset(self, said):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def do_close(self, said):
        self.answer()

    def do_farewell(self, said):
        self.say(b"421 4.3.2 going down\r\n")
        self.answer()

    def do_flood(self, said):
        self.answer()
        self.sock.sendall((said[:3] + b"-" + b"x" * 70 + b"\r\n") * 2000)


def is_positive(reply):
    return reply.startswith(b"2")


# ------------------------------------------------------------------- run


class Battle:
    """A spool, its relays and its daemon, all from a seed."""

    def __init__(self, workshop, seed):
        self.chance = chance = random.Random(seed)
        self.workshop, self.spool = workshop, workshop.new("spool")
        self.clock = Clock(self.spool.parent / "clock")
        self.relays = []
        for number in range(chance.randint(1, RELAYS)):
            rate = chance.choice((0.02, 0.05, 0.1, 0.2, 0.4))
            self.relays.append(HostileRelay(seed, number, rate, self.relays[0] if self.relays else None))
        self.mails = {mail.name: mail for mail in map(self.mail, range(MAILS))}
        self.flags = ["-smtpaddr", ",".join(relay.address for relay in self.relays), "-tls", "off"]
        self.flags += ["-helo", "app.example", "-timeout", 1, "-freq", 1, "-attempts", ATTEMPTS]
        self.flags += ["-concurrency", chance.choice((1, 3, 10, 40))]
        self.flags += ["-fail5xx"] if chance.random() < 0.3 else []
        self.flags += ["-rate", "60/s"] if chance.random() < 0.2 else []
        self.daemon, self.judged = None, ""

    def mail(self, number):
        name = f"m{number}"
        addresses = [f"r{each}.{name}@x.example" for each in range(self.chance.randint(1, RECIPIENTS))]
        octets = self.chance.choice((300, 300, 300, 5000, 150_000))
        return make_mail(name, addresses, octets=octets, line_end=self.chance.choice((b"\n", b"\r\n")))

    def close(self):
        if self.daemon:
            self.daemon.kill()
        for relay in self.relays:
            relay.close()
        self.workshop.drop(self.spool)

    def words(self):
        """The log, and all that was said on the connections of the mail that was judged last."""
        scripts = [each.script for each in self.relays[0].of_mail[self.judged]]
        once = {id(script): script for script in scripts}.values()
        return (self.daemon.log() if self.daemon else "") + "".join("\n".join([*script, ""]) for script in once)

    def fight(self):
        hand = Hand()
        for mail in self.mails.values():
            hand.put(self.spool, mail)
        self.daemon = Daemon(self.workshop, self.spool, self.flags, clock=self.clock)
        end = time.monotonic() + HOSTILE_SECONDS
        if self.chance.random() < 0.25:
            time.sleep(0.3)
            self.relays[0].refuse(1)
        while time.monotonic() < end and not self.is_over():
            time.sleep(0.3)
            self.clock.advance(MINUTE)

    def make_peace(self):
        """From now on the relays do what is right. Raises Failure if a mail does not go its way by itself."""
        for relay in self.relays:
            relay.rate = 0
        end = time.monotonic() + HEALING_SECONDS
        while time.monotonic() < end and not self.is_over():
            wait_for(self.is_over, 0.5)
            self.clock.advance(MINUTE)
        if self.daemon.is_alive() and (left := self.left()):
            self.judged = left[0]
            raise Failure(f"does not heal: {' '.join(left)} still there")
        if status := self.daemon.stop():
            raise Failure(f"exit status {status}; {self.daemon.last_words()}")

    def is_over(self):
        return not self.left() or not self.daemon.is_alive()

    def left(self):
        return [name for name in os.listdir(self.spool) if not name.startswith(".")]

    # -- the judge

    def judge(self):
        """How many came twice, as is in order after a doubt. Raises Failure."""
        check_log(self.daemon)
        if impolite := self.relays[0].impolite:
            raise Failure(f"it speaks before it was answered, without PIPELINING: {impolite[0]!r}")
        entries, twice = read_status(self.spool / ".spoolgore.js"), 0
        for mail in self.mails.values():
            self.judged = mail.name
            entry = entries.get(str(self.spool / ".failed" / mail.name), {})
            for address in mail.recipients:
                twice += self.check(mail, address, states(entry).get(address))
        return twice

    def check(self, mail, address, state):
        """Whether this recipient got his mail twice. state: in .failed, if it is there."""
        log, about = self.daemon.log(), f"{address} of {mail.name}"
        tries = [each for each in self.relays[0].of_mail[mail.name] if address in each.told]
        told = [each.told[address] for each in tries]
        taken = self.relays[0].times(mail.name, address)
        claims = len(re.findall(rf"successfully sent to {re.escape(address)}(?![\w.@-])", log))
        if claims > sum(word in CLAIMABLE for word in told):
            raise Failure(f"{about}: {claims} times sent, it says, but the relay's words were: {' '.join(told)}")
        if state == "given up" and "yes" in told:
            raise Failure(f"{about} is given up although the relay took it")
        if state != "given up" and not CLAIMABLE & set(told):
            raise Failure(f"{about} is settled although the relay never said so: {' '.join(told)}")
        if state != "given up" and not taken:
            raise Failure(f"{about} is lost")
        for transaction in taken:
            if transaction.content != mail.content:
                raise Failure(f"{mail.name} arrived with another content")
        if "yes" in [transaction.told[address] for transaction in taken[:-1]]:
            raise Failure(f"{about} got it again although the relay had taken it: {' '.join(told)}")
        if len(taken) > 1 and "hidden" not in told and not re.search(rf"{re.escape(address)}.*may have arrived", log):
            raise Failure(f'{about} got it {len(taken)} times, and no line says "may have arrived"')
        return len(taken) > 1


def run(workshop, case, options):
    """Raises Failure. Returns how many came twice."""
    battle = Battle(workshop, case.seed)
    with contextlib.closing(battle), explained(lambda: f"{len(battle.relays)} relays", battle.words):
        battle.fight()
        battle.make_peace()
        return str(battle.judge())
