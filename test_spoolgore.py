"""Tests of spoolgore.py.

The pure sections are tested as tables. Everything else starts the script as a user does, and lets it talk to real
SMTP servers: aiosmtpd, Postfix, and where bytes or faults matter a relay that follows a script.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import aiosmtpd.controller
import aiosmtpd.smtp
import pytest

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
        self.unread = b""
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
        assert line.endswith(b"\r"), line
        assert b"\r" not in line[:-1], line
        self.commands.append(line[:-1])
        return line[:-1]

    def read(self, size):
        while len(self.unread) < size:
            self.receive()
        data, self.unread = self.unread[:size], self.unread[size:]
        return data

    def data(self):
        """The content behind DATA, unstuffed (RFC 5321 4.5.2)."""
        while not (self.unread.startswith(b".\r\n") or b"\r\n.\r\n" in self.unread):
            self.receive()
        if self.unread.startswith(b".\r\n"):
            self.unread = self.unread[3:]
            return b""
        content, _, self.unread = self.unread.partition(b"\r\n.\r\n")
        content += b"\r\n"
        return (content[1:] if content.startswith(b".") else content).replace(b"\r\n.", b"\r\n")

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


def test_a_mail_is_delivered(spool, relay, run):
    put(spool, "m1", mail("alice@example.org", Bcc="bob@example.org"))
    daemon = run("-once", "-smtpaddr", relay.address)
    assert daemon.status_code == 0
    assert relay.mails[0].recipients == ["alice@example.org", "bob@example.org"]
    assert names(spool) == []


def test_scripted(spool, scripted, start):
    relay = scripted()
    daemon = start("-smtpaddr", relay.address)
    put(spool, "m1", mail())
    relay.wait_for(1)
    assert daemon.stop() == 0
