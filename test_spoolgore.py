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


# ------------------------------------------------------- for the people who run it

README = SCRIPT.with_name("README.md")

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
    assert (
        list(rows).index("waiting")
        < list(rows).index("partly")
        < list(rows).index("deferred")
        < list(rows).index("gone")
    )


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
    name = (
        f"@spoolgore-{os.getpid()}-{time.monotonic_ns()}" if request.param == "abstract" else str(tmp_path / "notify")
    )
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


def test_importing_the_module_patches_nothing():
    code = "import socket; before = socket.socket; import spoolgore; assert socket.socket is before; print('same')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=SCRIPT.parent).stdout == b"same\n"


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
