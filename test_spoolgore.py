"""Tests of spoolgore.py.

The pure sections are tested as tables. Everything else starts the script as a user does, and lets it talk to real
SMTP servers: aiosmtpd, Postfix, and where bytes or faults matter a relay that follows a script.
"""

import base64
import contextlib
import email
import email.policy
import email.utils
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from pathlib import Path

import aiosmtpd.controller
import aiosmtpd.smtp
import dkim
import gevent
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import spoolgore

SCRIPT = Path(spoolgore.__file__).resolve()
PATIENCE = 30  # seconds that anything may take on a slow machine; nothing waits that long when it works

# ----------------------------------------------------------------- helpers


def wait_until(check, what="", patience=PATIENCE):
    """check()'s first true value; for what offers no event to wait for, such as a file that goes."""
    deadline = time.monotonic() + patience
    while not (value := check()):
        assert time.monotonic() < deadline, f"waited in vain: {what or check}"
        time.sleep(0.01)
    return value


class Collector:
    """Items that other threads add, with a way to wait for them."""

    def __init__(self):
        self.items = []
        self.changed = threading.Condition()

    def add(self, item):
        with self.changed:
            self.items.append(item)
            self.changed.notify_all()

    def wait_for(self, count=1, matches=lambda item: True, patience=PATIENCE):
        """The first count items that match, as soon as they are there."""

        def found():
            return [item for item in self.items if matches(item)]

        with self.changed:
            assert self.changed.wait_for(lambda: len(found()) >= count, patience), (count, self.items[-20:])
            return found()[:count]


class Daemon:
    """The script as a process, and its log."""

    def __init__(self, spool, *flags, python=(sys.executable,), script=SCRIPT, env=None, wait=True, **options):
        self.spool, self.log = Path(spool), Collector()
        command = [*python, str(script), *map(str, flags), str(spool)]
        options = {"stdout": subprocess.DEVNULL, **options}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, env={**os.environ, **(env or {})}, start_new_session=True, **options
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        if wait:
            self.wait_for("--- starting Spoolgore")

    def _read(self):
        for line in self.process.stderr:
            self.log.add(line.decode("utf-8", "replace").rstrip("\n"))

    @property
    def lines(self):
        """The log without the times."""
        return [line[20:] for line in self.log.items]

    def wait_for(self, pattern, count=1, patience=PATIENCE):
        """The first count lines of the log that contain a match of the pattern."""
        return self.log.wait_for(count, lambda line: re.search(pattern, line), patience)

    def send(self, name):
        self.process.send_signal(getattr(signal, name))

    def wait(self, patience=PATIENCE):
        """The exit status, when the process has ended by itself and its log is read."""
        status = self.process.wait(patience)
        self.reader.join(patience)
        return status

    def stop(self, name="SIGTERM"):
        self.send(name)
        return self.wait()

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()

    def status(self):
        """The status file's entries by file name."""
        path = self.spool / ".spoolgore.js"
        entries = json.loads(path.read_text()) if path.exists() else {}
        return {os.path.basename(key): entry for key, entry in entries.items()}

    def recipients(self, name):
        """A dict from address to recipient of one mail in the status file."""
        entry = self.status().get(name, {})
        return {r["Address"]: r for key in ("To", "Cc", "Bcc") for r in entry.get(key) or ()}

    def wait_for_recipient(self, name, address, **wanted):
        """The recipient in the status file, when it has the wanted values."""

        def found():
            recipient = self.recipients(name).get(address)
            return recipient and all(recipient[key] == value for key, value in wanted.items()) and recipient

        return wait_until(found, f"{name} {address} {wanted}, not {self.recipients(name)}")


class Received:
    """A mail as a relay received it."""

    def __init__(self, sender, recipients, content):
        self.sender, self.recipients, self.content = sender, list(recipients), content

    def __repr__(self):
        return f"<{self.sender} {self.recipients} {len(self.content)} octets>"


class Recorder:
    """An aiosmtpd handler that keeps what it receives, and answers RCPT and DATA as it is told."""

    def __init__(self):
        self.mails = Collector()
        self.rcpt_replies = {}  # address -> reply, or a list of replies for one time each
        self.data_reply = "250 2.0.0 taken"

    async def handle_RCPT(self, server, session, envelope, address, options):
        reply = self.rcpt_replies.get(address, "250 2.1.5 fine")
        if isinstance(reply, list):
            reply = reply.pop(0) if reply else "250 2.1.5 fine"
        if reply.startswith("250"):
            envelope.rcpt_tos.append(address)
        return reply

    async def handle_DATA(self, server, session, envelope):
        if self.data_reply.startswith("250"):
            self.mails.add(Received(envelope.mail_from, envelope.rcpt_tos, envelope.original_content))
        return self.data_reply


class Relay(aiosmtpd.controller.Controller):
    """aiosmtpd on a port of its own."""

    def __init__(self, port=0, **options):
        self.recorder = Recorder()
        super().__init__(self.recorder, hostname="127.0.0.1", port=port, ready_timeout=PATIENCE, **options)

    def factory(self):
        return aiosmtpd.smtp.SMTP(self.handler, **self.SMTP_kwargs)

    def _trigger_server(self):
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    @property
    def mails(self):
        return self.recorder.mails.items

    def wait_for(self, count=1, patience=PATIENCE):
        return self.recorder.mails.wait_for(count, patience=patience)


def put(spool, name, text):
    """Spool a mail as an application should: write it aside, then rename it."""
    aside = Path(spool) / f".{name}.tmp"
    aside.write_bytes(text if isinstance(text, bytes) else text.encode())
    aside.rename(Path(spool) / name)


def mail(to="alice@example.org", sender="app@example.org", body="Hello.\n", **fields):
    lines = {"From": sender, "To": to, "Subject": "a test", **fields}
    return "".join(f"{name}: {value}\n" for name, value in lines.items() if value is not None) + "\n" + body


def names(spool):
    """The mails that are in the spool."""
    return sorted(name for name in os.listdir(spool) if not name.startswith("."))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@pytest.fixture
def spool(tmp_path):
    path = tmp_path / "spool"
    path.mkdir()
    return path


@pytest.fixture
def relay():
    controller = Relay()
    controller.start()
    yield controller
    controller.stop()


@pytest.fixture
def start(spool):
    """A function that starts a daemon on the spool; all are killed in the end."""
    daemons = []

    def starter(*flags, directory=None, **options):
        daemons.append(Daemon(directory or spool, *flags, **options))
        return daemons[-1]

    yield starter
    for daemon in daemons:
        daemon.kill()


@pytest.fixture
def run(start):
    """A function that runs a daemon until it ends by itself; returns it."""

    def runner(*flags, **options):
        daemon = start(*flags, wait=False, **options)
        daemon.status_code = daemon.wait()
        return daemon

    return runner


def spoolgore_run(*arguments, **options):
    """The finished process of a command line, with its output as text."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE, **options
    )


WITHOUT = """
import builtins, ctypes, fcntl, os, runpy, signal, sys
missing = sys.argv[1].split(",")
if "leases" in missing:
    del fcntl.F_SETLEASE
if "inotify" in missing:
    ctypes.CDLL = None
if "fcntl" in missing:
    import gevent.subprocess  # needs it itself

    sys.modules["fcntl"] = sys.modules["resource"] = None
if "signals" in missing:
    del signal.SIGURG, signal.SIGTSTP, signal.SIGHUP
if "posix" in missing:
    del os.O_NOFOLLOW, os.O_NONBLOCK, os.O_CLOEXEC
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def lacking(*what):
    """For Daemon's python argument: an interpreter on a system that lacks some things."""
    return sys.executable, "-c", WITHOUT, ",".join(what)


# ------------------------------------------------- a relay that follows a script


class ScriptedRelay:
    """A strict byte-level SMTP server in threads, for what aiosmtpd does not do: faults, PIPELINING, CHUNKING, counts.

    Each connection is a Conversation, run by serve(conversation), by default Conversation.serve.
    """

    def __init__(self, extensions=("PIPELINING", "8BITMIME"), serve=None, port=0):
        self.extensions, self.serve = extensions, serve or Conversation.serve
        self.mails, self.connections = Collector(), Collector()
        self.listener = socket.create_server(("127.0.0.1", port), backlog=1000)
        self.port = self.listener.getsockname()[1]
        self.open = True
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def wait_for(self, count=1, patience=PATIENCE):
        return self.mails.wait_for(count, patience=patience)

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                conversation = Conversation(self, self.listener.accept()[0])
                self.connections.add(conversation)
                threading.Thread(target=conversation.run, daemon=True).start()

    def stop(self):
        """Stop listening, and drop every connection."""
        self.listener.close()
        with contextlib.suppress(OSError):  # wakes accept()
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        for conversation in list(self.connections.items):
            conversation.close()


class Conversation:
    """One connection to a ScriptedRelay. reply_to maps a command's verb to a function from the line to a reply."""

    def __init__(self, relay, sock):
        self.relay, self.sock = relay, sock
        self.commands = []  # every line that was read, without its end
        self.round_trips = 0  # how often we waited for the client after having replied
        self.pending = b""
        self.unread = bytearray()
        self.ended = threading.Event()
        self.replies = {}

    def run(self):
        with contextlib.suppress(OSError, EOFError):
            self.relay.serve(self)
        self.close()
        self.ended.set()

    def close(self):
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    # -- bytes

    def send(self, data):
        """Replies are held until the client has to be waited for, as a pipelining server does."""
        self.pending += data

    def flush(self):
        if self.pending:
            self.round_trips += 1
            data, self.pending = self.pending, b""
            self.sock.sendall(data)

    def receive(self):
        self.flush()
        data = self.sock.recv(65536)
        if not data:
            raise EOFError
        self.unread += data

    def line(self):
        """The next line; it must end in CRLF and have no other CR or LF."""
        while b"\n" not in self.unread:
            self.receive()
        line, _, self.unread = self.unread.partition(b"\n")
        line = bytes(line)
        assert line.endswith(b"\r"), line
        assert b"\r" not in line[:-1], line
        self.commands.append(line[:-1])
        return line[:-1]

    def read(self, size):
        while len(self.unread) < size:
            self.receive()
        data = bytes(self.unread[:size])
        del self.unread[:size]
        return data

    def data(self):
        """The content behind DATA, unstuffed (RFC 5321 4.5.2)."""
        self.unread[:0] = b"\r\n"  # so that the first line is like the others
        searched = 0
        while (end := self.unread.find(b"\r\n.\r\n", searched)) < 0:
            searched = max(0, len(self.unread) - 4)
            self.receive()
        content = bytes(self.unread[: end + 2]).replace(b"\r\n.", b"\r\n")[2:]
        del self.unread[: end + 5]
        return content

    # -- the protocol

    def greet(self, banner=b"220 relay.example.org ESMTP\r\n"):
        self.send(banner)

    def serve(self):
        """A well-behaved relay, but for self.replies: verb -> reply, or a function from the line to a reply."""
        self.greet()
        while self.command():
            pass

    def command(self):
        line = self.line()
        verb = line[:4].upper().decode("ascii", "replace")
        reply = self.replies.get(verb) or self.relay_reply(verb)
        if callable(reply):
            reply = reply(line)
        handler = getattr(self, f"on_{verb}", None)
        if reply is not None:
            self.send(reply)
        elif handler:
            handler(line)
        else:
            self.send(b"250 2.0.0 fine\r\n")
        return verb != "QUIT"

    def relay_reply(self, verb):
        return getattr(self.relay, "replies", {}).get(verb)

    def on_EHLO(self, line):
        lines = [b"relay.example.org", *(text.encode() for text in self.relay.extensions)]
        self.send(b"".join(b"250-%s\r\n" % text for text in lines[:-1]) + b"250 %s\r\n" % lines[-1])

    def on_MAIL(self, line):
        self.sender, self.recipients, self.content = path_of(line), [], b""
        self.send(b"250 2.1.0 fine\r\n")

    def on_RCPT(self, line):
        self.recipients.append(path_of(line))
        self.send(b"250 2.1.5 fine\r\n")

    def on_DATA(self, line):
        self.send(b"354 go ahead\r\n")
        self.take(self.data())

    def on_BDAT(self, line):
        self.content += self.read(int(line.split()[1]))
        if line.upper().endswith(b" LAST"):
            self.take(self.content)
        else:
            self.send(b"250 2.0.0 fine\r\n")

    def take(self, content):
        self.relay.mails.add(Received(self.sender, self.recipients, content))
        self.send(b"250 2.0.0 taken\r\n")

    def on_QUIT(self, line):
        self.send(b"221 2.0.0 bye\r\n")
        self.flush()


def path_of(line):
    """The address in MAIL FROM:<...> or RCPT TO:<...>."""
    return re.fullmatch(rb"(?:MAIL FROM|RCPT TO):<(.*)>(?: .*)?", line)[1].decode()


@pytest.fixture
def scripted():
    """A function that starts a ScriptedRelay; all are stopped in the end."""
    relays = []

    def starter(*arguments, **options):
        relays.append(ScriptedRelay(*arguments, **options))
        return relays[-1]

    yield starter
    for relay in relays:
        relay.stop()


# ----------------------------------------------------------------- options

NOW = 1_795_502_400.0  # 2026-11-24T06:40:00Z
EXAMPLES = settings(deadline=None, database=None, max_examples=200, suppress_health_check=list(HealthCheck))

FLAG_VALUES = [  # flag, its text, the option that it gives
    ("smtpaddr", "a.example:587,[::1]:25", [("a.example", 587), ("::1", 25)]),
    ("smtpuser", "app", "app"),
    ("smtppassword", "-se=cret ü", "-se=cret ü"),
    ("smtpmd5user", "app", "app"),
    ("smtpmd5password", "--x", "--x"),
    ("smtppasswordcommand", "cat /run/token | head -1", "cat /run/token | head -1"),
    ("tls", "starttls", "starttls"),
    ("tlsca", "ca.pem", "ca.pem"),
    ("tlscert", "client.pem", "client.pem"),
    ("helo", "app.example.org", "app.example.org"),
    ("concurrency", "7", 7),
    ("timeout", "+3", 3),
    ("rate", "14/s, 50000/d", [(14, 1), (50000, 86400)]),
    ("freq", "0", 0),
    ("attempts", "05", 5),
    ("json", "a=b.js", "a=b.js"),
]


def options_of(*argv):
    return spoolgore.parse_options(list(argv))


def spellings(flag, value):
    return [[f"-{flag}", value], [f"-{flag}={value}"], [f"--{flag}", value], [f"--{flag}={value}"]]


def test_defaults():
    assert options_of("spool") == spoolgore.Options(
        directory="spool",
        smtpaddr=[("127.0.0.1", 25)],
        smtpuser="",
        smtppassword="",
        smtpmd5user="",
        smtpmd5password="",
        smtpauth="",
        smtppasswordcommand="",
        tls="auto",
        tlsca="",
        tlscert="",
        helo="",
        concurrency=100,
        timeout=60,
        freq=10,
        attempts=100,
        rate=[],
        fail5xx=False,
        once=False,
        json="",
        status=False,
    )


@pytest.mark.parametrize("flag, text, value", FLAG_VALUES)
def test_every_flag_in_four_spellings_before_and_behind_the_directory(flag, text, value):
    expected = options_of("spool")._replace(**{flag: value})
    for words in spellings(flag, text):
        assert options_of(*words, "spool") == expected
        assert options_of("spool", *words) == expected


@pytest.mark.parametrize("flag", ["fail5xx", "once", "status"])
def test_switches_take_no_value_but_true(flag):
    expected = options_of("spool")._replace(**{flag: True})
    for word in (f"-{flag}", f"--{flag}", f"-{flag}=true", f"--{flag}=1"):
        assert options_of(word, "spool") == expected
        assert options_of("spool", word) == expected
    with pytest.raises(spoolgore.UsageError, match=f'^invalid value "false" for flag -{flag}: '):
        options_of(f"-{flag}=false", "spool")


def test_each_flag_of_the_usage_text_is_an_option():
    flags = spoolgore.flags(spoolgore.__doc__)
    assert {*flags, "directory"} == {*spoolgore.Options._fields, "help", "version"}
    assert {name for name, value in flags.items() if not value} == {"fail5xx", "once", "status", "help", "version"}
    assert {flag for flag, _, _ in FLAG_VALUES} == {name for name, value in flags.items() if value} - {"smtpauth"}


@pytest.mark.parametrize(
    "argv, changed",
    [
        (["-freq", "1", "-freq=2"], {"freq": 2}),
        (["-smtpuser", "-freq"], {"smtpuser": "-freq"}),
        (["-smtpuser="], {}),
        (["-smtpuser", ""], {}),
        (["-json", "--", "-once"], {"json": "--", "once": True}),
        (["-smtpauth", "xoauth2", "-smtpuser", "app"], {"smtpauth": "xoauth2", "smtpuser": "app"}),
        (["-smtpauth=cram-md5", "-smtpmd5user=app"], {"smtpauth": "cram-md5", "smtpmd5user": "app"}),
        (["-smtpaddr", "-"], {"smtpaddr": []}),
        (["-smtpaddr", "mx"], {"smtpaddr": [("mx", 25)]}),
        (["-smtpaddr", "mx", "-tls", "smtps"], {"smtpaddr": [("mx", 465)], "tls": "smtps"}),
        (["-smtpaddr", ":2525"], {"smtpaddr": [("localhost", 2525)]}),
        (["-smtpaddr", "[fe80::1%eth0]"], {"smtpaddr": [("fe80::1%eth0", 25)]}),
        (["-smtpaddr", "a:1, b:2 ,c"], {"smtpaddr": [("a", 1), ("b", 2), ("c", 25)]}),
        (["-rate", "1/s"], {"rate": [(1, 1)]}),
        (["-rate", "60/m,3600/h,1000000/d"], {"rate": [(60, 60), (3600, 3600), (1000000, 86400)]}),
    ],
)
def test_command_lines(argv, changed):
    assert options_of(*argv, "spool") == options_of("spool")._replace(**changed)


@pytest.mark.parametrize("argv, directory", [(["--", "-x"], "./-x"), (["-once", "--", "a b"], "a b"), (["-"], "./-")])
def test_directories_that_look_like_flags(argv, directory):
    assert options_of(*argv).directory == directory


BAD_VALUES = {
    "freq": ["abc", "", "1.5", "١", "1 ", "99999999999", "-1", "-0x1"],
    "attempts": ["-1", "many"],
    "concurrency": ["0", "-5", ""],
    "timeout": ["0", "-1", "1m"],
    "tls": ["", "TLS", "ssl"],
    "smtpauth": ["gssapi", "PLAIN", "plain"],  # the last one has no -smtpuser
    "helo": ["a b", "x\r\nMAIL FROM:<a>", "ü"],
    "rate": ["0/s", "-1/s", "5", "5/w", "5/s,", ",5/s", "5/s,,6/m", "5 / s", "1.5/s", "/s", "s", "١/s", "5/S"],
    "smtpaddr": [
        *["", ",", "a:1,", "a:0", "a:65536", "a:x", "a:", "a:1:2", "::1", "[::1", "[::1]x", "a b:25", "[a b]:1", "x/y"],
        *["a..b:25", ".a", "x" * 64 + ".org"],
    ],
}


@pytest.mark.parametrize("flag, value", [(flag, value) for flag, values in BAD_VALUES.items() for value in values])
def test_bad_values_are_refused_and_named(flag, value):
    with pytest.raises(spoolgore.UsageError, match=rf'^invalid value "[^"]*" for flag -{flag}: .'):
        options_of(f"-{flag}", value, "spool")


@pytest.mark.parametrize(
    "argv, status, words",
    [
        ([], 1, "please specify a spool directory"),
        (["-once"], 1, "please specify a spool directory"),
        ([""], 1, "please specify a spool directory"),
        (["-freq", "abc"], 2, 'invalid value "abc" for flag -freq: parse error'),
        (["-freq", "abc", "spool"], 2, 'invalid value "abc" for flag -freq: parse error'),
        (["spool", "--attempts=-3"], 2, 'invalid value "-3" for flag -attempts: must be 0 or more'),
        (["-zzz"], 2, "flag provided but not defined: -zzz"),
        (["spool", "--zzz=1"], 2, "flag provided but not defined: -zzz"),
        (["-fre", "1", "spool"], 2, "flag provided but not defined: -fre"),
        (["-freq"], 2, "flag needs an argument: -freq"),
        (["spool", "--freq"], 2, "flag needs an argument: -freq"),
        (["---freq", "1", "spool"], 2, "bad flag syntax: ---freq"),
        (["-=1", "spool"], 2, "bad flag syntax: -=1"),
        (["-once=false", "spool"], 2, 'invalid value "false" for flag -once: '),
        (["a", "b"], 2, "one spool directory, not 2: a b"),
        (["-rate", "fast", "spool"], 2, 'invalid value "fast" for flag -rate: '),
        (["-tlsca", "missing.pem", "spool"], 2, 'invalid value "missing.pem" for flag -tlsca: '),
    ],
)
def test_wrong_command_lines(spool, argv, status, words):
    done = spoolgore_run(*argv, cwd=spool.parent)
    first, *others = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (status, "")
    if status == 1:  # a line of the log, with its time
        assert (first[20:], others) == (words, [])
    else:
        assert first.startswith(words)
        assert others[0] == "Usage:"
    assert names(spool) == [] and not (spool / ".spoolgore.lock").exists()


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["-help", "spool"], ["--h"]])
def test_help(words):
    done = spoolgore_run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert not re.search(r"--\w", done.stdout.replace("--name", ""))
    headings = re.findall(r"^(\w+)(?: options)?:$", done.stdout, re.MULTILINE)
    assert headings == ["Usage", "Relay", "Queue", "Status", "Other", "Signals"]
    assert re.findall(r"^  (SIG\w+)", done.stdout.partition("\nSignals:\n")[2], re.M) == [
        *["SIGURG", "SIGHUP", "SIGTSTP", "SIGTERM"]
    ]
    assert max(map(len, done.stdout.splitlines())) < 80


def test_version():
    done = spoolgore_run("-version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"spoolgore.py {spoolgore.VERSION}\n", "")


def test_importing_the_module_patches_nothing():
    code = "import spoolgore, socket, gevent.monkey; print(gevent.monkey.is_module_patched('socket'), socket.socket)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parent)
    assert done.stdout == "False <class 'socket.socket'>\n"


# ----------------------------------------------------------------- message


def read_message(data, size=None):
    data = data if isinstance(data, bytes) else data.encode()
    return spoolgore.Message(io.BytesIO(data), len(data) if size is None else size)


def content_of(data, size=None):
    return b"".join(read_message(data, size).content())


STREAMED = spoolgore.CHUNK  # a size from which a mail is not held whole

ADDRESS_LISTS = [
    ("", []),
    ("a@x.org", ["a@x.org"]),
    ("<a@x.org>", ["a@x.org"]),
    ("Al Ice <a@x.org>", ["a@x.org"]),
    ("a@x.org,b@x.org", ["a@x.org", "b@x.org"]),
    (" a@x.org , , b@x.org,", ["a@x.org", "b@x.org"]),
    ('"Doe, Jane" <j@x.org>, "x\\"y, <z@x.org>" <q@x.org>', ["j@x.org", "q@x.org"]),
    ("=?utf-8?Q?Doe=2C_J=C3=A4n_=3Cevil=40x=2Eorg=3E?= <j@x.org>", ["j@x.org"]),
    ("=?utf-8?B?RG9lLCBKYW5l?= <j@x.org>, b@x.org", ["j@x.org", "b@x.org"]),
    ("Jörg <j@x.org>", ["j@x.org"]),
    ("undisclosed-recipients:;", []),
    ("Team: a@x.org, B <b@x.org>;, c@x.org", ["a@x.org", "b@x.org", "c@x.org"]),
    ("One: a@x.org; Two:; b@x.org", ["a@x.org", "b@x.org"]),
    ("a@x.org (Alice, of <evil@x.org>)", ["a@x.org"]),
    ("(comment (nested) \\) more) a@x.org", ["a@x.org"]),
    ("a@x.org <b@y.org>", ["b@y.org"]),
    ("a@x.org   <b@y.org>, c@x.org <d@y.org>", ["b@y.org", "d@y.org"]),
    ('"a@x.org" <b@y.org>', ["b@y.org"]),
    ('"a b"@x.org', ['"a b"@x.org']),
    ("a@[192.0.2.1], b@[IPv6:2001:db8::1]", ["a@[192.0.2.1]", "b@[IPv6:2001:db8::1]"]),
    ("o'brien+tag=1@x.org", ["o'brien+tag=1@x.org"]),
    ("jörg@bücher.example", ["jörg@bücher.example"]),
    ("root", ["root"]),
    ("<>", []),
]


@pytest.mark.parametrize("text, addresses", ADDRESS_LISTS)
def test_addresses(text, addresses):
    assert spoolgore.parse_addresses(text) == addresses


@pytest.mark.parametrize(
    "header, to, cc, bcc",
    [
        ("to: a@x.org\nCC: b@x.org\nbCC: c@x.org", ["a@x.org"], ["b@x.org"], ["c@x.org"]),
        ("TO : a@x.org\nCc\t: b@x.org", ["a@x.org"], ["b@x.org"], []),
        ("To:a@x.org\nTo: b@x.org\nto:\tc@x.org", ["a@x.org", "b@x.org", "c@x.org"], [], []),
        ("To: a@x.org,\n b@x.org,\n\t c@x.org\nCc:\n b@y.org", ["a@x.org", "b@x.org", "c@x.org"], ["b@y.org"], []),
        ('To: "Doe,\n Jane" <j@x.org>,\r\n\tB\n <b@x.org>', ["j@x.org", "b@x.org"], [], []),
        ("To: a@x.org\rCc: b@x.org\r\nBcc: c@x.org", ["a@x.org"], ["b@x.org"], ["c@x.org"]),
        ("To: a@x.org, a@x.org\nCc: a@X.ORG, A <a@x.org>\nBcc: a@x.org, b@x.org", ["a@x.org"], [], ["b@x.org"]),
        ("To: A@x.org, a@x.org", ["A@x.org", "a@x.org"], [], []),  # only the domain is without letter case
        ("To: undisclosed-recipients:;\nBcc: a@x.org", [], [], ["a@x.org"]),
        ("Subject: To: a@x.org\nX-To: b@x.org\nResent-To: c@x.org", [], [], []),
        ("Subject: a\n To: a@x.org", [], [], []),
        ("Subject: a\n\nTo: a@x.org", [], [], []),
        ("\nTo: a@x.org", [], [], []),
        ("", [], [], []),
    ],
)
def test_recipients_of_a_mail(header, to, cc, bcc):
    assert read_message(header).recipients == {"To": to, "Cc": cc, "Bcc": bcc}
    assert read_message(header + "\n\nbody\n", STREAMED).recipients == {"To": to, "Cc": cc, "Bcc": bcc}


@pytest.mark.parametrize(
    "header, field, sender",
    [
        ("From: a@x.org", "a@x.org", "a@x.org"),
        ("FROM: Foo Bar <foo@x.org>", "Foo Bar <foo@x.org>", "foo@x.org"),
        ("From: A <a@x.org>, B <b@x.org>", "A <a@x.org>, B <b@x.org>", "a@x.org"),
        ('From: "Doe, Jane"\n <j@x.org>', '"Doe, Jane" <j@x.org>', "j@x.org"),
        ("From: a@x.org\nFrom: b@x.org", "a@x.org", "a@x.org"),
        ("From:", "", ""),
        ("From: <>", "<>", ""),
        ("Sender: a@x.org", "", ""),
        ("From: =?utf-8?q?M=C3=BCller?= <m@x.org>", "=?utf-8?q?M=C3=BCller?= <m@x.org>", "m@x.org"),
        ("From: jörg@bücher.example", "jörg@bücher.example", "jörg@bücher.example"),
    ],
)
def test_sender_is_the_first_bare_address_of_from(header, field, sender):
    message = read_message(header + "\nTo: a@x.org\n\n")
    assert (message.from_field, message.sender) == (field, sender)


@pytest.mark.parametrize(
    "header, reason",
    [
        ("garbage no header", 'malformed MIME header: missing colon: "garbage no header"'),
        ("To: a@x.org\ngarbage\nCc: b@x.org", 'malformed MIME header: missing colon: "garbage"'),
        (" To: a@x.org", 'malformed MIME header: missing colon: " To: a@x.org"'),
        ("To: a@x.org\n: b@x.org", 'malformed MIME header: missing colon: ": b@x.org"'),
        ("Bcc\n : a@x.org", 'malformed MIME header: missing colon: "Bcc"'),
        ("B cc: a@x.org", 'malformed MIME header: missing colon: "B cc: a@x.org"'),
        ("From app@x.org Mon Jan  1", 'malformed MIME header: missing colon: "From app@x.org Mon Jan  1"'),
        (b"\xffTo: a@x.org", 'malformed MIME header: missing colon: "\ufffdTo: a@x.org"'),
        ("x" * 1000, f'malformed MIME header: missing colon: "{"x" * 80}"'),
        ('From: "a\x00b"@x.org', '"From" header: bad local part: '),
        (b"From: \xff@x.org", '"From" header: not UTF-8: '),
        (f"From: {'a' * 300}@x.org", '"From" header: longer than 254 octets: '),
        (f"To: {'(' * 100_000}", "comments nested too deep"),
    ],
)
def test_what_cannot_be_sent_says_why(header, reason):
    with pytest.raises(spoolgore.BadMessage) as caught:
        read_message(header)
    assert str(caught.value).startswith(reason)


def test_a_header_without_end():
    header = b"To: a@x.org\n" + b"X: y\n" * (spoolgore.HEADER_LIMIT // 5)
    with pytest.raises(spoolgore.BadMessage, match="header longer than"):
        read_message(header)


# Parsed a second time by email's newer header parser, which shares no code with email.utils.

WORDS = st.text("abcXYZ019-_", min_size=1, max_size=8)
PLAIN_ADDRESSES = st.builds("{}.{}@{}.example".format, WORDS, WORDS, st.text("abcxyz", min_size=1, max_size=8))
QUOTED_NAMES = st.text(' ,;:<>@().abc\\"', min_size=1, max_size=12).map(
    lambda name: '"%s"' % name.replace("\\", "\\\\").replace('"', '\\"')
)
COMMENTS = st.text(" ,;:<>@.ab", max_size=8).map("({})".format)
ENCODED_NAMES = st.text(st.characters(blacklist_categories=["C"]), min_size=1, max_size=8).map(
    lambda name: "=?utf-8?B?%s?=" % base64_of(name)
)
MAILBOXES = st.one_of(
    PLAIN_ADDRESSES,
    PLAIN_ADDRESSES.map("<{}>".format),
    st.builds("{} <{}>".format, st.one_of(WORDS, QUOTED_NAMES, ENCODED_NAMES), PLAIN_ADDRESSES),
    st.builds("{} {}".format, PLAIN_ADDRESSES, COMMENTS),
)
MAILBOX_LISTS = st.lists(MAILBOXES, max_size=4)
GROUPS = st.builds("{}: {};".format, WORDS, MAILBOX_LISTS.map(", ".join))
LISTS = st.lists(st.one_of(MAILBOXES, GROUPS), min_size=1, max_size=4)
FOLDS = st.sampled_from([", ", ",\n ", ",\r\n\t", " ,"])


def base64_of(name):
    return spoolgore.base64.b64encode(name.encode("utf-8", "replace")).decode()


@EXAMPLES
@given(st.lists(st.tuples(st.sampled_from(["To", "Cc", "Bcc", "TO", "bcc"]), LISTS, FOLDS), max_size=4))
def test_email_finds_the_same_recipients(fields):
    data = "".join(f"{name}: {fold.join(addresses)}\n" for name, addresses, fold in fields).encode("utf-8", "replace")
    # one at a time: email refuses to repeat these fields
    found = [email.message_from_string(f"{part}\n", policy=email.policy.default) for part in split_fields(data)]
    expected = {
        address.addr_spec for one in found for value in one.values() for address in value.addresses if address.addr_spec
    }
    recipients = read_message(data + b"\nbody\n").recipients
    assert {address for addresses in recipients.values() for address in addresses} == expected


def split_fields(data):
    return re.split(r"\n(?=\w)", data.decode().strip()) if data else []


# ------------------------------------------------------ the content of a message


def as_sent(data):
    """What a relay must receive, by reading the mail line by line; and whether its header is one."""
    lines, sent, in_header, dropping, well_formed = re.split(rb"\r\n|\r|\n", data), [], True, False, True
    if lines[-1] == b"":
        lines.pop()
    for number, line in enumerate(lines):
        in_header = in_header and line != b""
        if in_header and (number == 0 or line[:1] not in b" \t"):
            dropping = bool(re.match(rb"bcc[ \t]*:", line, re.IGNORECASE))
            well_formed = well_formed and bool(re.match(rb"[!-9;-~]+[ \t]*:", line))
        if not (in_header and dropping):
            sent.append(line + b"\r\n")
    return b"".join(sent) or b"\r\n", well_formed


@pytest.mark.parametrize(
    "data, sent",
    [
        (b"To: a@x.org\n\nHello.\n", b"To: a@x.org\r\n\r\nHello.\r\n"),
        (b"To: a@x.org\r\n\r\nHello.\r\n", b"To: a@x.org\r\n\r\nHello.\r\n"),
        (b"To: a@x.org\r\rHello.\r", b"To: a@x.org\r\n\r\nHello.\r\n"),
        (b"To: a@x.org\n\nHello.", b"To: a@x.org\r\n\r\nHello.\r\n"),
        (b"To: a@x.org", b"To: a@x.org\r\n"),
        (b"To: a@x.org\n", b"To: a@x.org\r\n"),
        (b"To: a@x.org\n\n", b"To: a@x.org\r\n\r\n"),
        (b"To: a@x.org\n\n\n\n", b"To: a@x.org\r\n\r\n\r\n\r\n"),
        (b"", b"\r\n"),
        (b"\nHello.", b"\r\nHello.\r\n"),
        (b"a:b\n\n\r\n\r\r\n\n\r", b"a:b\r\n\r\n\r\n\r\n\r\n\r\n\r\n"),
        (b"a:b\n\n.\n..\n.x\r.\r\n.\n", b"a:b\r\n\r\n.\r\n..\r\n.x\r\n.\r\n.\r\n"),
        (b"a: \xff\x00\x80\n\n\x00\xff\x0b\x0c\x85\n", b"a: \xff\x00\x80\r\n\r\n\x00\xff\x0b\x0c\x85\r\n"),
        (b"a :  x \n\ty\n \nb:c \t\n\n", b"a :  x \r\n\ty\r\n \r\nb:c \t\r\n\r\n"),
        (b"b:1\na:2\nb:3\n\n", b"b:1\r\na:2\r\nb:3\r\n\r\n"),
    ],
)
def test_content_is_the_file_with_crlf(data, sent):
    assert content_of(data) == content_of(data, STREAMED) == as_sent(data)[0] == sent


@pytest.mark.parametrize(
    "field",
    [
        *["Bcc: s@x.org\n", "BCC: s@x.org\r\n", "bcc:s@x.org\rBcc:\n", "bCc : s@x.org\n", "Bcc\t \t: s@x.org\n"],
        *["Bcc:\n s@x.org\n", "Bcc: s@x.org,\n\ts2@x.org,\r\n s3@x.org\n", "Bcc: s@x.org\n \n\t\n", "Bcc:\r s@x.org\n"],
        *[
            "Bcc: s@x.org\nBcc: s@x.org\nbCC: s@x.org\n",
            "Bcc: =?utf-8?q?s?= <s@x.org>\n",
            "Bcc: s@x.org\n To: s@x.org\n",
        ],
    ],
)
@pytest.mark.parametrize(
    "before, after", [("", ""), ("To: a@x.org\n", ""), ("", "Cc: b@x.org\n"), ("A: b\n c\n", "D:\n")]
)
@pytest.mark.parametrize("size", [None, STREAMED])
def test_no_disguise_keeps_a_bcc(field, before, after, size):
    for body in ("", "\n", "\nBcc: s is in the body\n"):
        message = read_message(before + field + after + body, size)
        assert "s@x.org" in message.recipients["Bcc"]
        expected = (before + after + body).replace("\n", "\r\n") or "\r\n"
        assert b"".join(message.content()).decode() == expected


@pytest.mark.parametrize(
    "data", ["X-Bcc: a\n\n", "Bcc-Note: a\n\n", "Subject: a\n Bcc: b\n\n", "Resent-Bcc: a\n\n", "A: b\n\nBcc: c\n"]
)
def test_what_is_no_bcc_stays(data):
    assert content_of(data).decode() == data.replace("\n", "\r\n")


FRAGMENTS = st.sampled_from(
    [
        b"\r",
        b"\n",
        b"\r\n",
        b"\n.",
        b".",
        b"\n\n",
        b" ",
        b"\t",
        b":",
        b"Bcc: s@x.org",
        b"bcc :",
        b"To: a@x.org",
        b"X: y",
    ]
    + [b"Subject: \xff\x00", b"\nBCC:", b"\r\n.\r\n", b"\r\nRCPT TO:<evil@x.org>\r\n", b"text"]
)
MAILS = st.one_of(
    st.binary(max_size=40), st.lists(st.one_of(FRAGMENTS, st.binary(max_size=3)), max_size=25).map(b"".join)
)
WELL_FORMED_MAILS = st.tuples(
    st.lists(
        st.tuples(
            st.sampled_from([b"X:", b"Bcc:", b"bCC :", b"Subject: \xff", b"Received:\t"]),
            st.lists(st.sampled_from([b"s@x.org", b" ", b"\n ", b"\r\t", b"\r\n \t", b".", b"\x00"]), max_size=4),
            st.sampled_from([b"\n", b"\r", b"\r\n"]),
        ),
        max_size=5,
    ),
    st.sampled_from([b"", b"\n", b"\r", b"\r\n"]),
    MAILS,
).map(lambda parts: b"".join(name + b"".join(value) + end for name, value, end in parts[0]) + parts[1] + parts[2])


@EXAMPLES
@given(st.one_of(MAILS, WELL_FORMED_MAILS), st.sampled_from([0, STREAMED]))
@example(b"Bcc: a\r\n\r\n.", 0)
def test_content_of_anything(data, more):
    expected, well_formed = as_sent(data)
    if well_formed:
        assert content_of(data, len(data) + more) == expected
    else:
        with pytest.raises(spoolgore.BadMessage, match="malformed MIME header"):
            read_message(data, len(data) + more)


@EXAMPLES
@given(MAILS, st.integers(1, 9))
@example(b"a: b\n\r", 5)
@example(b"a: b\r", 4)
def test_line_ends_and_header_do_not_depend_on_how_the_file_is_read(data, octets):
    def read_again():
        return spoolgore.unix_lines(io.BytesIO(data).read, octets)

    text = re.sub(rb"\r\n?", b"\n", data)
    assert b"".join(read_again()) == text
    chunks = read_again()
    header, rest = spoolgore.split_header(chunks)
    assert (header, rest + b"".join(chunks)) == spoolgore.split_header(iter([text]))


@pytest.mark.parametrize("position", ["header", "body"])
def test_content_of_large_mails_at_every_edge_of_a_chunk(position):
    tricky = b"\r\n.\r\r\n\n.\n\rx\r\n" if position == "body" else b"A: b\r\nBcc: s@x.org\r\n\ts@x.org\rC:\r\n d\n\r\n"
    start = b"To: a@x.org\nX: " + (b"\n\n" if position == "body" else b"")
    for shift in range(len(tricky) + 2):
        padding = b"x" * (spoolgore.CHUNK - len(start) - 1 - shift)
        data = start + padding + b"\n" + tricky + b"end" * (shift % 3)
        assert len(data) >= STREAMED or shift
        assert content_of(data, STREAMED) == as_sent(data)[0]
        assert content_of(data + b"y" * spoolgore.CHUNK) == as_sent(data + b"y" * spoolgore.CHUNK)[0]


@EXAMPLES
@given(MAILS, st.lists(st.integers(0, 60)))
def test_dots_are_stuffed_however_the_content_is_cut(data, cuts):
    content = as_sent(b"\n" + data)[0]
    lines = content.split(b"\r\n")
    ends = [0, *sorted(cuts), len(content)]
    chunks = [content[a:b] for a, b in zip(ends, ends[1:])]
    assume(not any(chunk.endswith(b"\r") for chunk in chunks))  # content() never ends a chunk between CR and LF
    stuffed = b"\r\n".join(b"." + line if line.startswith(b".") else line for line in lines)
    assert b"".join(spoolgore.dot_stuffed(chunks)) == stuffed


def test_size_is_exact_when_the_mail_is_held_whole():
    message = read_message(b"To: a@x.org\nBcc: s@x.org\n\nHello.\n")
    assert message.size == len(b"".join(message.content())) == len(message.whole)
    streamed = read_message(b"To: a@x.org\n\n" + b"x" * STREAMED)
    assert (streamed.whole, streamed.size) == (None, STREAMED + 13)
    assert list(streamed.content()) and b"".join(streamed.content()) == b"".join(streamed.content())


# ---------------------------------------------- what a relay reads of a message


def connection_to(relay):
    options = options_of("-smtpaddr", relay.address, "-timeout", str(PATIENCE), "-helo", "app.example.org", "spool")
    return spoolgore.Connection(options.smtpaddr[0], options.timeout).dial(spoolgore.Security(options, {}))


@pytest.mark.parametrize(
    "extensions, more",
    [(("8BITMIME",), 0), (("PIPELINING",), 0), (("PIPELINING",), STREAMED), (("PIPELINING", "CHUNKING"), 0)],
)
def test_a_strict_relay_receives_the_file_with_crlf_and_without_bcc(scripted, extensions, more):
    relay = scripted(extensions)
    connection = connection_to(relay)

    @EXAMPLES
    @given(st.one_of(MAILS, WELL_FORMED_MAILS))
    def check(data):
        data = b"From: app@x.org\nTo: a@x.org\n" + data
        expected, well_formed = as_sent(data)
        assume(well_formed)
        message = read_message(data, len(data) + more)
        outcomes = connection.transact("app@x.org", ["a@x.org"], message)
        assert outcomes == {"a@x.org": (spoolgore.Verdict.DELIVERED, "250 2.0.0 taken")}
        received = relay.mails.items[-1]
        assert (received.sender, received.recipients, received.content) == ("app@x.org", ["a@x.org"], expected)

    check()
    assert len(relay.connections.items) == 1
    connection.quit_politely()


HOSTILE_TEXT = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "\r",
                "\n ",
                "\r\n\t",
                "\x00",
                "\x85",
                "\u2028",
                "<",
                ">",
                "@",
                ",",
                ";",
                ":",
                '"',
                "\\",
                "(",
                ")",
                "[",
                "]",
            ]
            + [
                " ",
                ".",
                "a",
                "x.org",
                "a@x.org",
                "\uff1c",
                "\uff1e",
                "\uff20",
                "\uff0c",
                "\u3000",
                "\u00a8",
                "ü",
                "\udc80",
            ]
            + [
                "RCPT TO:<evil@x.org>",
                "\r\n RCPT TO:<evil@x.org>\r\n DATA",
                " SIZE=1",
                "NOTIFY=NEVER",
                "=?utf-8?q?=0D=0A?=",
            ]
        ),
        st.text(max_size=2),
    ),
    max_size=8,
).map("".join)
PATH = rb'<(?:(?:"(?:[^"\\<>\r\n\x00]|\\[^<>\r\n\x00])*"|[^\s"<>\x00@\\]+)(?:@[^\s"<>\x00@\\]+)?)?>'


@pytest.mark.parametrize("extensions", [("PIPELINING",), ("8BITMIME", "SMTPUTF8")])
def test_no_address_injects_anything_into_the_dialogue(scripted, extensions):
    relay = scripted(extensions)
    connection = connection_to(relay)
    commands = relay.connections.items[0].commands
    parameters = rb"( BODY=8BITMIME)?( SMTPUTF8)?" if "SMTPUTF8" in extensions else rb""

    @EXAMPLES
    @given(HOSTILE_TEXT, HOSTILE_TEXT, HOSTILE_TEXT)
    @example("a@x.org", 'b@x\uff1e.org, c@x\uff1e\u00a8notify=never.org, "d\uff1e"@\u00fc.org', "e@x.org")
    def check(sender, to, bcc):
        data = f"From: {sender}\nTo: {to}\nBcc: {bcc}\n\nHello.\n".encode("utf-8", "surrogateescape")
        try:
            message = read_message(data)
        except spoolgore.BadMessage:
            return assume(False)
        found = [address for addresses in message.recipients.values() for address in addresses]
        addresses = [address for address in found if not spoolgore.address_problem(address)]
        before = len(commands)
        outcomes = connection.transact(message.sender, addresses, message)
        assert list(outcomes) and set(outcomes) == set(addresses) if addresses else outcomes == {}
        spoken = [address for address in addresses if outcomes[address].verdict is spoolgore.Verdict.DELIVERED]
        expected = (
            [rb"MAIL FROM:" + PATH + parameters, *[rb"RCPT TO:" + PATH] * len(spoken), rb"DATA"] if spoken else []
        )
        assert len(commands) - before == len(expected)
        for line, pattern in zip(commands[before:], expected):
            assert re.fullmatch(pattern, line), line
        return None

    check()
    assert len(relay.connections.items) == 1
    connection.quit_politely()


ADDRESS_PROBLEMS = [
    ("a@x.org", ""),
    ("postmaster", ""),
    ('"a b\\"c"@x.org', ""),
    ("a@[IPv6:::1]", ""),
    ("jörg@bücher.example", ""),
    ("a" * 246 + "@xxx.org", ""),
    ("a" * 247 + "@xxx.org", "longer than 254 octets"),
    ("ü" * 124 + "@xxx.org", "longer than 254 octets"),
    ("", "bad local part"),
    ("@x.org", "bad local part"),
    ("a b@x.org", "bad local part"),
    ("a\r\nb@x.org", "bad local part"),
    ("a\x00@x.org", "bad local part"),
    ("a<b@x.org", "bad local part"),
    ("a@b@x.org", "bad local part"),
    ('"a\r\n"@x.org', "bad local part"),
    ('"a>"@x.org', "bad local part"),
    ('"a"b"@x.org', "bad local part"),
    ('"a\\"@x.org', "bad local part"),
    ("a\u2028@x.org", "bad local part"),
    ("a@", "bad domain"),
    ("a@x org", "bad domain"),
    ("a@x.org>", "bad domain"),
    ("a@x.org\r\nDATA", "bad domain"),
    ("a@x\x7f.org", "bad domain"),
    ("a@x\u3000.org", "bad domain"),
    ("\udcff@x.org", "not UTF-8"),
]


@pytest.mark.parametrize("address, problem", ADDRESS_PROBLEMS)
def test_addresses_that_cannot_be_spoken(address, problem):
    assert spoolgore.address_problem(address) == problem


@pytest.mark.parametrize(
    "address, wire",
    [
        ("a@x.org", "a@x.org"),
        ("a@bücher.example", "a@xn--bcher-kva.example"),
        ("jörg@bücher.example", "jörg@xn--bcher-kva.example"),
        ("jörg", "jörg"),
        ("a@ü..org", None),
        ("a@" + "ü" * 80, None),
        ("a@x\uff1e.org", None),  # IDNA makes > of it
        ("a@x\uff1e\u00a8notify=never.org", None),  # and a space of this
        ("a@x\uff20.org", None),
    ],
)
def test_addresses_on_the_wire(address, wire):
    if wire:
        assert spoolgore.wire_address(address) == wire
    else:
        with pytest.raises(ValueError):
            spoolgore.wire_address(address)


HOSTILE_MAILS = {  # the one recipient that must not be asked for, or whose header is hard work; alice is to be served
    "nul": "To: a\x00b@x.org, alice@x.org",
    "brackets": 'To: "<evil@x.org>"@x.org, alice@x.org',
    "injection": 'To: "a\r\n RCPT TO:<evil@x.org>"@x.org, alice@x.org',
    "long": f"To: {'a' * 10_000}@x.org, alice@x.org",
    "encoded": "To: =?utf-8?q?a=0D=0ARCPT_TO=3A=3Cevil=40x=2Eorg=3E?= <alice@x.org>",
    "idna": "To: a@x\uff1e\u00a8notify=never.org, alice@x.org",
    "latin": b"To: \xfc@x.org, alice@x.org",
    "missing comma": "To: bob@x.org carol@x.org\nCc: alice@x.org",
    "one word": f"To: {'a' * 2**20}\nCc: alice@x.org",
    "at signs": f"To: {'@' * 2**17}\nCc: alice@x.org",
    "at letters": f"To: {'a@' * 2**17}\nCc: alice@x.org",
    "quotes": "To: " + '"\\' * 2**19 + "\nCc: alice@x.org",
    "brackets only": f"To: {'<' * 2**17}\nCc: alice@x.org",
    "spaces": f"To: b@x.org{' ' * 2**20}\nCc: alice@x.org",
    "commas": f"To: {',' * 2**17}\nCc: alice@x.org",
    "long subject": f"Subject: {'x' * 2**20}\nTo: alice@x.org",
    "many fields": "".join(f"X-{number}: y\n" for number in range(100_000)) + "To: alice@x.org",
    "many folds": "Subject: x" + "\n y" * 100_000 + "\nTo: alice@x.org",
}


def test_hostile_headers_are_served_but_for_the_offending_recipient(spool, scripted, run):
    relay = scripted()
    for name, header in HOSTILE_MAILS.items():
        header = header if isinstance(header, bytes) else header.encode()
        put(spool, name, b"From: app@x.org\nSubject: %s\n" % name.encode() + header + b"\n\nHello.\n")
    daemon = run("-once", "-attempts", 1, "-smtpaddr", relay.address)
    served = [re.match(rb"From: app@x.org\r\nSubject: ([^\r]*)", received.content)[1] for received in relay.mails.items]
    assert sorted(served) == sorted(name.encode() for name in HOSTILE_MAILS)
    for received in relay.mails.items:
        assert "alice@x.org" in received.recipients and not {"evil@x.org", "evil@x.org>"} & set(received.recipients)
    assert names(spool) == []
    assert not [line for line in daemon.lines if "Traceback" in line or "unexpected" in line]
    failed = {name: entry["To"][0]["Error"] for name, entry in daemon.status().items()}
    assert failed["nul"].startswith("553 5.1.3 not sent: bad local part")
    assert failed["idna"].startswith("553 5.6.7 not sent: ")
    assert {"nul", "brackets", "injection", "long", "idna", "latin", "missing comma", "one word"} <= set(failed)


@pytest.mark.parametrize("form, count", [("To: {}\n", 50_000), ("To:\n {}\n", 50_000), ("Bcc: people: {};\n", 10_000)])
def test_recipients_by_the_thousand(form, count):
    addresses = [f"u{number}@x.org" for number in range(count)]
    message = read_message(form.format(",\n ".join(addresses)) + "\nHello.\n")
    assert [*message.recipients["To"], *message.recipients["Bcc"]] == addresses
    envelope = spoolgore.new_envelope(message, NOW)
    assert spoolgore.envelope_problem(spoolgore.unpack(spoolgore.pack("/spool/m1", envelope))) == ""


def test_many_recipients_are_served_a_hundred_at_a_time(spool, scripted, run):
    relay = scripted()
    addresses = [f"u{number}@x.org" for number in range(2050)]
    put(spool, "m1", mail(",\n ".join(addresses)))
    assert run("-once", "-smtpaddr", relay.address).status_code == 0
    assert [address for received in relay.mails.items for address in received.recipients] == addresses
    assert [len(received.recipients) for received in relay.mails.items] == [100] * 20 + [50]


def test_every_line_of_a_reply_and_its_enhanced_code_are_kept(scripted):
    relay = scripted()
    connection = connection_to(relay)
    relay.replies = {
        "RCPT": lambda line: (
            b"450-4.2.1 wait\r\n450-4.2.1 \x07 until\r\n450 4.2.1 noon\r\n" if b"bob" in line else None
        ),
    }
    relay.connections.items[0].replies = {
        "RCPT": lambda line: relay.replies["RCPT"](line) or Conversation.on_RCPT(relay.connections.items[0], line)
    }
    outcomes = connection.transact("app@x.org", ["bob@x.org", "al@x.org"], read_message(b"To: al@x.org\n\n"))
    assert outcomes["bob@x.org"].text == "450 4.2.1 wait\n4.2.1   until\n4.2.1 noon"
    assert outcomes["bob@x.org"].verdict is spoolgore.Verdict.DEFERRED


@pytest.fixture(scope="module")
def dkim_key():
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private, b"v=DKIM1; k=rsa; p=" + spoolgore.base64.b64encode(public)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("extensions", [("PIPELINING", "8BITMIME"), ("PIPELINING", "CHUNKING")])
def test_a_dkim_signature_made_before_spooling_verifies_after_delivery(spool, scripted, run, dkim_key, end, extensions):
    private, record = dkim_key
    text = (
        "X-Trace: from a by b;\n\tTue, 24 Nov 2026 06:37:23 +0000\nX-Trace: from c by d\n"
        "From: Jörg  <app@x.org>\nSUBJECT:  folded\n\t and   spaced \nTo: a@x.org,\n b@x.org\nX-Empty:\n"
        "\n.\n..dots\n Grüße  \n\n\n"
    )
    unsigned = text.encode().replace(b"\n", end)
    include = [b"from", b"subject", b"to", b"x-trace", b"x-trace", b"x-empty"]
    signature = dkim.sign(
        unsigned, b"sel", b"x.org", private, canonicalize=(b"simple", b"simple"), include_headers=include
    )
    signed = signature.replace(b"\r\n", end) + unsigned
    relay = scripted(extensions)
    put(spool, "m1", signed.replace(b"X-Empty:", b"BCC: s@x.org," + end + b" t@x.org" + end + b"X-Empty:"))
    assert run("-once", "-smtpaddr", relay.address).status_code == 0
    received = relay.mails.items[0]
    assert received.recipients == ["a@x.org", "b@x.org", "s@x.org", "t@x.org"]
    assert b"s@x.org" not in received.content
    assert dkim.verify(received.content, dnsfunc=lambda name, timeout=5: record)
    assert not dkim.verify(received.content.replace(b"..dots", b".dots"), dnsfunc=lambda name, timeout=5: record)


# ---------------------------------------------------------------- envelope

STATES = {  # state -> Status and Error
    spoolgore.WAITING: (0, "451 before"),
    spoolgore.IN_FLIGHT: (1, "451 before"),
    spoolgore.DELIVERED: (2, ""),
    spoolgore.GIVEN_UP: (2, "550 before"),
}
MOMENT = "2026-11-24T06:40:00.000000Z"


def addressee(address="a@x.org", status=0, error="", attempts=0, moment=MOMENT, **more):
    known = {"Address": address, "Status": status, "Attempts": attempts, "NextAttempt": moment, "Error": error}
    return {**known, **more}


def in_state(name, address="a@x.org", **more):
    status, error = STATES[name]
    return addressee(address, status, error, **more)


def envelope_to(*to, cc=(), bcc=(), **more):
    return {
        "From": "app@x.org",
        "To": list(to),
        "Cc": list(cc),
        "Bcc": list(bcc),
        "Attempts": 0,
        "Enqueued": MOMENT,
        **more,
    }


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("2026-11-24T06:40:00Z", NOW),
        ("2026-11-24T06:40:00.5Z", NOW + 0.5),
        ("2026-11-24T06:40:00.985960084Z", NOW + 0.985960084),
        ("2026-11-24T07:40:00+01:00", NOW),
        ("2026-11-24T01:10:00.25-05:30", NOW + 0.25),
        ("2026-11-24T06:40:00-00:00", NOW),
        ("1970-01-01T00:00:00Z", 0),
        ("0001-01-01T00:00:00Z", -62135596800),
        ("9999-12-31T23:59:59Z", 253402300799),
        ("2024-02-29T00:00:00Z", 1709164800),
    ],
)
def test_times_are_read(text, seconds):
    assert spoolgore.parse_time(text) == pytest.approx(seconds, abs=1e-6, rel=0)


@pytest.mark.parametrize(
    "text",
    ["", "now", None, 5, "2026-11-24", "2026-11-24T06:40:00", "2026-11-24 06:40:00Z", "2026-13-24T06:40:00Z"]
    + ["2025-02-29T00:00:00Z", "2026-11-24T24:00:00Z", "2026-11-24T06:40:60Z", "2026-11-24T06:40:00,5Z"]
    + ["0000-01-01T00:00:00Z", "2026-11-24T06:40:00+0100", " 2026-11-24T06:40:00Z", "2026-11-24T06:40:00Z\n"],
)
def test_what_is_no_time(text):
    with pytest.raises(ValueError):
        spoolgore.parse_time(text)


@EXAMPLES
@given(st.floats(-62135596800, 253402300799, allow_nan=False))
def test_times_survive_being_written(seconds):
    text = spoolgore.format_time(seconds)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", text)  # what Go's time package reads
    assert spoolgore.parse_time(text) == pytest.approx(seconds, abs=4e-5 if abs(seconds) > 2**33 else 2e-6, rel=0)


@pytest.mark.parametrize("attempts, minutes", [(1, 1), (2, 2), (29, 29), (30, 30), (31, 30), (100, 30)])
def test_retry_delay(attempts, minutes):
    assert spoolgore.retry_delay(attempts) == 60 * minutes


def test_a_new_envelope_has_the_keys_of_the_original():
    message = read_message("From: Foo <f@x.org>\nTo: a@x.org\nCc: b@x.org, c@x.org\nBcc: d@x.org\n\n")
    assert spoolgore.new_envelope(message, NOW) == {
        "From": "Foo <f@x.org>",
        "To": [addressee("a@x.org")],
        "Cc": [addressee("b@x.org"), addressee("c@x.org")],
        "Bcc": [addressee("d@x.org")],
        "Attempts": 0,
        "Enqueued": MOMENT,
    }
    assert list(spoolgore.new_envelope(message, NOW)) == ["From", "To", "Cc", "Bcc", "Attempts", "Enqueued"]
    assert spoolgore.new_envelope(None, NOW) == {**envelope_to(), "From": ""}


def test_an_envelope_with_bytes_that_are_no_text_can_be_written():
    message = read_message(b"From: J\xf6rg <f@x.org>\nTo: \xff@x.org\n\n")
    envelope = spoolgore.new_envelope(message, NOW)
    assert spoolgore.unpack(spoolgore.pack("/spool/\udcff", envelope)) == envelope
    assert envelope["From"] == "J?rg <f@x.org>"


MOVE_FUNCTIONS = {  # name -> (function, the state that it leads to, whether an attempt is counted, Error afterwards)
    "begin": (spoolgore.begin, spoolgore.IN_FLIGHT, 0, "451 before"),
    "delivered": (spoolgore.delivered, spoolgore.DELIVERED, 0, ""),
    "postponed": (lambda r: spoolgore.postponed(r, "452 more"), spoolgore.WAITING, 0, "452 more"),
    "deferred": (lambda r: spoolgore.deferred(r, "451 later", NOW), spoolgore.WAITING, 1, "451 later"),
    "gave_up": (lambda r: spoolgore.gave_up(r, "550 no"), spoolgore.GIVEN_UP, 1, "550 no"),
}
STATE_DIAGRAM = {
    ("waiting", "in flight"),
    ("in flight", "delivered"),
    ("in flight", "waiting"),
    ("in flight", "given up"),
    ("given up", "waiting"),  # requeue()
}


@pytest.mark.parametrize("name", MOVE_FUNCTIONS)
@pytest.mark.parametrize("before", STATES)
def test_every_move_of_a_recipient(before, name):
    function, after, counted, error = MOVE_FUNCTIONS[name]
    recipient = in_state(before, attempts=4, moment="2026-11-24T06:00:00Z", Note="kept")
    untouched = dict(recipient)
    if (before, after) not in STATE_DIAGRAM:
        with pytest.raises(ValueError, match=f"a@x.org is {before} and cannot become {after}"):
            function(recipient)
        assert recipient == untouched
    else:
        function(recipient)
        moment = "2026-11-24T06:45:00.000000Z" if name == "deferred" else untouched["NextAttempt"]
        assert spoolgore.state(recipient) == after
        assert recipient == {
            **untouched,
            "Status": recipient["Status"],
            "Attempts": 4 + counted,
            "NextAttempt": moment,
            "Error": error,
        }


def test_given_up_without_a_text_is_not_taken_for_delivered():
    recipient = in_state(spoolgore.IN_FLIGHT)
    spoolgore.gave_up(recipient, "")
    assert spoolgore.state(recipient) == spoolgore.GIVEN_UP


@pytest.mark.parametrize(
    "recipient, due",
    [
        (addressee(), True),
        (addressee(moment="2026-11-24T06:40:00.000001Z"), False),
        (addressee(moment="2026-11-24T07:40:00+01:00"), True),
        (addressee(moment="0001-01-01T00:00:00Z"), True),
        (addressee(status=1), False),
        (addressee(status=2), False),
        (addressee(status=2, error="550"), False),
    ],
)
def test_due(recipient, due):
    assert spoolgore.is_due(recipient, NOW) is due


@pytest.mark.parametrize(
    "states, settled, failed",
    [
        ("", True, False),
        ("delivered", True, False),
        ("delivered, given up", True, True),
        ("given up", True, True),
        ("waiting", False, False),
        ("in flight", False, False),
        ("given up, waiting", False, True),
        ("delivered, delivered, in flight", False, False),
    ],
)
def test_settled(states, settled, failed):
    envelope = envelope_to(*[in_state(name) for name in states.split(", ") if name])
    spread = envelope_to(cc=envelope["To"][:1], bcc=envelope["To"][1:], To=None)  # Go writes null for an empty list
    for one in (envelope, spread):
        assert (spoolgore.is_settled(one), spoolgore.has_failed(one)) == (settled, failed)


def test_next_attempt_is_that_of_the_first_who_waits():
    early, late = "2026-11-24T06:50:00Z", "2026-11-24T07:40:00Z"
    envelope = envelope_to(addressee(moment=late), addressee(status=2), cc=[addressee(moment=early)])
    assert spoolgore.next_attempt(envelope) == NOW + 600
    assert spoolgore.next_attempt(envelope_to(addressee(status=2), addressee(status=1))) == 0


def test_requeue_gives_those_who_were_given_up_a_fresh_start():
    others = [in_state(name, attempts=7) for name in (spoolgore.DELIVERED, spoolgore.WAITING)]
    envelope = envelope_to(*others, bcc=[in_state(spoolgore.GIVEN_UP, attempts=100, moment="2026-11-01T00:00:00Z")])
    untouched = json.loads(json.dumps(others))
    spoolgore.requeue(envelope, NOW)
    assert envelope["Bcc"] == [addressee(status=0, error="550 before", attempts=0)]
    assert envelope["To"] == untouched


def test_what_was_in_flight_waits_again():
    envelope = envelope_to(*[in_state(name, attempts=3) for name in STATES])
    assert spoolgore.interrupted(envelope) is True
    states = [spoolgore.state(recipient) for recipient in envelope["To"]]
    assert states == [spoolgore.WAITING, spoolgore.WAITING, spoolgore.DELIVERED, spoolgore.GIVEN_UP]
    assert {(recipient["Attempts"], recipient["NextAttempt"]) for recipient in envelope["To"]} == {(3, MOMENT)}
    assert spoolgore.interrupted(envelope) is False


def test_an_entry_of_an_unreadable_mail_gets_its_recipients_when_it_can_be_read():
    message = read_message("From: app@x.org\nTo: a@x.org\n\n")
    envelope = spoolgore.unusable(spoolgore.new_envelope(None, NOW), "has no recipients")
    assert (envelope["Error"], spoolgore.recipients(envelope)) == ("has no recipients", [])
    spoolgore.renew(envelope, message, NOW + 60)
    assert envelope == {**spoolgore.new_envelope(message, NOW + 60), "Enqueued": MOMENT}
    known = envelope_to(in_state(spoolgore.DELIVERED), Error="Permission denied")
    spoolgore.renew(known, message, NOW)
    assert known == envelope_to(in_state(spoolgore.DELIVERED))


@pytest.mark.parametrize(
    "envelope, problem",
    [
        (envelope_to(addressee()), ""),
        (envelope_to(), ""),
        ({}, ""),
        ({"To": None, "Extra": 1}, ""),
        (envelope_to(addressee(More=[1])), ""),
        (None, "not an object"),
        ([], "not an object"),
        ("x", "not an object"),
        ({"To": {}, "Cc": {"a": 1}}, "Cc is not a list"),
        ({"Bcc": "a@x.org"}, "Bcc is not a list"),
        ({"To": ["a@x.org"]}, "a recipient is not an object"),
        ({"To": [None]}, "a recipient is not an object"),
        (envelope_to(addressee(Address=None)), "a recipient's Address is missing or of the wrong type"),
        (envelope_to(addressee(status="0")), "a recipient's Status is missing or of the wrong type"),
        (envelope_to(addressee(attempts=1.5)), "a recipient's Attempts is missing or of the wrong type"),
        (envelope_to(addressee(error=None)), "a recipient's Error is missing or of the wrong type"),
        (envelope_to({"Address": "a@x.org"}), "a recipient's Status is missing or of the wrong type"),
        (envelope_to(addressee(moment="soon")), "not a time: soon"),
        (envelope_to(addressee(status=3)), "a recipient's Status is not 0, 1 or 2"),
        (envelope_to(addressee(), cc=[addressee(status=-1)]), "a recipient's Status is not 0, 1 or 2"),
    ],
)
def test_what_is_wrong_with_an_entry(envelope, problem):
    assert spoolgore.envelope_problem(envelope) == problem


def test_merge_takes_the_edit_but_for_what_happened_since():
    live = envelope_to(
        in_state(spoolgore.IN_FLIGHT, "flying@x.org", attempts=2),
        in_state(spoolgore.DELIVERED, "done@x.org"),
        in_state(spoolgore.WAITING, "waiting@x.org", attempts=5),
        in_state(spoolgore.WAITING, "removed@x.org"),
        cc=[in_state(spoolgore.IN_FLIGHT, "flying and removed@x.org"), in_state(spoolgore.DELIVERED, "known@x.org")],
    )
    kept = json.loads(json.dumps([*live["To"][:2], *live["Cc"][:1]]))
    edited = envelope_to(
        addressee("flying@x.org"),
        addressee("done@x.org"),
        addressee("waiting@x.org", attempts=0),
        addressee("added@x.org"),
        cc=[addressee("known@x.org")],  # delivered before the file was written: the edit wants it again
        Note="edited",
    )
    merged = spoolgore.merge(json.loads(json.dumps(edited)), live, {"done@x.org"})
    assert merged == {**edited, "To": [*kept[:2], *edited["To"][2:]], "Cc": [edited["Cc"][0], kept[2]]}


@pytest.mark.parametrize("start", [spoolgore.IN_FLIGHT, spoolgore.DELIVERED])
def test_an_edit_cannot_ask_twice_by_moving_a_recipient_to_another_field(start):
    live = envelope_to(in_state(start))
    merged = spoolgore.merge(envelope_to(cc=[addressee()]), live, {"a@x.org"} if start == spoolgore.DELIVERED else ())
    assert merged == envelope_to(cc=[in_state(start)])


def test_merge_leaves_each_recipient_the_dict_that_its_greenlet_holds():
    live = envelope_to(in_state(spoolgore.IN_FLIGHT, "a@x.org"), in_state(spoolgore.WAITING, "b@x.org"))
    held = list(live["To"])
    merged = spoolgore.merge(envelope_to(addressee("a@x.org"), addressee("b@x.org", attempts=9)), live, ())
    assert [held[0] is merged["To"][0], held[1] is merged["To"][1]] == [True, True]
    assert held[1]["Attempts"] == 9


# ------------------------------------------------------------------ status

OF_THE_ORIGINAL = """{
	"/spool/m1": {
		"From": "Foo Bar \\u003cfoo@example.com\\u003e",
		"To": [
			{
				"Address": "a@x.org",
				"Status": 0,
				"Attempts": 2,
				"NextAttempt": "2026-11-24T06:39:26.985960084Z",
				"Error": "451 4.7.1 try later"
			},
			{
				"Address": "b@x.org",
				"Status": 1,
				"Attempts": 0,
				"NextAttempt": "0001-01-01T00:00:00Z",
				"Error": ""
			}
		],
		"Cc": [],
		"Bcc": null,
		"Attempts": 0,
		"Enqueued": "2026-11-24T07:37:24.977808629+01:00"
	},
	"/spool/m2": {
		"From": "",
		"To": [],
		"Cc": [],
		"Bcc": [],
		"Attempts": 0,
		"Enqueued": "2026-11-24T06:37:24Z"
	}
}
"""


@pytest.fixture
def status(tmp_path):
    return spoolgore.Status(str(tmp_path / "status.js"))


def write_status(status, entries):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    Path(status.path).write_bytes(text)


def saved_entries(status):
    return json.loads(Path(status.path).read_bytes())


def test_a_file_that_the_original_wrote_is_read_and_written_as_it_would(status):
    write_status(status, OF_THE_ORIGINAL.encode())
    status.load()
    m1 = status.peek("/spool/m1")
    assert [recipient["Status"] for recipient in m1["To"]] == [0, 0]
    assert spoolgore.is_due(m1["To"][1], NOW) and spoolgore.next_attempt({**m1, "To": m1["To"][:1]}) < NOW
    status.save()
    expected = OF_THE_ORIGINAL.replace("\\u003c", "<").replace("\\u003e", ">").replace('"Status": 1', '"Status": 0')
    assert Path(status.path).read_text() == expected


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.floats(allow_nan=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)
PATHS = st.text(st.one_of(st.characters(), st.sampled_from('",\n\t:{}\udcff')))


@EXAMPLES
@given(PATHS, JSON_VALUES)
@example("/spool/\udcff", {"To": [{"Address": "ü\u2028"}], "Unknown": {"deep": [1]}})
def test_packed_entries_are_the_same_when_unpacked(path, entry):
    packed = spoolgore.pack(path, entry)
    assert spoolgore.unpack(packed) == entry
    assert json.loads(b"{" + packed + b"}") == {path: entry}


@EXAMPLES
@given(
    st.dictionaries(PATHS, JSON_VALUES, max_size=4),
    st.lists(st.tuples(st.integers(0, 200), st.sampled_from(list('",\n\t:{}x '))), max_size=2),
)
def test_a_file_is_read_like_any_json_whoever_wrote_or_damaged_it(tmp_path_factory, entries, damage):
    text = b"{\n" + b",\n".join(spoolgore.pack(path, entry) for path, entry in entries.items()) + b"\n}\n"
    for position, letter in damage:
        text = text[:position] + letter.encode() + text[position:]
    path = tmp_path_factory.getbasetemp() / "damaged.js"
    path.write_bytes(text)
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(spoolgore.CorruptStatus):
            dict(spoolgore.read_status(path))
    else:
        assert dict(spoolgore.read_status(path)) == expected


@pytest.mark.parametrize("text", [b"", b" \n", b"{}", b"{ }\n", b"{\n}\n"])
def test_a_file_without_entries(status, text):
    write_status(status, text)
    status.load()
    assert len(status) == 0


def test_a_file_that_is_not_there_is_an_empty_status(status):
    status.load()
    status.reload()
    assert len(status) == 0


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"{} {}",
        b"{'a': 1}",
        b'{"a": 1,}',
        b'{\n\t"a": {\n}\n',
        b"\x00" * 50,
        b"[" * 100_000,
    ]
    + [OF_THE_ORIGINAL.encode()[: len(OF_THE_ORIGINAL) * number // 9] for number in range(1, 9)],
)
def test_a_corrupt_file_is_set_aside(status, text):
    write_status(status, text)
    status.put("/spool/old", spoolgore.pack("/spool/old", envelope_to()))
    for read in (status.load, status.reload):
        with pytest.raises(spoolgore.CorruptStatus):
            read()
    assert list(status.entries) == ["/spool/old"]
    aside = status.set_aside(NOW)
    assert aside == os.path.join(os.path.dirname(status.path), ".status.js.corrupt-20261124T064000Z")
    assert Path(aside).read_bytes() == text and not os.path.exists(status.path)


def test_a_malformed_entry_stays_as_it_is(status):
    entries = {"/spool/m1": {"To": "me", "Status": [1]}, "/spool/m2": 7, "/spool/m3": envelope_to(addressee())}
    write_status(status, entries)
    status.load()
    status.save()
    assert saved_entries(status) == entries


def test_unknown_keys_survive(status):
    entries = {"/spool/m1": envelope_to(addressee(status=1, Ticket={"no": 5}), Owner="ops", Tags=["a", None])}
    write_status(status, entries)
    status.load()
    envelope = status.take("/spool/m1")
    spoolgore.begin(envelope["To"][0])
    spoolgore.deferred(envelope["To"][0], "451 later", NOW)
    status.rest("/spool/m1")
    status.save()
    recipient = addressee(attempts=1, error="451 later", moment="2026-11-24T06:41:00.000000Z", Ticket={"no": 5})
    assert saved_entries(status) == {"/spool/m1": envelope_to(recipient, Owner="ops", Tags=["a", None])}


def test_the_file_is_replaced_whole_and_is_for_its_owner_only(status):
    directory = Path(status.path).parent
    write_status(status, {})
    os.chmod(status.path, 0o666)
    (directory / ".status.js.new").write_text("left by a crash")
    os.chmod(directory / ".status.js.new", 0o666)
    old = open(status.path, "rb")
    status.put("/spool/m1", envelope_to(addressee()))
    status.save()
    assert stat.S_IMODE(os.stat(status.path).st_mode) == 0o600
    assert saved_entries(status) == {"/spool/m1": envelope_to(addressee())}
    assert old.read() == b"{}"  # a reader of the old file has it whole
    assert os.listdir(directory) == ["status.js"]
    old.close()


def test_a_link_in_the_place_of_the_temporary_file_leads_nowhere(status):
    directory = Path(status.path).parent
    (directory / "victim").write_text("untouched")
    (directory / ".status.js.new").symlink_to("victim")
    status.put("/spool/m1", envelope_to())
    status.save()
    assert (directory / "victim").read_text() == "untouched"
    assert not os.path.islink(status.path) and "/spool/m1" in saved_entries(status)


def test_a_write_that_fails_leaves_the_old_file_and_is_said_once(status, caplog):
    write_status(status, {"old": {}})
    os.mkdir(spoolgore.hidden(status.path, ".new"))  # so that the temporary file cannot be made, not even by root
    status.put("/spool/m1", envelope_to())
    status.save()
    status.save()
    assert saved_entries(status) == {"old": {}}
    assert len(caplog.records) == 1 and "unable to write status file" in caplog.text
    assert status.wanted.is_set()
    os.rmdir(spoolgore.hidden(status.path, ".new"))
    status.save()
    assert list(saved_entries(status)) == ["/spool/m1"]


def test_renamed_and_dropped_entries(status):
    status.put("/spool/m1", envelope_to(addressee()))
    status.put("/spool/m2", envelope_to())
    status.rename("/spool/m1", "/spool/.failed/m1")
    status.drop("/spool/m2")
    status.save()
    assert saved_entries(status) == {"/spool/.failed/m1": envelope_to(addressee())}
    assert "/spool/m1" not in status and len(status) == 1


def saved_status(status, entries):
    for path, entry in entries.items():
        status.put(path, spoolgore.pack(path, entry))
    status.save()
    return status


def test_reload_takes_what_was_edited_and_keeps_what_the_file_does_not_name(status):
    saved_status(status, {"/spool/m1": envelope_to(addressee(attempts=5)), "/spool/m2": envelope_to(addressee())})
    write_status(
        status, {"/spool/m1": envelope_to(addressee(attempts=1)), "/spool/m3": envelope_to(addressee(status=1))}
    )
    status.reload()
    assert status.peek("/spool/m1") == envelope_to(addressee(attempts=1))
    assert status.peek("/spool/m2") == envelope_to(addressee())
    assert status.peek("/spool/m3") == envelope_to(addressee(status=0))


def deliver_one(status, path, address):
    envelope = status.take(path)
    recipient = next(r for r in spoolgore.recipients(envelope) if r["Address"] == address)
    spoolgore.begin(recipient)
    spoolgore.delivered(recipient)
    status.delivered(path, address)
    status.rest(path)


def states_of(status, path):
    return {r["Address"]: spoolgore.state(r) for r in spoolgore.recipients(status.peek(path))}


def test_reload_does_not_forget_a_delivery_that_the_file_does_not_know(status):
    saved_status(status, {"/spool/m1": envelope_to(addressee("a@x.org"), addressee("b@x.org"))})
    deliver_one(status, "/spool/m1", "a@x.org")
    status.reload()
    assert states_of(status, "/spool/m1") == {"a@x.org": "delivered", "b@x.org": "waiting"}
    status.save()
    status.reload()
    assert states_of(status, "/spool/m1") == {"a@x.org": "delivered", "b@x.org": "waiting"}


def test_reload_does_not_bring_back_a_mail_that_is_gone(status):
    saved_status(status, {"/spool/m1": envelope_to(addressee())})
    status.drop("/spool/m1")
    status.reload()
    assert "/spool/m1" not in status


def test_reload_keeps_what_is_in_flight_for_the_greenlet_that_holds_it(status):
    saved_status(status, {"/spool/m1": envelope_to(addressee("a@x.org"), addressee("b@x.org"))})
    envelope = status.take("/spool/m1")
    first, second = envelope["To"]
    spoolgore.begin(first)
    status.reload()
    assert status.peek("/spool/m1") is envelope and first["Status"] == 1
    spoolgore.delivered(first)
    spoolgore.begin(second)
    spoolgore.delivered(second)
    assert states_of(status, "/spool/m1") == {"a@x.org": "delivered", "b@x.org": "delivered"}


def test_reload_of_a_malformed_entry_leaves_a_mail_in_flight_alone(status):
    saved_status(status, {"/spool/m1": envelope_to(addressee())})
    spoolgore.begin(status.take("/spool/m1")["To"][0])
    write_status(status, {"/spool/m1": {"To": "me"}})
    status.reload()
    assert states_of(status, "/spool/m1") == {"a@x.org": "in flight"}


def test_reload_knows_a_new_mail_from_an_old_one_of_the_same_name(status):
    saved_status(status, {"/spool/m1": envelope_to(addressee("old@x.org"))})
    status.drop("/spool/m1")
    status.put("/spool/m1", envelope_to(addressee("a@x.org"), addressee("b@x.org")))
    deliver_one(status, "/spool/m1", "a@x.org")
    status.reload()
    assert states_of(status, "/spool/m1") == {"a@x.org": "delivered", "b@x.org": "waiting"}


@pytest.fixture
def saver(status):
    """keep_saving() of the status in a greenlet."""
    greenlet = gevent.spawn(status.keep_saving)
    yield greenlet
    greenlet.kill()


@pytest.mark.parametrize("name", ["of its own", "of a mail that went just before"])
def test_a_delivery_is_on_the_disk_before_its_mail_goes_on(status, saver, name):
    saved_status(status, {"/spool/m1": envelope_to(addressee("old@x.org"))})
    path = "/spool/m2" if name == "of its own" else "/spool/m1"
    status.drop("/spool/m1")
    status.put(path, envelope_to(addressee("a@x.org"), addressee("b@x.org")))
    deliver_one(status, path, "a@x.org")
    with gevent.Timeout(PATIENCE):
        status.commit_deliveries(path)
    assert [recipient["Status"] for recipient in saved_entries(status)[path]["To"]] == [2, 0]


def test_a_flush_does_not_forget_who_waits_for_a_write(status):
    waiting = gevent.spawn(status.commit)
    gevent.sleep(0)
    status.thaw()  # it was not suspended
    status.save()
    waiting.join(PATIENCE)
    assert waiting.successful()


def test_deliveries_of_a_write_that_failed_are_not_forgotten(status, caplog):
    saved_status(status, {"/spool/m1": envelope_to(addressee("a@x.org"), addressee("b@x.org"), addressee("c@x.org"))})
    deliver_one(status, "/spool/m1", "a@x.org")
    os.mkdir(spoolgore.hidden(status.path, ".new"))
    writing = gevent.spawn(status.save)
    gevent.sleep(0)  # the write is under way
    deliver_one(status, "/spool/m1", "b@x.org")
    writing.join()
    assert "unable to write" in caplog.text
    status.reload()
    assert states_of(status, "/spool/m1") == {"a@x.org": "delivered", "b@x.org": "delivered", "c@x.org": "waiting"}


def test_reload_during_a_write_does_not_forget_what_is_being_written(status, monkeypatch):
    saved_status(status, {"/spool/m1": envelope_to(addressee())})
    old = Path(status.path).read_bytes()
    deliver_one(status, "/spool/m1", "a@x.org")
    may_write, write = threading.Event(), spoolgore.write_durably

    def slow_disk(path, chunks):
        assert may_write.wait(PATIENCE)
        write(path, chunks)

    monkeypatch.setattr(spoolgore, "write_durably", slow_disk)
    writing = gevent.spawn(status.save)
    gevent.sleep(0)
    assert Path(status.path).read_bytes() == old
    reloading = gevent.spawn(status.reload)
    gevent.sleep(0)
    may_write.set()
    gevent.joinall([writing, reloading], raise_error=True)
    assert states_of(status, "/spool/m1") == {"a@x.org": "delivered"}


def test_nothing_is_written_while_suspended(status):
    saved_status(status, {"/spool/m1": envelope_to(addressee())})
    deliver_one(status, "/spool/m1", "a@x.org")
    status.freeze()
    assert saved_entries(status)["/spool/m1"]["To"][0]["Status"] == 2  # the last write, before anybody edits
    edited = {"/spool/m1": envelope_to(addressee(error="edited"))}
    write_status(status, edited)
    status.put("/spool/m2", envelope_to())
    status.save()
    status.commit()  # does not wait for the end of the suspension
    assert saved_entries(status) == edited
    status.reload()
    status.thaw()
    status.save()
    assert saved_entries(status) == {**edited, "/spool/m2": envelope_to()}


def test_a_reload_between_two_transactions_of_a_mail_sends_nothing_twice(spool, scripted, start):
    relay = scripted()
    asked, go_on = threading.Event(), threading.Event()

    def first_content_is_slow(conversation):
        def take(content):
            if not relay.mails.items:
                asked.set()
                assert go_on.wait(PATIENCE)
            Conversation.take(conversation, content)

        conversation.take = take
        conversation.serve()

    relay.serve = first_content_is_slow
    addresses = [f"u{number}@x.org" for number in range(150)]
    daemon = start("-smtpaddr", relay.address)
    put(spool, "m1", mail(", ".join(addresses)))
    assert asked.wait(PATIENCE)
    wait_until(lambda: "m1" in daemon.status())
    daemon.send("SIGHUP")
    daemon.wait_for("status reloaded")
    go_on.set()
    wait_until(lambda: not names(spool), "the mail is settled", patience=10)
    assert [address for received in relay.mails.items for address in received.recipients] == addresses


# -------------------------------------------------------------------- rate


class Ledger:
    """What went out under -rate: (begin, end, recipients) of each transaction, whose moment lies between the two."""

    def __init__(self):
        self.sent = []

    def most_in_a_window(self, seconds):
        """The most recipients that may have gone out in any period of so many seconds, both ends included."""
        ends = sorted((end, count) for _, end, count in self.sent)
        sums = [0, *itertools.accumulate(count for _, count in ends)]
        begun, most = 0, 0
        for begin, _, count in sorted(self.sent):
            begun += count
            over = sums[bisect_left(ends, (begin - seconds, 0))]  # ended before the window that this one could close
            most = max(most, begun - over)
        return most


def test_the_ledger_counts_as_a_provider_would():
    ledger = Ledger()
    ledger.sent = [(0, 1, 3), (0.5, 2, 4), (11, 11, 5), (12, 13, 6)]
    assert [ledger.most_in_a_window(seconds) for seconds in (0.5, 9, 10, 20)] == [7, 11, 15, 18]


@pytest.mark.parametrize(
    "text, days, size, used",  # used: the part of the limit that is made use of at least, with a relay that takes up to 3 s
    [("14/s,50000/d", 3, 14, 0.9), ("500/h", 3, 100, 0.8), ("100/m,2000/h,20000/d", 2, 30, 0.9), ("1/s", 0.05, 1, 0.3)],
)
def test_simulated_days_at_full_speed(text, days, size, used):
    limits = spoolgore.parse_rate(text)
    rate, ledger, flying, dice = spoolgore.Rate(limits), Ledger(), [], random.Random(1)
    now = NOW
    while now < NOW + days * 86400:
        count = dice.randint(1, min(size, rate.most))
        while (wait := rate.wait(count, now)) != 0:
            if flying and (wait is None or flying[0][0] <= now + wait):  # the next thing to happen is the end of one
                end, begin, recipients = flying.pop(0)
                rate.end(recipients, end)
                ledger.sent.append((begin, end, recipients))
                now = max(now, end)
            else:
                now += wait
        assert rate.room(now) >= count
        rate.begin(count)
        flying = sorted([*flying, (now + dice.choice([0.01, 0.2, 3]), now, count)])
    ledger.sent += [(begin, end, recipients) for end, begin, recipients in flying]
    for count, seconds in limits:
        assert ledger.most_in_a_window(seconds) <= count
    tightest = min(count / seconds for count, seconds in limits)
    assert sum(count for _, _, count in ledger.sent) >= used * tightest * days * 86400


TICKS = st.integers(0, 400).map(lambda n: n / 64)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), TICKS),
        st.tuples(st.just("begin"), st.integers(1, 6)),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
        st.tuples(st.just("crash"), st.integers(0, 60)),
    ),
    max_size=40,
)
LIMITS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 8)), min_size=1, max_size=3)


def test_no_window_ever_holds_more_than_allowed_restarts_at_any_moment_included(tmp_path):
    path = tmp_path / "rate"

    @EXAMPLES
    @given(LIMITS, ACTIONS)
    def check(limits, actions):
        path.unlink(missing_ok=True)
        clock, ledger, flying = [NOW], Ledger(), []

        def started():
            turnstile = spoolgore.Turnstile(limits, str(path), lambda: clock[0])
            turnstile.load()
            return turnstile, path.stat().st_size

        turnstile, durable = started()
        for what, amount in actions:
            if what == "pass":
                clock[0] += amount
            elif what == "begin" and turnstile.room() >= amount:
                turnstile.begin(amount)
                flying.append((clock[0], amount))
                durable = path.stat().st_size
            elif what in ("end", "cancel") and amount < len(flying):
                begin, count = flying.pop(amount)
                turnstile.end(count, what == "end")
                if what == "end":
                    ledger.sent.append((begin, clock[0], count))
            elif what == "crash":  # what is not synced may be lost, in the middle of a line too
                os.truncate(path, max(durable, path.stat().st_size - amount))
                ledger.sent += [(begin, clock[0], count) for begin, count in flying]
                flying = []
                turnstile, durable = started()
        ledger.sent += [(begin, clock[0], count) for begin, count in flying]
        for count, seconds in limits:
            assert ledger.most_in_a_window(seconds) <= count

    check()


@EXAMPLES
@given(LIMITS, st.lists(st.tuples(TICKS, st.integers(1, 12)), max_size=20), st.integers(1, 12))
def test_the_wait_is_long_enough_and_not_longer(limits, past, wanted):
    rate, now = spoolgore.Rate(limits), NOW
    for pause, count in past:
        now += pause
        rate.add(min(count, max(0, rate.room(now))), now)
    wait = rate.wait(wanted, now)
    if wait is None:
        assert wanted > rate.most
    elif wait == 0:
        assert rate.room(now) >= wanted
    else:
        assert rate.room(now + wait - 0.01) < wanted <= rate.room(now + wait)


def test_in_flight_recipients_count_until_their_end_and_a_window_after_it():
    rate = spoolgore.Rate([(10, 60)])
    rate.begin(8)
    assert (rate.room(NOW), rate.room(NOW + 1000)) == (2, 2)
    assert (rate.wait(2, NOW), rate.wait(3, NOW)) == (0, None)  # None: that depends on what is in flight
    rate.end(8, NOW + 1000)
    assert (rate.room(NOW + 1060), rate.room(NOW + 1060.01)) == (2, 10)
    rate.begin(8)
    rate.cancel(8)
    assert rate.room(NOW + 1060.01) == 10


def test_the_tightest_of_several_limits_counts():
    rate = spoolgore.Rate(spoolgore.parse_rate("5/s,8/m"))
    assert (rate.most, rate.room(NOW)) == (5, 5)
    rate.add(5, NOW)
    assert rate.wait(3, NOW) == pytest.approx(1, abs=0.01)
    assert rate.wait(4, NOW) == pytest.approx(60, abs=0.01)
    assert (rate.room(NOW), rate.room(NOW + 2), rate.room(NOW + 61)) == (0, 3, 5)


def test_without_limits_nothing_waits_and_nothing_is_written(tmp_path):
    turnstile = spoolgore.Turnstile([], str(tmp_path / "rate"), lambda: NOW)
    turnstile.load()
    turnstile.begin(100)
    assert (turnstile.wait(100), turnstile.room() > 0 or turnstile.rate.most) == (
        0,
        spoolgore.RECIPIENTS_PER_TRANSACTION,
    )
    turnstile.end(100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, room",
    [
        ("", 10),
        ("+4\n", 6),  # it began, and nobody knows its end
        ("+4\n-4 1795502390.000000\n", 6),
        ("+4\n-4 1795502339.000000\n", 10),
        ("+4\n-4 1795599999.000000\n", 6),  # the wall's clock was put back: now at the latest
        ("+4\n-4 0.000000\n", 10),
        ("+4\n-4 1795502339.0000", 6),
        ("+4\n+3\n-3 1795502339.000000\n", 6),
        ("+4\n+3", 6),
        ("+4\n\x00\x00\xff\n", 6),
        ("+4\nnonsense\n+1\n", 5),
    ],
)
def test_what_a_new_process_knows_from_the_file(tmp_path, text, room):
    path = tmp_path / "rate"
    path.write_bytes(text.encode("latin-1"))
    for _ in range(2):  # the file as it was, and as it was written anew
        turnstile = spoolgore.Turnstile([(10, 60)], str(path), lambda: NOW)
        turnstile.load()
        assert turnstile.room() == room
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_file_does_not_grow_for_ever(tmp_path):
    path, clock = tmp_path / "rate", [NOW]
    turnstile = spoolgore.Turnstile([(10**8, 1), (10**8, 60)], str(path), lambda: clock[0])
    turnstile.load()
    turnstile._append = lambda line, durable: spoolgore.Turnstile._append(turnstile, line, False)  # no need to sync
    sizes = []
    for _ in range(60_000):
        clock[0] += 0.01
        turnstile.begin(1)
        turnstile.end(1)
        sizes.append(turnstile._lines)
    assert path.stat().st_size < 60_000 * 24 and max(sizes) <= 50_001
    again = spoolgore.Turnstile([(10**8, 60)], str(path), lambda: clock[0])
    again.load()
    assert 10**8 - again.room() == pytest.approx(6000, abs=3)


def test_a_rate_file_that_cannot_be_written_is_said_once_and_heals(tmp_path, caplog):
    path = tmp_path / "rate"
    os.mkdir(spoolgore.hidden(str(path), ".new"))
    turnstile = spoolgore.Turnstile([(10, 60)], str(path), lambda: NOW)
    turnstile.load()
    turnstile.begin(2)
    assert len(caplog.records) == 1 and "-rate may not hold across a restart" in caplog.text
    os.rmdir(spoolgore.hidden(str(path), ".new"))
    turnstile.end(2)
    again = spoolgore.Turnstile([(10, 60)], str(path), lambda: NOW)
    again.load()
    assert again.room() == turnstile.room() == 8


# ------------------------------------------------------------------ report


def lines_by_path(entries, now=NOW):
    files = {path: now - 60 for path, _ in entries}
    return {line.path: line for line in spoolgore.lines_of(entries, files, now)}


@pytest.mark.parametrize(
    "entry, kind, due, recipient, attempts, error",
    [
        (envelope_to(addressee()), "waiting", NOW, "a@x.org", 0, ""),
        (envelope_to(addressee(), addressee("b@x.org")), "waiting", NOW, "a@x.org +1", 0, ""),
        (envelope_to(in_state("in flight"), in_state("delivered")), "in flight", NOW, "a@x.org", 0, "451 before"),
        (envelope_to(addressee(attempts=3, error="451")), "deferred", NOW, "a@x.org", 3, "451"),
        (envelope_to(addressee(error="relay away")), "deferred", NOW, "a@x.org", 0, "relay away"),
        (envelope_to(in_state("given up", attempts=9)), "given up", math.inf, "a@x.org", 9, "550 before"),
        (envelope_to(in_state("given up"), in_state("delivered")), "given up", math.inf, "a@x.org", 0, "550 before"),
        (envelope_to(in_state("delivered")), "waiting", math.inf, "", 0, ""),
        (envelope_to(Error="has no recipients"), "unusable", math.inf, "", 0, "has no recipients"),
        ({"To": 1}, "unusable", math.inf, "", 0, "malformed entry: To is not a list"),
        (7, "unusable", math.inf, "", 0, "malformed entry: not an object"),
        (
            envelope_to(addressee("late@x.org"), addressee("soon@x.org", moment="2026-11-24T07:30:00+01:00")),
            *("waiting", NOW - 600, "soon@x.org +1", 0, ""),
        ),
    ],
)
def test_the_line_of_a_mail(entry, kind, due, recipient, attempts, error):
    line = spoolgore.line_of("/spool/m1", entry, NOW - 60)
    assert (line.kind, line.due, line.recipient) == (kind, due, recipient)
    assert (line.attempts, line.error, line.path, line.since) == (attempts, error, "/spool/m1", NOW - 60)
    assert line.sender == ("app@x.org" if kind != "unusable" or error == "has no recipients" else "")


def test_lines_come_due_first_and_of_files_only():
    entries = [
        ("/spool/later", envelope_to(addressee(moment="2026-11-24T08:00:00Z"))),
        ("/spool/vanished", envelope_to(addressee())),
        ("/spool/soon", envelope_to(addressee(moment="2026-11-24T06:00:00Z"))),
        ("/spool/failed", envelope_to(in_state("given up"))),
    ]
    files = dict.fromkeys(("/spool/later", "/spool/soon", "/spool/failed", "/spool/new"), NOW)
    lines = spoolgore.lines_of(entries, files, NOW)
    assert [(os.path.basename(line.path), line.kind) for line in lines] == [
        ("soon", "waiting"),
        ("new", "new"),
        ("later", "waiting"),
        ("failed", "given up"),
    ]


def test_the_summary():
    error = "451 4.7.1 try later"
    entries = [(f"/spool/m{number}", envelope_to(addressee(attempts=1, error=error))) for number in range(3)]
    entries += [("/spool/f", envelope_to(in_state("given up"))), ("/spool/u", envelope_to(Error="has no recipients"))]
    files = {path: NOW - 7200 if path == "/spool/m1" else NOW for path, _ in entries}
    lines = spoolgore.lines_of(entries, {**files, "/spool/new": NOW}, NOW)
    text = list(spoolgore.summary(lines, (4711, NOW - 86400 * 3), NOW))
    assert text[:4] == [
        "daemon: running, pid 4711, since 3d",
        "mails: 1 new, 0 waiting, 0 in flight, 3 deferred, 1 given up, 1 unusable",
        "oldest: 2h, /spool/m1",
        f"error: 3 x {error}",
    ]
    assert sorted(text[4:]) == ["error: 1 x 550 before", "error: 1 x has no recipients"]
    nothing = "mails: 0 new, 0 waiting, 0 in flight, 0 deferred, 0 given up, 0 unusable"
    assert list(spoolgore.summary([], None, NOW)) == ["daemon: not running", nothing]


def test_the_table_and_its_columns():
    entries = [
        ("/spool/m1", envelope_to(addressee(attempts=2, error="451 a\r\n\x1b[31mred", moment="2026-11-24T06:52:00Z"))),
        ("/spool/.failed/m2", {**envelope_to(in_state("given up")), "From": "Foo <foo@x.org>"}),
        ("/spool/m3", {**envelope_to(addressee()), "From": ""}),
    ]
    lines = [line for _, line in sorted(lines_by_path(entries).items(), key=lambda item: item[1].due)]
    assert spoolgore.aligned(spoolgore.table(lines, NOW), 0) == [
        "FILE  STATE     AGE  SENDER     RECIPIENT  ATTEMPTS  NEXT IN  ERROR",
        "m3    waiting   1m   <>         a@x.org    0         now",
        r"m1    deferred  1m   app@x.org  a@x.org    2         12m      451 a\r \x1b[31mred",
        "m2    given up  1m   foo@x.org  a@x.org    0         -        550 before",
    ]
    narrow = spoolgore.aligned(spoolgore.table(lines, NOW), 23)
    assert narrow == [
        "FILE  STATE     AGE  SE",
        "m3    waiting   1m   <>",
        "m1    deferred  1m   ap",
        "m2    given up  1m   fo",
    ]


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0s"), (-5, "0s"), (45, "45s"), (59, "59s"), (60, "1m"), (3599, "59m"), (3600, "1h"), (86399, "23h")]
    + [(86400, "1d"), (200 * 86400, "200d")],
)
def test_durations(seconds, text):
    assert spoolgore.ago(seconds) == text


# ---------------------------------------------------------------- progress


@pytest.mark.parametrize(
    "history",  # (when, waiting, in flight, sent, what is said) in turn
    [
        [(0, 0, 0, 0, ""), (10, 0, 0, 0, ""), (100, 0, 0, 50, "")],
        [(0, 500, 100, 0, ""), (9.9, 400, 100, 100, ""), (10, 400, 100, 100, "400 waiting, 100 in flight, 100 sent, 10 mails/s, 50s left")],
        [(0, 9, 1, 0, ""), (10, 9, 1, 0, "9 waiting, 1 in flight, 0 sent, 0.0 mails/s")],
        [(0, 90, 10, 7, ""), (10, 70, 10, 27, "70 waiting, 10 in flight, 27 sent, 2.0 mails/s, 40s left"), (15, 9, 1, 28, ""),
         (20, 60, 10, 37, "60 waiting, 10 in flight, 37 sent, 1.0 mails/s, 1m left")],
        [(0, 100, 0, 0, ""), (10, 2, 0, 98, ""), (20, 0, 0, 100, "")],  # less than three seconds are left
        [(0, 50, 0, 0, ""), (5, 0, 0, 50, ""), (10, 50, 0, 50, ""), (19, 50, 0, 60, ""),
         (20, 40, 0, 60, "40 waiting, 0 in flight, 60 sent, 1.0 mails/s, 40s left")],  # idle in between
    ],
)  # fmt: skip
def test_progress_is_said_while_there_is_much_to_do(history):
    progress = spoolgore.Progress(10)
    for when, waiting, in_flight, sent, text in history:
        assert progress.line(NOW + when, waiting, in_flight, sent) == text


def test_when_progress_has_the_next_word():
    progress = spoolgore.Progress(10)
    assert progress.next_word() == math.inf
    progress.line(NOW, 5, 0, 0)
    assert progress.next_word() == NOW + 10
    progress.line(NOW + 12, 5, 0, 0)
    assert progress.next_word() == NOW + 22
    progress.line(NOW + 13, 0, 0, 5)
    assert progress.next_word() == math.inf


# ----------------------------- spool: what is no mail, and what is not finished

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
AS_OTHERS = "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"
BOUND = ("setpriv", *AS_OTHERS, sys.executable) if ROOT else (sys.executable,)  # permissions bind it, even as root


def wait_for_scans(spool, relay, count=2):
    """Return when a daemon without inotify has listed the spool so often: each of these mails takes a scan."""
    for number in range(count):
        put(spool, f"scan{number}-{time.monotonic_ns()}", mail("scan@example.org"))
        relay.wait_for(len(relay.mails) + 1)


def sent_to(relay):
    """Every address that a mail went to, as often as it did."""
    received = relay.mails if isinstance(relay.mails, list) else relay.mails.items
    return sorted(address for one in received for address in one.recipients)


def said(daemon, text):
    return [line for line in daemon.lines if text in line]


def flush_until(daemon, check):
    """SIGURG, as often as it takes: it does not hasten a mail that is in flight."""

    def flushed():
        flushes = len(said(daemon, "flushed"))
        daemon.send("SIGURG")
        return daemon.wait_for("flushed", flushes + 1) and check()

    wait_until(flushed)


def test_what_is_no_regular_file_is_said_once_and_left_alone(spool, relay, start):
    outside = spool.parent / "outside"
    outside.write_text(mail("outside@example.org"))
    (spool / "link").symlink_to(outside)
    (spool / "dangling").symlink_to(spool / "nowhere")
    os.mkfifo(spool / "fifo")
    os.mknod(spool / "socket", 0o666 | stat.S_IFSOCK)
    if ROOT:
        os.mknod(spool / "device", 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero, which has no end
    strange = names(spool)
    (spool / "directory").mkdir()
    (spool / "directory" / "inner").write_text(mail("inner@example.org"))
    (spool / ".hidden").write_text(mail("hidden@example.org"))
    daemon = start("-smtpaddr", relay.address, "-freq", 0, python=lacking("inotify"))
    wait_for_scans(spool, relay, 3)
    wait_until(lambda: names(spool) == sorted([*strange, "directory"]))
    assert sorted(said(daemon, "ignored")) == [f"{spool}/{name} not a regular file, ignored" for name in strange]
    assert set(sent_to(relay)) == {"scan@example.org"}
    (spool / "link").unlink()
    put(spool, "link", mail("regular@example.org"))  # the name is as good as any other
    relay.wait_for(4)
    assert daemon.stop() == 0
    assert sent_to(relay)[0] == "regular@example.org" and daemon.status() == {}


@pytest.mark.parametrize("thing", [os.mkfifo, lambda path: os.symlink(__file__, path), os.mkdir])
def test_a_name_that_becomes_something_else_just_before_it_is_opened(spool, monkeypatch, thing):
    (spool / "file").write_text(mail())
    regular = os.lstat(spool / "file")
    thing(spool / "m1")
    monkeypatch.setattr(os, "lstat", lambda path: regular)
    with pytest.raises((spoolgore.NotYet, OSError)):
        spoolgore.Spool(str(spool)).claim(str(spool / "m1"), NOW)


def test_what_cannot_be_sent_is_said_once_and_is_sent_when_it_is_mended(spool, relay, start):
    problems = {
        "unreadable": "unable to read mail file, Permission denied",
        "empty": "has no recipients",
        "broken": 'unable to parse mail file, malformed MIME header: missing colon: "no header"',
    }
    put(spool, "unreadable", mail("unreadable@example.org"))
    (spool / "unreadable").chmod(0)
    put(spool, "empty", "")
    put(spool, "broken", "no header\n")
    daemon = start("-smtpaddr", relay.address, "-freq", 0, python=BOUND)
    wait_until(lambda: {name: entry["Error"] for name, entry in daemon.status().items()} == problems)
    (spool / "unreadable").chmod(0o600)
    (spool / "empty").write_text(mail("empty@example.org"))
    put(spool, "broken", mail("broken@example.org"))
    relay.wait_for(3)
    wait_until(lambda: not names(spool))
    assert daemon.stop() == 0 and daemon.status() == {}
    assert sent_to(relay) == ["broken@example.org", "empty@example.org", "unreadable@example.org"]
    assert [len(said(daemon, problem)) for problem in problems.values()] == [1, 1, 1]


@pytest.mark.skipif(not shutil.which("prlimit"), reason="prlimit (util-linux) is not here")
def test_a_mail_that_cannot_be_opened_for_want_of_descriptors_is_not_given_up(spool, scripted, start):
    relay, gate = scripted(), threading.Event()
    relay.replies = {"MAIL": lambda line: gate.wait(PATIENCE) and None}
    for number in range(60):
        put(spool, f"m{number}", mail(f"a{number:02}@example.org"))
    daemon = start("-smtpaddr", relay.address, python=("prlimit", "--nofile=40:40", sys.executable))
    daemon.wait_for("unable to read mail files, Too many open files")
    gate.set()
    relay.wait_for(10)
    flush_until(daemon, lambda: not names(spool))
    assert sent_to(relay) == [f"a{number:02}@example.org" for number in range(60)]
    assert len(said(daemon, "unable to read")) == 1


def test_a_file_of_100_megabytes(spool, scripted, start):
    line = b"." + b"x" * 997 + b"\n"
    count = 100 * 2**20 // len(line)
    put(spool, "m1", mail().encode() + line * count)
    relay, sizes = scripted(), Collector()

    def data():  # not the whole in memory
        size, tail = 0, b"\r\n"
        while tail != b"\r\n.\r\n":
            if not relay_end.unread:
                relay_end.receive()
            size, tail = size + len(relay_end.unread), (tail + bytes(relay_end.unread[-5:]))[-5:]
            relay_end.unread.clear()
        sizes.add(size)
        return b""

    def serve(conversation):
        nonlocal relay_end
        relay_end, conversation.data = conversation, data
        conversation.serve()

    relay_end, relay.serve = None, serve
    daemon = start("-smtpaddr", relay.address)
    wait_until(lambda: not names(spool), "it is sent")
    header = len(mail().replace("\n", "\r\n"))
    assert sizes.items == [header + count * (len(line) + 2) + 3]  # a dot and a CR more for each line, and the last dot
    if Path("/proc/self/status").exists():
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{daemon.process.pid}/status").read_text())
        assert int(peak[1]) < 80_000


ODD_NAMES = [
    b"two words",
    b"new\nline",
    b"-freq",
    b"\xff\xfe",
    "Grüße".encode(),
    b'"\\{}',
    b"\x1b[2J",
    b"%s",
    b"x" * 255,
]


def test_odd_names(spool, relay, start):
    """Deferred, known after a kill, given up, queued again, sent."""
    directory, addresses = os.fsencode(spool), [f"a{number}@example.org" for number in range(len(ODD_NAMES))]
    for name, address in zip(ODD_NAMES, addresses):
        (spool / ".aside").write_text(mail(f"{address}, early@example.org"))
        os.rename(spool / ".aside", os.path.join(directory, name))
        relay.recorder.rcpt_replies[address] = ["451 4.7.1 try later"] * 2
    first = start("-smtpaddr", relay.address, "-attempts", 2)
    first.wait_for("SMTP error", len(ODD_NAMES))
    wait_until(
        lambda: (
            len(first.status()) == len(ODD_NAMES) and all(e["To"][1]["Status"] == 2 for e in first.status().values())
        )
    )
    first.kill()
    daemon = start("-smtpaddr", relay.address, "-attempts", 2)
    daemon.send("SIGURG")
    daemon.wait_for("moved to", len(ODD_NAMES))
    assert sorted(os.listdir(directory + b"/.failed")) == sorted(ODD_NAMES) and names(spool) == []
    assert len(spoolgore_run("-status", spool).stdout.splitlines()) == 6 + len(ODD_NAMES)
    for name in ODD_NAMES:
        os.rename(os.path.join(directory, b".failed", name), os.path.join(directory, name))
    wait_until(lambda: not names(spool))
    assert sent_to(relay) == addresses + ["early@example.org"] * len(ODD_NAMES)
    assert all(line.isprintable() for line in first.lines + daemon.lines)
    assert daemon.stop() == 0 and daemon.status() == {}


def gated(scripted):
    """A relay that lets no mail begin until its gate is open."""
    relay = scripted()
    relay.gate, relay.begun = threading.Event(), Collector()
    relay.replies = {"MAIL": lambda line: relay.begun.add(line) or (relay.gate.wait(PATIENCE) and None)}
    return relay


def test_a_file_that_vanishes_before_its_turn(spool, scripted, start):
    relay = gated(scripted)
    for name in ("m1", "m2", "m3"):
        put(spool, name, mail(f"{name}@example.org"))
    daemon = start("-smtpaddr", relay.address, "-concurrency", 1)
    relay.begun.wait_for(1)
    (spool / "m2").unlink()
    relay.gate.set()
    wait_until(lambda: not names(spool))
    assert daemon.stop() == 0
    assert sent_to(relay) == ["m1@example.org", "m3@example.org"]
    assert said(daemon, "m2") == [] and daemon.status() == {}


def test_a_file_that_vanishes_or_is_another_mail_when_it_was_sent(spool, scripted, start):
    relay = gated(scripted)
    put(spool, "m1", mail("gone@example.org"))
    put(spool, "m2", mail("old@example.org"))
    daemon = start("-smtpaddr", relay.address, "-freq", 3600)
    relay.begun.wait_for(2)
    (spool / "m1").unlink()
    put(spool, "m2", mail("new@example.org"))
    relay.gate.set()
    relay.wait_for(3)
    wait_until(lambda: not names(spool))
    assert daemon.stop() == 0
    assert sent_to(relay) == ["gone@example.org", "new@example.org", "old@example.org"]
    assert said(daemon, "unable") == [] and daemon.status() == {}


def test_two_names_of_one_file_are_one_mail(spool, scripted, start):
    relay = gated(scripted)
    put(spool, "m1", mail("a@example.org"))
    os.link(spool / "m1", spool / "m2")
    put(spool, "m3", mail("b@example.org"))
    daemon = start("-smtpaddr", relay.address)
    relay.begun.wait_for(2)
    os.link(spool / "m3", spool / "m4")
    relay.gate.set()
    wait_until(lambda: not names(spool))
    put(spool, "m5", mail("c@example.org"))
    relay.wait_for(3)
    assert daemon.stop() == 0
    assert sent_to(relay) == ["a@example.org", "b@example.org", "c@example.org"]


def test_two_names_of_a_file_that_is_given_up(spool, relay, start):
    relay.recorder.rcpt_replies["a@example.org"] = "550 5.1.1 no such user"
    put(spool, "m1", mail("a@example.org"))
    os.link(spool / "m1", spool / "m2")
    daemon = start("-smtpaddr", relay.address, "-attempts", 1)
    wait_until(lambda: not names(spool))
    assert len(os.listdir(spool / ".failed")) == 1
    assert daemon.stop() == 0
    assert list(daemon.status()) == os.listdir(spool / ".failed")


def test_a_name_that_is_another_files_by_now_does_not_stand_for_the_old_one(spool, relay, start):
    relay.recorder.rcpt_replies["a@example.org"] = ["451 4.7.1 try later"]
    put(spool, "m1", mail("a@example.org"))
    os.link(spool / "m1", spool / "m2")
    os.link(spool / "m1", spool / "m3")
    daemon = start("-smtpaddr", relay.address, "-freq", 0)
    first = daemon.wait_for("SMTP error")[0][20:].split()[0]
    put(spool, os.path.basename(first), "broken\n")
    relay.wait_for(1)  # by one of its other names, long before the first one's time has come
    wait_until(lambda: names(spool) == [os.path.basename(first)])


def test_ten_thousand_files_at_once(tmp_path, start):
    """While the daemon runs, so that inotify's queue may run over; each goes once."""
    addresses = [f"a{number:05}@example.org" for number in range(10_000)]
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else tmp_path
    with tempfile.TemporaryDirectory(dir=memory) as spool, open(tmp_path / "printed", "wb") as printed:
        daemon = start("-smtpaddr", "-", directory=spool, stdout=printed)
        before = open_files(daemon)
        for address in addresses:
            put(spool, address, mail(address))
        wait_until(lambda: not names(spool))
        assert open_files(daemon) <= before + 1  # a thread's
        assert daemon.stop() == 0 and daemon.status() == {}
    assert sorted(re.findall(r"^RCPT TO:<(.*)>$", (tmp_path / "printed").read_text(), re.MULTILINE)) == addresses


def open_files(daemon):
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_the_spool_is_removed_and_made_again(spool, relay, start):
    relay.recorder.rcpt_replies["late@example.org"] = "451 4.7.1 try later"
    put(spool, "m1", mail("late@example.org"))
    daemon = start("-smtpaddr", relay.address, "-freq", 0)
    wait_until(lambda: daemon.recipients("m1").get("late@example.org", {}).get("Attempts") == 1)
    before = open_files(daemon)
    for number in range(2):
        wait_until(lambda: shutil.rmtree(spool, ignore_errors=True) or not spool.exists())  # it may write meanwhile
        daemon.wait_for("unable to access spool directory", number + 1)
        spool.mkdir()
        put(spool, "m2", mail("a@example.org"))
        relay.wait_for(number + 1)
        daemon.wait_for("accessible again", number + 1)
    assert said(daemon, "m1")[2:] == []  # it went with the directory
    second = spoolgore_run(spool)
    assert second.returncode == 1 and f"pid {daemon.process.pid}" in second.stderr
    assert open_files(daemon) <= before + 2  # connections to the relay
    wait_until(lambda: not names(spool) and not daemon.status())
    assert daemon.stop() == 0
    assert len(said(daemon, "unable to access")) == 2


# missing on the system, and whether the daemon is killed and started again meanwhile
HALF_WRITTEN = [
    ((), False),
    ((), True),
    (("leases",), False),
    (("leases",), True),
    (("inotify",), False),
    (("leases", "inotify"), True),
]


def test_a_file_that_is_written_slowly_in_place_is_sent_once_and_whole(tmp_path, relay, start):
    """Three seconds, before seven daemons at once."""

    def begin(number):
        missing = HALF_WRITTEN[number][0]
        return start(
            "-smtpaddr", relay.address, "-freq", 0, directory=spools[number], python=lacking(*missing), wait=False
        )

    spools = [tmp_path / f"spool{number}" for number in range(len(HALF_WRITTEN))]
    for spool in spools:
        spool.mkdir()
    daemons = [begin(number) for number in range(len(spools))]
    for daemon in daemons:
        daemon.wait_for("--- starting")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(spool / "m1", "w", buffering=1)) for spool in spools]
        for number, file in enumerate(files):
            file.write(mail(f"a{number}@example.org"))
        for step in range(30):
            for file in files:
                file.write(f"line {step}\n")
            for number in [number for number, (_, again) in enumerate(HALF_WRITTEN) if again and step == 10]:
                daemons[number].kill()
                daemons[number] = begin(number)
            time.sleep(0.1)
        assert relay.mails == []
    relay.wait_for(len(spools))
    wait_until(lambda: not any(map(names, spools)))
    assert sent_to(relay) == [f"a{number}@example.org" for number in range(len(spools))]
    assert all(received.content.count(b"line ") == 30 for received in relay.mails)


@pytest.mark.parametrize(
    ("whole", "mtime", "is_written"),
    [
        (None, NOW - 0.5, True),
        (None, NOW - 1.5, False),
        (None, NOW + 3600, False),  # another machine's clock, or a copy that keeps the time
        (True, NOW, False),
        (False, NOW - 50, True),
        (False, NOW - 70, False),
    ],
)
def test_when_a_file_without_lease_is_taken(spool, monkeypatch, whole, mtime, is_written):
    monkeypatch.setattr(spoolgore, "lease_refused", lambda handle: None)
    put(spool, "m1", mail())
    os.utime(spool / "m1", (mtime, mtime))
    with pytest.raises(spoolgore.NotYet) if is_written else contextlib.nullcontext():
        spoolgore.Spool(str(spool)).claim(str(spool / "m1"), NOW, whole).file.close()


def link(spool, name, text):
    """Spool a mail as some applications do: write it elsewhere, link it into the spool, unlink it there."""
    aside = spool.parent / name
    aside.write_text(text)
    os.utime(aside, (1, 1))  # without leases it has to rest for a second
    os.link(aside, spool / name)
    aside.unlink()


def write_in_place(spool, name, text):
    (spool / name).write_text(text)


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is for Linux")
@pytest.mark.parametrize("missing", [(), ("leases",)], ids=["all", "no leases"])
def test_new_mail_is_picked_up_long_before_the_next_scan(spool, relay, start, missing):
    daemon = start("-smtpaddr", relay.address, "-freq", 3600, python=lacking(*missing))
    link(spool, "m0", mail())
    relay.wait_for(1)  # the first scan is over
    for number, write in enumerate([put, link, write_in_place] * 4, 1):
        write(spool, f"m{number}", mail())
        relay.wait_for(number + 1)
    wait_until(lambda: not names(spool))
    assert daemon.stop() == 0
    assert len(relay.mails) == 13


def test_without_inotify_new_mail_is_found_by_scanning(spool, relay, start):
    daemon = start("-smtpaddr", relay.address, "-freq", 0, python=lacking("inotify"))
    wait_for_scans(spool, relay, 2)
    assert daemon.stop() == 0
    assert said(daemon, "no inotify") == [
        "no inotify ('NoneType' object is not callable): new mails are seen every 0 s"
    ]


# ---------------------------------------------------- delivery, retry, given up


# ----------------------------------------- signals, -once, the printer, the log


# ---------------------------------------------------------- faults of the relay


# -------------------------------------- connections, PIPELINING, CHUNKING, SIZE


# --------------------------------------------------------------- TLS and logins


# -------------------------------------------------------- several relays, rates


# ---------------------------------------------------------- crashes, full disks


class Mayhem(ScriptedRelay):
    """A relay that defers some recipients, and remembers in which run of the daemon it took each: runs, by address.

    reached is set when it has gone so many more steps.
    """

    def __init__(self, chance, addresses):
        self.lock = threading.Lock()
        self.deferrals = {address: chance.choice((0, 0, 0, 1, 2)) for address in addresses}
        self.runs = {address: [] for address in addresses}
        self.run, self.steps, self.reached = 0, 0, threading.Event()
        self.replies = {"RCPT": self.rcpt}
        super().__init__(serve=self.serve_steps)

    def wait_for_steps(self, steps):
        self.steps, self.reached = steps, threading.Event()
        self.reached.wait(5)  # there may be less to do

    def serve_steps(self, conversation):
        run = self.run

        def take(content):
            with self.lock:
                for address in conversation.recipients:
                    self.runs[address].append(run)
            conversation.send(b"250 2.0.0 taken\r\n")

        conversation.take = take
        conversation.greet()
        while conversation.command():
            self.steps -= 1
            if self.steps <= 0:
                self.reached.set()
            time.sleep(random.random() / 500)  # so that mails are under way at the same time

    def rcpt(self, line):
        address = path_of(line)
        with self.lock:
            if self.deferrals[address]:
                self.deferrals[address] -= 1
                return b"451 4.7.1 try later\r\n"
        return None


def under_way(daemon):
    """The recipients whose transaction had begun when the daemon died and is not on the disk: pairs of mail and address."""
    flying, done = set(), set()
    for line in daemon.lines:
        if match := re.fullmatch(r"\S*/(\w+) sending mail to (\S+) attempt: \d+", line):
            flying.add(match.groups())
        elif match := re.fullmatch(r"\S*/(\w+) SMTP error, mail to (\S+) 451 .*", line):
            flying.discard(match.groups())
        elif match := re.fullmatch(r"\S*/(\w+) successfully sent to (\S+)", line):
            done.add(match.groups())
    left, status = set(names(daemon.spool)), daemon.status()  # raises if the file does not parse
    written = {(name, r["Address"]) for name, e in status.items() for r in spoolgore.recipients(e) if r["Status"] == 2}
    recorded = {(name, address) for name, address in done if name not in left or (name, address) in written}
    return flying - recorded


def test_nothing_is_lost_when_the_daemon_is_killed_again_and_again(spool, start):
    """500 mails, 50 kills. A recipient gets a mail twice only if its transaction was under way at a kill."""
    kills, concurrency, seed = 50, 4, int(os.environ.get("SEED") or random.randrange(2**32))
    print(f"seed {seed}")
    chance = random.Random(seed)
    mails = {f"m{n}": [f"r{k}.m{n}@x.org" for k in range(chance.randint(1, 5))] for n in range(500)}
    for name, addresses in mails.items():
        put(spool, name, mail(", ".join(addresses)))
    relay, in_flight = Mayhem(chance, sum(mails.values(), [])), []
    for _ in range(kills):
        daemon = start("-smtpaddr", relay.address, "-concurrency", concurrency, wait=False)
        if chance.random() < 0.1:
            time.sleep(chance.random() / 2)  # perhaps before it has begun
        else:
            daemon.wait_for("--- starting")
            daemon.send("SIGURG")  # what was deferred is due now
            relay.wait_for_steps(chance.randint(1, 120))
        daemon.kill()
        in_flight.append(under_way(daemon))
        assert len({name for name, _ in in_flight[-1]}) <= concurrency
        relay.run += 1
    assert names(spool), "the kills came too late"
    relay.deferrals = dict.fromkeys(relay.deferrals, 0)
    daemon = start("-smtpaddr", relay.address)
    daemon.send("SIGURG")
    wait_until(lambda: not names(spool), "all mails are settled")
    assert daemon.stop() == 0
    relay.stop()
    assert daemon.status() == {} and not (spool / ".failed").exists()
    assert [address for address, runs in relay.runs.items() if not runs] == []
    twice = [{a for a, runs in relay.runs.items() if run in runs[:-1]} for run in range(kills)]
    print(f"{sum(map(len, twice))} duplicates, {sum(map(len, in_flight))} recipients in flight at {kills} kills")
    for again, flying in zip(twice, in_flight):
        assert again <= {address for _, address in flying}
    assert all(len(set(runs)) == len(runs) for runs in relay.runs.values())


def needed(present, what):
    """Skip a test for want of something; where everything should be there, in continuous integration, it fails."""
    if not present:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"needs {what}")


def has_only_log_lines(daemon):
    """No traceback: every line has its time."""
    return all(re.match(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d \S", line) for line in daemon.log.items)


@contextlib.contextmanager
def full_file_system(spool):
    """Gives the interpreter for a daemon whose spool is full, and a function that makes room."""
    needed(ROOT, "root, to mount a small file system")
    with contextlib.suppress(OSError), open(spool / ".ballast", "wb", buffering=0) as ballast:
        while ballast.write(b"x" * 4096):
            pass
    yield (sys.executable,), lambda daemon: (spool / ".ballast").unlink()


@contextlib.contextmanager
def limited_files(spool):
    """The same by a limit on the size of its files; there is room for its pid."""
    resource = pytest.importorskip("resource")
    needed(shutil.which("prlimit"), "prlimit (util-linux)")
    no_limit = resource.RLIM_INFINITY, resource.RLIM_INFINITY
    yield (
        ("prlimit", "--fsize=50:unlimited", sys.executable),
        lambda daemon: resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, no_limit),
    )


@pytest.fixture
def small_spool(spool):
    """The spool on a small file system, if that can be had."""
    if ROOT:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", spool], check=True)
    yield spool
    if ROOT:
        subprocess.run(["umount", "-l", spool], check=True)


@pytest.mark.parametrize("full_disk", [full_file_system, limited_files])
def test_a_full_disk_is_said_once_stops_nobody_and_nothing_is_forgotten(small_spool, relay, start, full_disk):
    relay.recorder.rcpt_replies["late@example.org"] = "451 4.7.1 try later"
    addresses = [f"a{number}@example.org" for number in range(10, 60)]  # so that the status is larger than a mail
    put(small_spool, "m1", mail(", ".join([*addresses, "late@example.org"])))
    put(small_spool, "m2", mail("b@example.org"))
    with full_disk(small_spool) as (python, make_room):
        daemon = start("-smtpaddr", relay.address, python=python)
        wait_until(lambda: names(small_spool) == ["m1"])
        daemon.wait_for("unable to write status file, .*(File too large|No space left on device)")
        flush_until(daemon, lambda: len(said(daemon, "SMTP error")) >= 4)  # each tries to write
        assert daemon.status() == {}
        make_room(daemon)
        daemon.wait_for_recipient("m1", addresses[0], Status=2)
        errors = len(said(daemon, "SMTP error"))
        daemon.wait_for_recipient("m1", "late@example.org", Status=0, Attempts=errors)
    daemon.kill()
    assert len(said(daemon, "unable to")) == 1 and has_only_log_lines(daemon)
    relay.recorder.rcpt_replies.clear()
    start("-smtpaddr", relay.address).send("SIGURG")
    wait_until(lambda: not names(small_spool))
    assert sent_to(relay) == [*addresses, "b@example.org", "late@example.org"]


def test_a_read_only_directory_is_said_once_stops_nobody_and_nothing_is_forgotten(spool, scripted, start):
    relay, ready = gated(scripted), threading.Event()
    relay.replies["RCPT"] = lambda line: None if ready.is_set() or b"late@" not in line else b"451 4.7.1 later\r\n"
    put(spool, "m1", mail("a@example.org"))
    put(spool, "m2", mail("b@example.org, late@example.org"))
    daemon = start("-smtpaddr", relay.address, python=BOUND)
    relay.begun.wait_for(2)
    spool.chmod(0o500)
    relay.gate.set()
    daemon.wait_for("unable to remove mails that are settled, Permission denied")
    daemon.wait_for("unable to write status file, Permission denied")
    flush_until(daemon, lambda: len(said(daemon, "SMTP error")) >= 4)
    spool.chmod(0o700)
    daemon.wait_for_recipient("m2", "b@example.org", Status=2)
    ready.set()
    flush_until(daemon, lambda: not names(spool))  # without it: in a minute
    assert daemon.stop() == 0 and daemon.status() == {}
    assert sent_to(relay) == ["a@example.org", "b@example.org", "late@example.org"]
    assert len(said(daemon, "unable to")) == 2 and has_only_log_lines(daemon)


WHAT_A_CRASH_LEFT = {  # entries of the status file, the mail's place, to whom it is sent then, the entries that are left
    "before the file of a delivered mail was removed": ({"m1": [(2, "")]}, "m1", [], {}),
    "before a mail that is given up was moved": ({"m1": [(2, "550 no"), (2, "")]}, "m1", [], {".failed/m1": [(2, "550 no"), (2, "")]}),
    "before its move was written": ({"m1": [(2, "550 no"), (2, "")]}, ".failed/m1", [], {".failed/m1": [(2, "550 no"), (2, "")]}),
    "before it was written that it is back": ({".failed/m1": [(2, "550 no"), (2, "")]}, "m1", ["r0@x.org"], {}),
    "in mid-transaction": ({"m1": [(2, ""), (1, ""), (0, "")]}, "m1", ["r1@x.org", "r2@x.org"], {}),
    "before the removal of a mail was written": ({"m1": [(1, "")], "gone": [(1, "")]}, "m1", ["r0@x.org"], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", WHAT_A_CRASH_LEFT)
def test_the_start_after_a_crash(spool, relay, run, case):
    before, place, sent, after = WHAT_A_CRASH_LEFT[case]
    (spool / ".failed").mkdir()
    addresses = [f"r{number}@x.org" for number in range(len(before.get("m1") or before[".failed/m1"]))]
    put_status(
        spool,
        {
            name: entry(*(recipient(a, s, 1, e, -1) for a, (s, e) in zip(addresses, states)))
            for name, states in before.items()
        },
    )
    for name in before:
        (spool / name).unlink()
    (spool / place).write_text(mail(", ".join(addresses)))
    assert run("-once", "-smtpaddr", relay.address).status_code == 0
    assert sent_to(relay) == sent and names(spool) == []
    text = json.loads((spool / ".spoolgore.js").read_text())
    left = {os.path.relpath(path, spool): [(r["Status"], r["Error"]) for r in e["To"]] for path, e in text.items()}
    assert left == after and os.listdir(spool / ".failed") == [os.path.basename(name) for name in after]


def test_one_spool_one_daemon(spool, relay, start, run):
    (spool / ".spoolgore.lock").write_text("1\n")  # a pid that lives has nothing to say
    first = start("-smtpaddr", relay.address)
    for flags in (["-once"], ["-json", spool / "other.js"]):
        second = run("-smtpaddr", relay.address, *flags)
        assert second.status_code == 1
        assert second.lines == [f"spool directory {spool} is in use by pid {first.process.pid}"]
    first.kill()
    third = start("-smtpaddr", relay.address)
    assert (spool / ".spoolgore.lock").read_text() == f"{third.process.pid}\n"
    put(spool, "m1", mail())
    relay.wait_for(1)


# -------------------------------------------------------------------- secrets

PASSWORD = "Geheim+"
LOGINS = [  # flags, environment
    (["-smtpuser", "me", "-smtppassword", PASSWORD], {}),
    (["-smtpuser", "me"], {"SPOOLGORE_SMTPPASSWORD": PASSWORD}),
    (["-smtpuser", "me", "-smtpauth", "login", "-smtppasswordcommand", f"echo {PASSWORD}"], {}),
    (["-smtpuser", "me", "-smtpauth", "xoauth2", "-smtppasswordcommand", f"echo {PASSWORD}"], {}),
    (["-smtpmd5user", "me"], {"SPOOLGORE_SMTPMD5PASSWORD": PASSWORD}),
    (["-smtpuser", "me", "-smtppassword", "\udcff" + PASSWORD], {}),
]


def refuse_and_repeat(conversation):
    """Refuses every login, and says what it heard."""

    def on_AUTH(line):
        prompts = {b"LOGIN": [b"VXNlcm5hbWU6", b"UGFzc3dvcmQ6"], b"CRAM-MD5": [b"PDFAeD4="]}
        for prompt in prompts.get(line.split()[1], ()):
            conversation.send(b"334 %s\r\n" % prompt)
            line = conversation.line()
        conversation.send(b"535 5.7.8 refused: %s\r\n" % line)

    conversation.on_AUTH = on_AUTH
    conversation.serve()


@pytest.mark.parametrize(("flags", "environ"), LOGINS)
def test_secrets_are_nowhere(spool, scripted, start, flags, environ):
    relay = scripted(["AUTH PLAIN LOGIN CRAM-MD5 XOAUTH2"], serve=refuse_and_repeat)
    put(spool, "m1", mail())
    daemon = start("-smtpaddr", relay.address, *flags, env=environ)
    daemon.wait_for("relay unavailable, .*535 5.7.8 refused")
    assert daemon.stop() == 0
    assert "535 5.7.8 refused" in daemon.recipients("m1")["alice@example.org"]["Error"]
    files = [path.read_text() for path in spool.iterdir()]
    written = "\n".join([*daemon.lines, *files])
    words = [word[: len(word) // 4 * 4] for word in re.findall(r"[A-Za-z0-9+/]{8,}", written)]
    assert PASSWORD not in written and not any(PASSWORD.encode() in base64.b64decode(word) for word in words)
    assert has_only_log_lines(daemon)


def test_what_the_daemon_makes_is_for_its_owner_only(spool, relay, start):
    relay.recorder.rcpt_replies["a@example.org"] = "550 5.1.1 no such user"
    put(spool, "m1", mail("a@example.org"))
    open_to_all = ("sh", "-c", 'umask 0; exec "$@"', "sh", sys.executable)
    daemon = start("-smtpaddr", relay.address, "-attempts", 1, "-rate", "100/s", python=open_to_all)
    daemon.wait_for("moved to")
    assert daemon.stop() == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in spool.iterdir()}
    assert modes == {".spoolgore.js": 0o600, ".spoolgore.lock": 0o600, ".spoolgore.rate": 0o600, ".failed": 0o700}


# ------------------------------------------------------- for the people who run it

README = SCRIPT.with_name("README.md")


def put_status(spool, entries):
    """A status file, and an empty file for each of its entries."""
    for name in entries:
        path = spool / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    text = json.dumps({str(spool / name): entry for name, entry in entries.items()})
    (spool / ".spoolgore.js").write_text(text)


def entry(*recipients, **more):
    known = {"From": "Shop <shop@example.org>", "To": list(recipients), "Cc": [], "Bcc": [], "Attempts": 0}
    return {**known, "Enqueued": "2026-11-24T06:37:24Z", **more}


def recipient(address="a@x.org", status=0, attempts=0, error="", after=3600):
    moment = spoolgore.format_time(time.time() + after)
    return {"Address": address, "Status": status, "Attempts": attempts, "NextAttempt": moment, "Error": error}


def test_status_of_every_kind_of_mail(spool):
    put_status(
        spool,
        {
            "deferred": entry(recipient(attempts=3, error="451 later"), recipient("b@x.org", 0)),
            "waiting": entry(recipient(after=-1)),
            "flying": entry(recipient(status=1)),
            "partly": entry(recipient(status=2), recipient("c@x.org", 0, 1, "451 later", after=90)),
            "unusable": entry(Error="has no recipients"),
            ".failed/gone": entry(recipient("d@x.org", 2, 100, "550 no such user")),
        },
    )
    put(spool, "new", mail())
    done = spoolgore_run("-status", spool)
    assert done.stderr == ""
    assert done.returncode == 1
    text, table = done.stdout.split("\n\n")
    assert "daemon: not running" in text
    assert "1 new, 1 waiting, 1 in flight, 2 deferred, 1 given up, 1 unusable" in text
    assert "error: 2 x 451 later" in text
    rows = {line.split()[0]: re.split(r"  +", line) for line in table.splitlines()[1:]}
    assert rows["deferred"][3:] == ["shop@example.org", "a@x.org +1", "3", "59m", "451 later"]
    assert rows["partly"][4:] == ["c@x.org", "1", "1m", "451 later"]
    assert rows["gone"][1] == "given up" and rows["gone"][-1] == "550 no such user"
    assert [name for name in rows if name in ("waiting", "partly", "deferred")] == ["waiting", "partly", "deferred"]


def test_status_knows_the_daemon_and_disturbs_nobody(spool, start, scripted):
    daemon = start("-smtpaddr", scripted().address)
    done = spoolgore_run("-status", spool)
    assert f"daemon: running, pid {daemon.process.pid}, since" in done.stdout
    assert done.returncode == 0
    assert daemon.stop() == 0
    before = {path: path.stat().st_mtime_ns for path in spool.iterdir()}
    assert spoolgore_run("-status", spool).returncode == 1
    assert before == {path: path.stat().st_mtime_ns for path in spool.iterdir()}


def test_status_with_a_status_file_elsewhere(spool, tmp_path):
    put_status(spool, {"m1": entry(recipient(error="somewhere else"))})
    (spool / ".spoolgore.js").rename(tmp_path / "status.json")
    assert "somewhere else" in spoolgore_run("-status", "-json", tmp_path / "status.json", spool).stdout


@pytest.mark.parametrize(
    ("prepare", "complaint"),
    [
        (lambda spool: spool.rmdir(), "No such file or directory"),
        (lambda spool: (spool / ".spoolgore.js").write_text("{"), "Expecting property name"),
    ],
)
def test_status_that_cannot_be_had(spool, prepare, complaint):
    prepare(spool)
    done = spoolgore_run("-status", spool)
    assert done.returncode == 1
    assert complaint in done.stderr and len(done.stderr.splitlines()) == 1


def test_status_shows_no_control_characters(spool):
    put_status(spool, {"m\x1b[2J\nx": entry(recipient(error="451 \x07bell"))})
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", spoolgore_run("-status", spool).stdout)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_status_is_cut_to_the_terminal(spool):
    put_status(spool, {"m1": entry(recipient(error="x" * 300))})
    master, slave = os.openpty()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "-status", str(spool)], stdout=slave, env={**os.environ, "COLUMNS": "60"}
    )
    os.close(slave)
    lines = os.read(master, 65536).decode().splitlines()
    os.close(master)
    assert done.returncode == 1
    assert max(map(len, lines)) == 60


def test_progress_is_logged(spool, start, scripted):
    """Two mails that take longer than the interval, which is shortened for the test."""
    relay = scripted()
    gate = threading.Event()
    relay.replies = {"MAIL": lambda line: gate.wait(PATIENCE) and None}
    for number in range(3):
        put(spool, f"m{number}", mail())
    hasty = "import re, sys; text = open(sys.argv[1]).read().replace('Progress(10)', 'Progress(0.2)'); del sys.argv[0]"
    python = (sys.executable, "-c", f"{hasty}; __file__ = sys.argv[0]; exec(compile(text, sys.argv[0], 'exec'))")
    daemon = start("-smtpaddr", relay.address, "-concurrency", 1, python=python)
    line = daemon.wait_for("waiting, ")[0]
    assert line[20:] == "2 waiting, 1 in flight, 0 sent, 0.0 mails/s"
    gate.set()
    relay.wait_for(3)
    assert daemon.stop() == 0


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_progress_on_a_terminal_is_one_line(spool, scripted):
    relay = scripted()
    gate = threading.Event()
    relay.replies = {"MAIL": lambda line: gate.wait(PATIENCE) and None}
    put(spool, "m1", mail())
    master, slave = os.openpty()
    command = [sys.executable, str(SCRIPT), "-once", "-smtpaddr", relay.address, str(spool)]
    process = subprocess.Popen(command, stderr=slave)
    os.close(slave)
    text = b""
    while b"1 in flight" not in text:
        text += os.read(master, 65536)
    gate.set()
    with contextlib.suppress(OSError):  # how a terminal ends
        while more := os.read(master, 65536):
            text += more
    os.close(master)
    assert process.wait(PATIENCE) == 0
    assert b"\r\x1b[K0 waiting, 1 in flight, 0 sent, 0.0 mails/s" in text
    assert text.endswith(b"\r\x1b[K")


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """A service manager's datagram socket, and what NOTIFY_SOCKET is for it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@spoolgore-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0") if name[0] == "@" else name)
        sock.settimeout(PATIENCE)
        yield sock, name


@pytest.mark.skipif(sys.platform != "linux", reason="systemd is for Linux")
def test_the_service_manager_is_told(spool, start, scripted, manager):
    sock, name = manager
    daemon = start("-smtpaddr", scripted().address, env={"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "100000"})
    said = []
    while len(said) < 5:
        said.append(sock.recv(4096).decode())
    assert said[0] == "READY=1\nSTATUS=0 waiting, 0 in flight, 0 deferred" or said[1].startswith("READY=1\nSTATUS=0")
    assert said.count("WATCHDOG=1") == 4
    daemon.send("SIGTSTP")
    daemon.wait_for("suspended")
    while (text := sock.recv(4096)) == b"WATCHDOG=1":
        pass
    assert text == b"STATUS=suspended"
    assert sock.recv(4096) == b"WATCHDOG=1"  # a suspended daemon lives
    assert daemon.stop() == 0
    while (text := sock.recv(4096)) == b"WATCHDOG=1":
        pass
    assert text == b"STOPPING=1\nSTATUS=stopping"


def test_the_watchdog_of_another_process_is_not_ours():
    environ = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1000000"}
    assert spoolgore.ServiceManager(environ).interval == 0.5
    assert spoolgore.ServiceManager({**environ, "WATCHDOG_PID": str(os.getpid())}).interval == 0.5
    assert spoolgore.ServiceManager({**environ, "WATCHDOG_PID": "1"}).interval == 0
    assert spoolgore.ServiceManager({}).interval == 0


def test_a_system_that_lacks_nearly_everything(spool, start, relay):
    """As on Windows: no fcntl (lock, leases), inotify, resource, nor the original's signals."""
    put(spool, "m1", mail())
    daemon = start("-smtpaddr", relay.address, "-freq", 1, python=lacking("inotify", "fcntl", "signals", "posix"))
    relay.wait_for(1)
    put(spool, "m2", mail())
    relay.wait_for(2)
    assert len([line for line in daemon.lines if "no inotify" in line]) == 1
    wait_until(lambda: not names(spool))
    assert daemon.stop() == 0


# ---------------------------------------------------------------- the README


def test_readme_and_usage_have_the_same_flags_and_defaults():
    table = re.findall(r"^\| `-(\w+)((?: [A-Z]+)?)` \| (?:`(.*?)`)? *\|", README.read_text(), re.MULTILINE)
    usage = re.findall(r"^  -(\w+)((?: [A-Z]+)?)((?:.*\n(?!  -|\n))*.*)", spoolgore.__doc__, re.MULTILINE)
    defaults = {name: re.search(r"\[default: (.*?)\]", text) for name, _, text in usage}
    told = {(name, value, default) for name, value, default in table}
    known = {(name, value, defaults[name][1] if defaults[name] else "") for name, value, _ in usage}
    assert told == {flag for flag in known if flag[0] not in ("h", "version")}
    assert len(told) > 15


def test_readme_unit_starts_the_daemon_with_flags_that_exist():
    unit = re.search(r"<!-- unit -->\n```ini\n(.*?)```", README.read_text(), re.DOTALL)[1]
    words = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1].replace("'cat %d/password'", "command").split()
    options = spoolgore.parse_options(words[2:])
    assert options.smtppasswordcommand == "command" and options.directory == "/var/spool/%i"


def readme_block(language, start):
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)
    return next(block for block in blocks if block.startswith(start))


def test_readme_shell_recipe(spool, relay, run):
    subprocess.run(["sh", "-c", readme_block("sh", "mail=$(mktemp")], cwd=spool.parent, check=True)
    assert run("-once", "-smtpaddr", relay.address).status_code == 0
    assert relay.mails[0].recipients == ["you@example.org"]
    assert relay.mails[0].content.endswith(b"Subject: Backup done\r\n\r\nAll fine.\r\n")


def test_readme_python_recipe(spool, relay, run):
    from email.message import EmailMessage

    recipe = {}
    exec(readme_block("python", "import os, tempfile"), recipe)
    message = EmailMessage()
    message["From"], message["To"] = "app@example.org", "you@example.org"
    message.set_content("Grüße.\n")
    recipe["spool"](message, str(spool))
    assert run("-once", "-smtpaddr", relay.address).status_code == 0
    assert "Grüße.\r\n".encode() in relay.mails[0].content


@pytest.mark.skipif(not shutil.which("php"), reason="needs PHP")
def test_readme_php_recipe(spool, relay, run):
    program = f"<?php {readme_block('php', 'function spool_mail')}"
    subprocess.run(["php"], input=program.encode(), cwd=spool.parent, check=True)
    assert run("-once", "-smtpaddr", relay.address).status_code == 0
    assert relay.mails[0].content.endswith(b"\r\n\r\nThank you.\r\n")


def test_readme_django_recipe(spool, relay, run, tmp_path):
    pytest.importorskip("django", reason="needs Django")
    (tmp_path / "spool_backend.py").write_text(readme_block("python", "import os\nimport tempfile"))
    (tmp_path / "site.py").write_text(
        "from django.conf import settings\n"
        f"settings.configure(EMAIL_BACKEND='spool_backend.SpoolBackend', EMAIL_SPOOL={str(spool)!r})\n"
        "from django.core.mail import EmailMessage\n"
        "EmailMessage('s', 'b', 'shop@example.org', ['a@example.org'], bcc=['hidden@example.org']).send()\n"
    )
    subprocess.run([sys.executable, str(tmp_path / "site.py")], cwd=tmp_path, check=True)
    assert run("-once", "-smtpaddr", relay.address).status_code == 0
    assert relay.mails[0].recipients == ["a@example.org", "hidden@example.org"]
    assert b"hidden" not in relay.mails[0].content
