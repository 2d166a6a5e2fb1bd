"""bare.py --port PORT SPOOL: sends every mail of a spool with nothing in the way, for .ci/bench to compare us with.

The same system calls (open, lease, fstat, read, two pipelined writes, lstat, unlink), two log lines, one greenlet for
each mail from a Pool of 100; no status file, no state, nobody who would notice that something went wrong.
"""

import gevent.monkey

gevent.monkey.patch_all()

import fcntl  # noqa: E402
import io  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import gevent.pool  # noqa: E402

FIELD = re.compile(rb"^(From|To):.*?([^\s<]+@[^\s>]+)", re.MULTILINE)
IDLE = []  # connections


def main(spool, port):
    pool = gevent.pool.Pool(100)
    for name in os.listdir(spool):
        pool.spawn(send, os.path.join(spool, name), int(port))
    pool.join()


def send(path, port):
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    size = os.fstat(handle).st_size
    with io.FileIO(handle) as file:
        text = file.read(size + 1)
        addresses = dict(FIELD.findall(text.partition(b"\n\n")[0]))
        log(f"{path} sending mail to {addresses[b'To'].decode()} attempt: 0")
        transact(port, addresses[b"From"], addresses[b"To"], text.replace(b"\n", b"\r\n"))
        log(f"{path} successfully sent to {addresses[b'To'].decode()}")
        os.lstat(path)
        os.unlink(path)


def transact(port, sender, recipient, content):
    connection = IDLE.pop() if IDLE else opened(port)
    ask(connection, b"MAIL FROM:<%b>\r\nRCPT TO:<%b>\r\nDATA\r\n" % (sender, recipient), 3)
    ask(connection, content.replace(b"\r\n.", b"\r\n..") + b".\r\n", 1)
    IDLE.append(connection)


def opened(port):
    connection = socket.create_connection(("127.0.0.1", port))
    connection.recv(4096)
    connection.sendall(b"EHLO localhost\r\n")
    connection.recv(4096)
    return connection


def ask(connection, data, replies):
    connection.sendall(data)
    while replies > 0:
        replies -= connection.recv(4096).count(b"\n")


def log(text):
    sys.stderr.write(f"{time.strftime('%Y/%m/%d %H:%M:%S')} {text}\n")


if __name__ == "__main__":
    main(sys.argv[3], sys.argv[2])
