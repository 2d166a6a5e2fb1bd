#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = [
#   'gevent>=22.10 ; python_version >= "3.10"',
#   'gevent>=22.10,<26 ; python_version < "3.10"',
#   "docopt>=0.6.2",
# ]
# ///
"""Spoolgore: sends the mails that applications drop into a directory.

Each file in DIRECTORY is one mail (RFC 5322). It is sent through a relay as
soon as it is there, tried again on any error, and removed when every
recipient has it.

Usage:
  spoolgore.py [options] DIRECTORY [NAME...]
  spoolgore.py -check [options] [DIRECTORY]

Relay options:
  -smtpaddr ADDR         address of the smtp address to use in the addr:port
                         format; "-" takes the mails out of the spool and
                         prints them [default: 127.0.0.1:25]
  -smtpuser USER         username for smtp plain authentication
  -smtppassword SECRET   password for smtp plain authentication
  -smtpmd5user USER      username for smtp cram md5 authentication
  -smtpmd5password SECRET
                         password for smtp cram md5 authentication
  -smtpauth MECHANISM    plain, login, cram-md5 or xoauth2, instead of what the
                         user flag means
  -smtppasswordcommand COMMAND
                         the first line of this shell command's output is the
                         password or the OAuth 2 token
  -tls MODE              auto (STARTTLS if offered, but not to this machine;
                         smtps on port 465), starttls (required), smtps or off
                         [default: auto]
  -tlsca FILE            trust the certificates in this PEM file instead of the
                         system's
  -tlscert FILE          PEM file with a client certificate and its key
  -tlsname NAME          name that the relay's certificate must bear, if it is
                         not the host's
  -helo NAME             name to say in EHLO; this machine's if it has a full
                         one, else its address
  -concurrency N         mails in flight at once, and so the most connections
                         [default: 100]
  -timeout SECONDS       how long the relay may take over one command; 600 for
                         its answer to a whole mail [default: 60]
  -rate LIMITS           at most so many recipients: N/s, N/m, N/h, N/d, or
                         several of them with commas

Queue options:
  -freq SECONDS          frequency of spool directory scans (seconds); new
                         mails are seen at once where inotify is to be had
                         [default: 10]
  -attempts N            max attempts for failed SMTP transactions before
                         giving up [default: 100]
  -fail5xx               give up at once on a recipient that the relay refuses
                         with a permanent (5xx) reply
  -once                  send what is due, then exit: 0 if the spool is empty,
                         75 if something remains

Status options:
  -json PATH             path of the json status file; .spoolgore.js in the
                         spool directory if empty
  -http ADDR             show a page at this addr:port or unix:PATH; /metrics
                         is for Prometheus, /health for monitors
  -failcommand COMMAND   run this shell command for each mail that was given
                         up, with its entry as JSON on standard input
  -status                print how the spool is doing, or all about the mails
                         NAME, and exit: 0; 1 when somebody should look; 69
                         when no daemon runs
  -older AGE             somebody should look when a mail waits for longer:
                         90s, 15m, 2h, 3d; 0 for never [default: 1h]
  -format FORMAT         of -status: text, or json (an object a line, the
                         summary first) [default: text]
  -flush                 have the daemon that runs on DIRECTORY send everything
                         now, and exit: 0, or 1 when it cannot be asked

  -check                 talk to each relay, and print what it is like: the
                         address that answers, its certificate, what it offers,
                         the login; exit 0, or 1 when something is wrong
  -checkto ADDRESS       with -check, also ask whether it takes a mail from and
                         to this address; none is sent

Other options:
  -h, -help              print this text
  -version               print the version

Flags may be written -name value, -name=value, --name value or --name=value.

Signals:
  SIGURG                 every waiting recipient is due now
  SIGHUP                 read the status file again
  SIGTSTP                suspend: nothing is sent or written until SIGHUP or
                         SIGURG, so that the status file can be edited
  SIGTERM, SIGINT        finish what is in flight (10 s at most) and exit
"""

import sys
import warnings

try:
    if __name__ == "__main__":  # importing the module never patches the importer
        from gevent import monkey

        monkey.patch_all()
    with warnings.catch_warnings():  # docopt 0.6.2's own, since Python 3.12
        warnings.simplefilter("ignore", SyntaxWarning)
        import docopt
except ImportError as error:
    if __name__ != "__main__":
        raise
    hint = "apt install python3-gevent python3-docopt, or: pip install gevent docopt"
    sys.exit(f"spoolgore.py needs {error.name or error}, which is not installed for {sys.executable}: {hint}")

import atexit
import base64
import collections
import contextlib
import ctypes
import email.errors
import email.header
import enum
import errno
import functools
import gc
import hashlib
import heapq
import hmac
import html
import io
import ipaddress
import itertools
import json
import math
import operator
import os
import re
import select
import shutil
import signal
import smtplib
import socket
import ssl
import stat
import struct
import time
import traceback
import unicodedata
import zlib
from collections import deque
from datetime import datetime, timezone
from encodings.idna import nameprep
from typing import NamedTuple

import gevent
import gevent.event
import gevent.lock
import gevent.monkey
import gevent.pool
import gevent.socket
import gevent.util
from gevent import subprocess

try:
    import fcntl
except ImportError:  # Windows: no leases
    fcntl = None
try:
    import msvcrt
except ImportError:  # everywhere else
    msvcrt = None

# ---------------------------------------------------------------- glossary
#
# spool         the directory; what lies in .failed/ inside it was given up
# mail          one file in the spool
# message       what is in the file: header fields and body (RFC 5322)
# envelope      one mail's entry in the status: its recipients and their state
# recipient     one address of the envelope; it is waiting, in flight,
#               delivered or given up; a mail is in line, flies, rests: see Queue
# held          by its user, who put a dot before the file's name
# away          not in the spool; if somebody has the mail already it is
#               recognised when it comes back
# relay         the SMTP server that takes the mails (smarthost)
# transaction   MAIL, RCPT, DATA or BDAT: one mail, up to 100 recipients
# outcome       what a transaction did for one recipient: delivered, deferred
#               (4xx), refused (5xx), or again (not asked yet)
# settled       every recipient is delivered or given up
# turn          under -rate, the moment when a mail's next recipients may go
# news          what the status file does not know of a mail yet

VERSION = "1.1.0"
RECIPIENTS_PER_TRANSACTION = 100  # RFC 5321 4.5.3.1.8: every relay takes these
ADDRESS_LIMIT = 254  # octets; RFC 5321 4.5.3.1.3 less the angle brackets
HEADER_LIMIT = 16 * 2**20  # octets of header that are worth parsing
CHUNK = 128 * 1024  # octets; a mail up to this size is held whole, a larger one streamed
RECIPIENT_LIMIT = 100_000  # a mail with more of them is held
PROBE_SECONDS = 10  # the longest pause between two dials to a relay that is down
SPARE_DESCRIPTORS = 30  # for the lock, the status, inotify, the interpreter
QUIET_SECONDS = 1  # how long a file must rest where leases are not to be had
UNCLOSED_SECONDS = 60  # the same, if its writer was seen to come and not to go (a link may look like that), or is there
NAME_LIMIT = 255  # octets of a file's name (NAME_MAX)
STATE_LIMIT = 2**30  # octets; no state file is larger: a million mails are waiting then
SAVE_SECONDS = 1  # the least time between two writes of the status file
FACTS_SECONDS = 1  # the same, of what only the daemon knows
NEAR_SECONDS = 60  # a turn under -rate that comes sooner is waited for by -once, and not spoken of
GRACE_SECONDS = 0.1  # a file that was written in place may yet get its name, its time or its owner
CLOCK_STEP_SECONDS = 5  # a clock that jumps back by more was set
SAY_AGAIN_SECONDS = 3600  # what goes on for so long is said again
STOP_SECONDS = 10  # what is in flight at SIGTERM may take this long
HTTP_PORT = 8025
EX_OK, EX_ERROR, EX_USAGE, EX_UNAVAILABLE, EX_TEMPFAIL = 0, 1, 2, 69, 75


# --------------------------------------------------------------------- log


class Log:
    """Writes lines in the original's format. Whatever goes into a line, it is one line without control characters.

    It neither raises nor switches greenlets: whoever says something goes on at once.
    """

    def __init__(self, stream=None):
        self.stream = stream or io.StringIO()
        self.second, self.moment = -1, ""
        self.progress = None  # on a terminal: the text of its last line, above which the log scrolls

    def __call__(self, text):
        second = int(time.time())
        if second != self.second:
            self.second, self.moment = second, time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(second))
        line = f"{self.moment} {text if text.isprintable() else one_line(text)}\n"
        try:
            self.stream.write(line if self.progress is None else f"\r\x1b[K{line}{self.progress}")
            self.stream.flush()
        except (OSError, ValueError):  # full, or closed: no reason to stop
            return

    def traceback(self, text):
        """Say it, and what was raised just now."""
        for line in [text, *traceback.format_exc().splitlines()]:
            self(line)

    def show(self, progress):
        """Redraw the last line of a terminal."""
        self.progress = progress[: shutil.get_terminal_size().columns - 1]
        self.stream.write(f"\r\x1b[K{self.progress}")
        self.stream.flush()


def one_line(text):
    """Text without anything that could break the line or steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c == "\n" else repr(c)[1:-1] for c in text)


def named(path):
    """A path as the log has it: quoted where it could be taken for more than a path."""
    is_plain = path.isprintable() and " " not in path and '"' not in path
    return path if is_plain else json.dumps(path, ensure_ascii=False)


def complain(text, status=EX_ERROR):
    """Say it; returns the exit status that goes with it."""
    log(text)
    return status


log = Log()


# ----------------------------------------------------------------- options


class UsageError(Exception):
    """The command line is wrong; the text names the flag."""


class Options(NamedTuple):
    """The command line, typed and checked. Times are in seconds."""

    directory: str
    smtpaddr: list  # of Address, in order of preference; empty: print the mails
    smtpuser: str
    smtppassword: str
    smtpmd5user: str
    smtpmd5password: str
    smtpauth: str
    smtppasswordcommand: str
    tls: str
    tlsca: str
    tlscert: str
    tlsname: str
    helo: str
    concurrency: int
    timeout: int
    freq: int
    attempts: int
    rate: list  # of (recipients, seconds)
    fail5xx: bool
    once: bool
    json: str
    status: bool
    flush: bool
    check: bool
    checkto: str
    http: str  # unix:PATH, or an Address
    failcommand: str
    older: float  # infinity for never
    format: str
    names: list  # of mails, with -status


class Address(NamedTuple):
    """Where a relay listens."""

    host: str
    port: int

    def __str__(self):
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def flags(doc):
    """The flags of the usage text: a dict from name to whether it takes a value."""
    lines = re.findall(r"^  -(?:h, -)?(\w+)( [A-Z]+)?", doc, re.MULTILINE)
    return {name: bool(value) for name, value in lines}


def docopt_argv(argv, takes_value):
    """Arguments in any of Go's spellings as ``--name=value``, the directory last.

    A flag that is given twice counts as it was given last. Raises UsageError, in the words of Go's flag package.
    """
    found, names, words = {}, [], iter(argv)
    for word in words:
        if word == "--":
            names += words
        elif len(word) < 2 or word[0] != "-":
            names.append(word)
        else:
            name, value = split_flag(word, words, takes_value)
            found[name] = value
    options = [f"--{name}" if value is None else f"--{name}={value}" for name, value in found.items()]
    return options + [f"./{name}" if name.startswith("-") else name for name in names]


def split_flag(word, words, takes_value):
    """The name and value of one flag; the value may be the next of words."""
    match = re.fullmatch(r"--?([^-=][^=]*)(?:=(.*))?", word, re.DOTALL)
    if not match:
        raise UsageError(f"bad flag syntax: {word}")
    name, value = match.groups()
    name = "help" if name == "h" else name
    if name not in takes_value:
        raise UsageError(f"flag provided but not defined: -{name}")
    if not takes_value[name]:
        return name, switch(name, value)
    value = next(words, None) if value is None else value
    if value is None:
        raise UsageError(f"flag needs an argument: -{name}")
    return name, value


def switch(name, value):
    """A flag without a value is on; ``-name=true`` is Go's other way to say so."""
    if value not in (None, "1", "t", "true", "T", "True", "TRUE"):
        raise UsageError(f'invalid value "{value}" for flag -{name}: it is given or it is not')
    return None


def bad_value(name, value, reason):
    return UsageError(f'invalid value "{value}" for flag -{name}: {reason}')


def whole_number(name, value, least):
    if not re.fullmatch(r"[+-]?\d{1,9}", value, re.ASCII):
        raise bad_value(name, value, "parse error")
    if int(value) < least:
        raise bad_value(name, value, f"must be {least} or more")
    return int(value)


def check_choice(name, value, choices):
    if value not in choices:
        raise bad_value(name, value, f"must be one of {', '.join(filter(None, choices))}")


def parse_addresses_of_relays(text, default_port):
    """Addresses in order of preference from comma-separated text; none for "-"."""
    return [] if text == "-" else [parse_address("smtpaddr", part.strip(), default_port) for part in text.split(",")]


def parse_listener(text):
    """``unix:PATH`` as it is, or an Address; empty for none."""
    if not text.startswith("unix:"):
        return parse_address("http", text, HTTP_PORT) if text else ""
    if not (text[5:] and hasattr(socket, "AF_UNIX")):
        raise bad_value("http", text, "no path" if hasattr(socket, "AF_UNIX") else "this system has no such sockets")
    return text


def is_host(text):
    """Whether a name can be one of the DNS, or none was given."""
    try:
        text.encode("idna")
    except UnicodeError:
        return False
    return True


def parse_address(flag, text, default_port):
    """An Address from ``host:port``, ``host``, ``:port`` or ``[IPv6]:port``."""
    if text == "-" and flag == "smtpaddr":
        raise bad_value(flag, text, '"-" stands alone')
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]/,]*))(?::(\d{1,5}))?", text)
    if not match or not text or text.isdigit():
        raise bad_value(flag, text, "not an address like host:port")
    port = int(match[3] or default_port)
    if not 0 < port < 65536:
        raise bad_value(flag, text, "the port is not between 1 and 65535")
    if not is_host(match[2] or ""):
        raise bad_value(flag, text, "not a host name")
    return Address(match[1] or match[2] or "localhost", port)


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_rate(text):
    """(recipients, seconds) pairs from limits like ``14/s,50000/d``."""
    limits = [re.fullmatch(r"([1-9]\d{0,8})/([smhd])", part.strip()) for part in text.split(",")] if text else []
    if not all(limits):
        raise bad_value("rate", text, "not limits like 14/s,50000/d")
    return [(int(limit[1]), UNITS[limit[2]]) for limit in limits]


def parse_age(text):
    """Seconds from ``90s``, ``15m``, ``2h`` or ``3d``; infinity from 0."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", text, re.ASCII)
    if not match and text != "0":
        raise bad_value("older", text, "not a time like 90s, 15m, 2h or 3d")
    return int(match[1]) * UNITS[match[2]] if match and int(match[1]) else math.inf


def parse_options(argv, doc=None):
    """Options from the words behind the program's name.

    Raises UsageError for a flag that is wrong, SystemExit after -h and -version or without a directory.
    """
    doc = doc or __doc__
    words = docopt_argv(argv, flags(doc))
    if "--help" in words:
        raise SystemExit(print(doc.strip()))
    if "--version" in words:
        raise SystemExit(print(f"spoolgore.py {VERSION}"))
    directories = [word for word in words if not word.startswith("--")]
    if len(directories) > 1 and "--status" not in words:
        raise UsageError(f"one spool directory, not {len(directories)}: {' '.join(directories)}")
    words += [] if directories else [""]  # docopt is content then, and a wrong value is said first, as in the original
    doc = re.sub(r"(?<![\w-])-(\w{2,})", r"--\1", doc)  # docopt reads --name, which Go spells -name
    found = docopt.docopt(doc, words, False)
    options = typed({name.lstrip("-"): "" if value is None else value for name, value in found.items()})
    if not (options.directory or options.check):
        raise SystemExit(complain("please specify a spool directory"))
    return options


def typed(found):
    """Options from docopt's dict of texts. Raises UsageError."""
    least = {"concurrency": 1, "timeout": 1, "freq": 0, "attempts": 0}
    numbers = {name: whole_number(name, found[name], low) for name, low in least.items()}
    check_words(found)
    switches = {name: bool(found[name]) for name in ("fail5xx", "once", "status", "flush", "check")}
    relays = parse_addresses_of_relays(found["smtpaddr"], 465 if found["tls"] == "smtps" else 25)
    parsed = {"directory": found["DIRECTORY"], "smtpaddr": relays, "rate": parse_rate(found["rate"])}
    parsed.update(older=parse_age(found["older"]), names=found["NAME"], http=parse_listener(found["http"]))
    if len(modes := [name for name in ("check", "status", "flush") if found[name]]) > 1:
        raise UsageError(f"-{modes[0]} and -{modes[1]} exclude each other")
    values = {**found, **switches, **numbers, **parsed}
    return Options(**{name: values[name] for name in Options._fields})


def check_words(found):
    """Texts that stay texts. Raises UsageError."""
    check_choice("tls", found["tls"], ("auto", "starttls", "smtps", "off"))
    check_choice("format", found["format"], ("text", "json"))
    check_choice("smtpauth", found["smtpauth"], ("", "plain", "login", "cram-md5", "xoauth2"))
    check_user(found, "smtpauth", "smtpuser", "smtpmd5user")
    check_user(found, "smtppasswordcommand", "smtpuser", "smtpmd5user")
    check_user(found, "smtppassword", "smtpuser")
    check_user(found, "smtpmd5password", "smtpmd5user")
    for name in ("helo", "tlsname"):
        if not re.fullmatch(r"[!-~]*", found[name]) or (name == "tlsname" and not is_host(found[name])):
            raise bad_value(name, found[name], "not a host name")
    if found["tlsname"] and found["tls"] == "off":
        raise bad_value("tlsname", found["tlsname"], "there is no TLS with -tls off")
    if found["check"] and found["smtpaddr"] == "-":
        raise bad_value("smtpaddr", "-", "there is no relay for -check")
    check_user(found, "checkto", "check")
    if found["format"] != "text":
        check_user(found, "format", "status")
    if found["checkto"]:
        check_address("checkto", found["checkto"])


def check_address(flag, address):
    problem = address_problem(address) or ("" if "@" in address else "an address without a domain")
    try:
        wire_address(address)
    except ValueError as error:
        problem = problem or f"an impossible domain: {error}"
    if problem:
        raise bad_value(flag, address, problem)


def check_user(found, name, *users):
    if found[name] and not any(found[user] for user in users):
        secret = "password" in name  # a command may hold one too
        raise bad_value(name, "..." if secret else found[name], f"it needs -{users[0]}")


# ----------------------------------------------------------------- message


class BadMessage(Exception):
    """The file is not a mail that can be sent; the text says why."""


class Unfinished(OSError):
    """The file changes while it is read."""


# These look in a header with an LF before it. A field's name may have a space before its colon (RFC 5322 4.5). A value
# goes on to the next LF without a blank behind it, found by .*? since a group for each folded line takes memory for it.
NO_FIELD = re.compile(rb"\n(?![!-9;-~]+[ \t]*:|(?<!\A\n)[ \t])[^\n]*")
VALUE = rb"[ \t]*:(.*?)(?=\n(?![ \t])|\Z)"
FIELD = re.compile(rb"\n([!-9;-~]+)" + VALUE, re.DOTALL)
ADDRESS_FIELD = re.compile(rb"\n(from|(?:resent-)?(?:to|cc|bcc))" + VALUE, re.IGNORECASE | re.DOTALL)
RESENT_TO_FIELD = re.compile(rb"\nresent-(?:to|cc|bcc)[ \t]*:", re.IGNORECASE)
BCC = re.compile(rb"\n(?:resent-)?bcc" + VALUE, re.IGNORECASE | re.DOTALL)
ENVELOPE_LINE = re.compile(rb"(x-sender|x-receiver)[ \t]*:(.*?)(?:\n(?![ \t])|\Z)", re.IGNORECASE | re.DOTALL)
MESSAGE_ID = re.compile(rb"\nmessage-id[ \t]*:\s*(<[^>\n]{1,250}>)", re.IGNORECASE)
OUR_MESSAGE_ID = re.compile(r"<[0-9a-f]{32}@[!-;=?-~]+>")
WANTED_FIELD = re.compile(rb"\n(date|from|message-id|dkim-signature)[ \t]*:")  # in lower case
SENDERS = ("from", "resent-from", "resent-sender")
RESENT_TO = ("resent-to", "resent-cc", "resent-bcc")
NO_HEADER_YET = re.compile(rb"(?:\xef\xbb\xbf)?(?:From [^\n]*(?:\n|\Z))?")  # a byte order mark; mbox's first line
ATOM = r"[\w!#$%&'*+/=?^`{|}~-]+"
PLAIN = re.compile(rf"{ATOM}(?:\.{ATOM})*@[\w-]+(?:\.[\w-]+)*", re.ASCII)
PLAIN_MAILBOX = re.compile(rf"([A-Za-z0-9 ]*<)?({PLAIN.pattern})(?(1)>)", re.ASCII)
QUOTED_LOCAL = re.compile(r'"(?:[^"\\<>\x00-\x1f\x7f]|\\[ -;=?-~])+"')
PLAIN_LOCAL = re.compile(r'[^\s"(),:;<>@\[\\\]\x00-\x1f\x7f]+')
LABEL = r"[^\x00-,./:-@\[-^`{-\x7f\s]+"  # letters, digits, hyphen, underscore, and all that is not ASCII
DOMAIN = re.compile(rf"{LABEL}(?:\.{LABEL})*|\[[^\s\[\]\\\x00-\x1f\x7f]+\]")
KEPT_BY_2008 = re.compile("([\u00df\u03c2\u200c\u200d])")  # sharp s, final sigma, the joiners; RFC 5894 7.2
TOO_LONG = f"longer than {ADDRESS_LIMIT} octets"


def unix_lines(read, octets=CHUNK):
    """The chunks that ``read(octets)`` gives, with every CRLF, bare CR and bare LF made LF."""
    held = b""
    while data := read(octets):
        data = held + data
        held = b"\r" if data.endswith(b"\r") else b""
        if text := (data[:-1] if held else data).replace(b"\r\n", b"\n").replace(b"\r", b"\n"):
            yield text
    if held:
        yield b"\n"


def split_header(chunks):
    """The header, and the rest from the empty line on, of LF chunks (RFC 5322 2.1).

    Raises BadMessage when the header does not end within HEADER_LIMIT octets, or the message begins with its end.
    """
    text = next(chunks, b"")
    while b"\n" not in text[-CHUNK - 2 :] and len(text) <= HEADER_LIMIT and (more := next(chunks, b"")):
        text += more
    if text[:1] in b"F\xef":
        text = text[NO_HEADER_YET.match(text).end() :]
    while b"\n\n" not in text[-CHUNK - 2 :] and len(text) <= HEADER_LIMIT and (more := next(chunks, b"")):
        text += more
    if text[:1] == b"\n":
        raise BadMessage("begins with an empty line")
    header, gap, body = text.partition(b"\n\n")
    if len(header) > HEADER_LIMIT:
        raise BadMessage(f"header longer than {HEADER_LIMIT} octets")
    return header.rstrip(b"\n"), gap[1:] + body


def envelope_lines(header):
    """The octets of the X-Sender and X-Receiver lines at the top, and the sender and the recipients that they name,
    None for what they do not. Raises BadMessage: To is no substitute."""
    end, named = 0, {"X-Sender": [], "X-Receiver": []}
    while line := ENVELOPE_LINE.match(header, end):
        name, end = line[1].decode().title(), line.end()
        named[name].append(envelope_address(name, line[2].decode("utf-8", "surrogateescape").strip(" \t")))
    senders, receivers = named.values()
    if len(senders) > 1:
        raise BadMessage('"X-Sender" header: twice')
    if end and not header[end:]:
        raise BadMessage("nothing but X-Sender and X-Receiver lines in the header")
    return end, senders[0] if senders else None, unique(receivers, set()) or None


def envelope_address(name, text):
    """``address / "<" address ">"``, alone; it needs no domain. Raises BadMessage."""
    if (name, text) == ("X-Sender", "<>"):
        return ""
    address = ENCODED_WORD.sub(decoded_word, text[1:-1] if text[:1] + text[-1:] == "<>" else text)
    problem = address_problem(address)
    if problem and (problem, name) != (TOO_LONG, "X-Receiver"):
        reason = problem if problem in (TOO_LONG, "not UTF-8") else "not an address"
        raise BadMessage(f'"{name}" header: {reason}: {shown(text)}')
    return address


def missing_fields(header):
    """The names of the fields to add (RFC 6409 8); none to a mail that is signed (RFC 6376)."""
    lower = b"\n" + header.lower()
    if b"\ndate:" in lower and b"\nfrom:" in lower and b"\nmessage-id:" in lower:
        return []
    found = WANTED_FIELD.findall(lower)
    names = () if b"dkim-signature" in found else ("Date", "From", "Message-ID")
    return [name for name in names if name.lower().encode() not in found]


def address_fields(header):
    """(lower-case name, value) of each From, To, Cc and Bcc; of the topmost Resent fields if any names a recipient.

    A value is unfolded (RFC 5322 2.2.3). Raises BadMessage for a line that is no field, in the original's words.
    """
    lines = b"\n" + header
    if header and (wrong := NO_FIELD.search(lines)):
        line = wrong[0][1:81].decode("utf-8", "replace")
        raise BadMessage(f"malformed MIME header: missing colon: {shown(line)}")
    fields = values_of(ADDRESS_FIELD, lines)
    return resent_fields(lines) if b"\nresent-" in lines.lower() else fields


def values_of(pattern, lines):
    return [
        (name.decode().lower(), value.replace(b"\n", b"").decode("utf-8", "surrogateescape").strip())
        for name, value in pattern.findall(lines)
    ]


def resent_fields(lines):
    """The topmost block of Resent fields, if one of them names a recipient (RFC 5322 3.6.6); else the other fields."""
    others = [field for field in values_of(ADDRESS_FIELD, lines) if not field[0].startswith("resent-")]
    if not RESENT_TO_FIELD.search(lines):
        return others
    of_block = itertools.dropwhile(lambda field: not field[0].startswith("resent-"), values_of(FIELD, lines))
    block = {}
    for name, value in itertools.takewhile(lambda field: field[0].startswith("resent-"), of_block):
        if name in block and name not in RESENT_TO:  # the next block
            break
        block[name] = None if name in block else value  # None: twice in one block
    found = [(name, block[name]) for name in ("resent-sender", "resent-from", *RESENT_TO) if name in block]
    return found + [field for field in others if field[0] == "from"]


def without_bcc(header):
    """The header that is sent: every field as it is, but for Bcc and Resent-Bcc."""
    kept = BCC.sub(b"", b"\n" + header)[1:] if b"bcc" in header.lower() else header
    return kept and kept + b"\n"


# An address list (RFC 5322 3.4), as people write it. Where it can be read in two ways it is not read at all: a mail
# that is held can be corrected, one that went to a part of its recipients cannot. What a quotation, a comment or an
# encoded word holds is masked before the list is looked at, so that no part of it is taken for the list's.

MASKED = re.compile(
    r'"(?:[^"\\]|\\.)*"|["(]|=\?[^?\s@]+\?[bq]\?[^?\s@]*\?=|(?<=@)\[[^\[\]\s]*\]', re.IGNORECASE | re.DOTALL
)
PARENTHESIS = re.compile(r"\\.|[()]", re.DOTALL)
SEPARATOR = re.compile(r"<[^<>]*>|&#?\w+;|[,;]")  # R&amp;D is a name
WITH_COLON = re.compile(r"<[^<>]*>|&#?\w+;|\bmailto:", re.IGNORECASE)
GROUP = re.compile(r"(\A|,)([^,;:@<>]*:)([^;:]*);(?=[ \t]*(?:,|\Z))")
WORD = re.compile(r"\S+")
ENCODED_WORD = re.compile(r"=\?[^?\s]+\?[bq]\?[^?\s]*\?=", re.IGNORECASE)


def parse_addresses(text):
    """The bare addresses of ``list = [item] *(("," / ";") [item])``. Raises BadMessage if it may mean anything else."""
    if plain := plain_address(text):
        return [plain]
    return [address_of(*item) for item in itertools.islice(items_of(text), RECIPIENT_LIMIT + 1)]


def plain_address(text):
    """The address, if there is nothing else but a plain name: nearly always, and in a twentieth of the time."""
    plain = PLAIN_MAILBOX.fullmatch(text)
    return plain[2] if plain and "=?" not in text and len(plain[2]) <= ADDRESS_LIMIT else ""


def items_of(text):
    """(item, the same masked) of each that is not empty: ``item = *(quotation / comment / "<" *any ">" / any)``."""
    cover, start = without_groups(text, masked(text)), 0
    ends = [match.start() for match in SEPARATOR.finditer(cover) if match[0] in (",", ";")]
    for end in [*ends, len(text)]:
        if not re.fullmatch(r"(?:[^@<>]*:)?\s*", cover[start:end]):  # nothing, a comment, or "undisclosed-recipients:"
            yield text[start:end], cover[start:end]
        start = end + 1


def masked(text):
    """Text of the same length, each comment blank, each ``quotation = DQUOTE *any DQUOTE`` filled with underscores."""
    parts, end = [], 0
    while match := MASKED.search(text, end):
        start, is_comment = match.start(), match[0] == "("
        if text[start - 1 : start] == "\\":
            raise BadMessage(f"a backslash outside a quotation: {shown(text[start - 1 :])}")
        parts.append(text[end:start])
        end = end_of_comment(text, start) if is_comment else match.end()
        parts.append(" " * (end - start) if is_comment else masked_quotation(text, start, end))
    cover = "".join([*parts, text[end:]])
    if ")" in cover and re.search('[",;]', cover):  # a part of the list was in that comment, or in a quotation
        raise BadMessage(f"a comment without beginning: {shown(text)}")
    return cover


def without_groups(text, cover):
    """The members of each ``group = name ":" [list] ";"``, all else of it blank. Raises BadMessage if one has no end.

    Without colons a semicolon is Outlook's comma; one item's name may have a colon.
    """
    outside = WITH_COLON.sub("", cover)
    if ":" not in outside or not re.search("[,;]", outside):
        return cover
    cover = GROUP.sub(lambda match: f"{match[1]}{' ' * len(match[2])}{match[3]} ", cover)
    if re.search("[:;]", WITH_COLON.sub("", cover)):
        raise BadMessage(f"a group without end, or a semicolon in place of a comma: {shown(text)}")
    return cover


def masked_quotation(text, start, end):
    """A quotation that stands by itself: ``5" disk, 3" disk`` is none, so what is in it must not look like a list."""
    if end - start == 1:
        raise BadMessage(f"a quotation without end: {shown(text[start:])}")
    before, after = text[start - 1 : start], text[end : end + 1]
    is_word = before not in " \t,;:<(" or after not in " \t,;:<>(@"
    if text[start] == '"' and is_word and re.search(r"[,;<>@]", text[start:end]):
        raise BadMessage(f"a quotation in the middle of a word: {shown(text[start:])}")
    return text[start] + "_" * (end - start - 2) + text[start]


def end_of_comment(text, start):
    """``comment = "(" *(comment / any) ")"``. Returns where the one that begins at start ends. Raises BadMessage."""
    depth = 0
    for match in PARENTHESIS.finditer(text, start):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if not depth:
            return match.end()
    raise BadMessage(f"a comment without end: {shown(text[start:])}")


def address_of(item, cover):
    """The address of an item. Raises BadMessage if it may have two: a comma that was forgotten makes one a name."""
    start, end = span_of_address(cover)
    address = bare_address(item, cover, start, end)
    name = cover[: max(0, start - 1)]
    if name.rfind("<") > name.rfind(">") and not re.search(r"\S\s", name[name.rfind("<") + 1 :]):  # <jo<e@example.org>
        raise BadMessage(f"not an address: {shown(item.strip())}")
    for word in name.split():
        if "@" in word[1:-1] and word.strip("'<>[]:").lower() != address.lower():
            raise BadMessage(f"two addresses without a comma between: {shown(item.strip())}")
    return address


def span_of_address(cover):
    """Where the address is in ``item = [name] "<" address ">" / address``."""
    end = len(cover.rstrip())
    if cover[:end].endswith(">") and (start := cover.rfind("<", 0, end)) >= 0:
        return start + 1, end - 1
    return 0, end


def bare_address(item, cover, start, end):
    """The ``[comment] ["mailto:"] local-part "@" domain [comment]`` there. Raises BadMessage for anything else."""
    words = [item[match.start() : match.end()] for match in WORD.finditer(cover, start, end)]
    if len(words) != 1:
        raise BadMessage(f"not an address: {shown(item.strip())}")
    if "@" not in cover[start:end]:
        raise BadMessage(f"an address without a domain: {shown(item.strip())}")
    bare = words[0][7:] if words[0][:7].lower() == "mailto:" else words[0]
    address = ENCODED_WORD.sub(decoded_word, bare)
    if (problem := address_problem(address)) and problem != TOO_LONG:
        raise BadMessage(f"{problem}: {shown(item.strip())}")
    return address


def decoded_word(match):
    """``encoded-word`` (RFC 2047) in an address: Python's email writes one for letters that are not ASCII."""
    try:
        ((octets, charset),) = email.header.decode_header(match[0])
        return octets.decode(charset)
    except (LookupError, ValueError, email.errors.MessageError):
        return match[0] + " "  # no address has a space


def shown(text):
    """The beginning of a text from a mail, quoted, for an error."""
    return json.dumps(text[:80].encode("utf-8", "replace").decode(), ensure_ascii=False)


def unique(addresses, seen):
    """Addresses that are not in seen yet, which grows; the domain's letter case makes no difference."""
    first = []
    for address in addresses:
        local, at, domain = address.rpartition("@")
        key = local + at + domain.lower()
        if key not in seen:
            seen.add(key)
            first.append(address)
    return first


def address_problem(address):
    """Why an address cannot be put into MAIL or RCPT (RFC 5321 4.1.2); empty when it can."""
    if len(address) <= ADDRESS_LIMIT and PLAIN.fullmatch(address):
        return ""
    local, at, domain = address.rpartition("@") if "@" in address else (address, "", "")
    try:
        octets = len(address.encode())
    except UnicodeEncodeError:
        return "not UTF-8"
    if not (PLAIN_LOCAL.fullmatch(local) or QUOTED_LOCAL.fullmatch(local)):
        return "bad local part"
    if at and not DOMAIN.fullmatch(domain):
        return "bad domain"
    return TOO_LONG if octets > ADDRESS_LIMIT else ""


def wire_address(address):
    """The address as it stands in MAIL and RCPT: a local part that is no dot-atom is quoted (RFC 5321 4.1.2), a domain
    that is not ASCII goes as IDNA 2008 (RFC 5891).

    What is not ASCII in the result needs SMTPUTF8 (RFC 6531). Raises ValueError for an impossible domain.
    """
    local, at, domain = address.rpartition("@") if "@" in address else (address, "", "")
    if local and local[0] != '"' and (local[0] == "." or local[-1] == "." or ".." in local):
        local = f'"{local}"'  # docomo gave its customers such addresses
    if not domain.isascii():
        domain = ascii_domain(domain)
        if not DOMAIN.fullmatch(domain):  # some letters become brackets and spaces
            raise ValueError(f"it means {json.dumps(domain)}")
    return local + at + domain


def ascii_domain(domain):
    """A domain as it stands in the DNS. Raises ValueError."""
    return domain if domain.isascii() else ".".join(map(wire_label, re.split("[.\u3002\uff0e\uff61]", domain)))


def wire_label(label):
    """One label of a domain in ASCII. Raises ValueError.

    Python's codec is IDNA 2003: it takes another letter for four, or none, and so another's domain. Labels with these
    are encoded here, as RFC 5891 4 and RFC 5892 2.6 have it.
    """
    label = unicodedata.normalize("NFKC", label.replace("\u1e9e", "\u00df"))
    if not KEPT_BY_2008.search(label):
        return label.encode("idna").decode("ascii")
    if not all(joiner_fits(label, match.start()) for match in KEPT_BY_2008.finditer(label)):
        raise ValueError("a joiner between letters that do not join")
    wire = "".join(part if KEPT_BY_2008.match(part) else nameprep(part) for part in KEPT_BY_2008.split(label))
    wire = "xn--" + wire.encode("punycode").decode("ascii")
    if len(wire) > 63:
        raise ValueError("a label longer than 63 octets")
    return wire


def joiner_fits(label, at):
    """Whether the letter there is no invisible joiner, or one where RFC 5892 A.1 and A.2 allow it."""
    joiner, before, after = label[at], label[at - 1 : at], label[at + 1 : at + 2]
    if joiner not in "\u200c\u200d" or (before and unicodedata.combining(before) == 9):
        return True
    arabic = [letter and unicodedata.bidirectional(letter) == "AL" for letter in (before, after)]
    return joiner == "\u200c" and all(arabic)


class Message:
    """What is in one mail's file: whom it is from and for, and the content to send.

    file is open for reading in binary mode, size its octets. Raises BadMessage when it cannot be sent at all. whole is
    the content when it is small enough to be held in memory, else None; missing: the names of the fields to add().
    message_id: its own, or empty. checksum: of a streamed file when it was last read to its end; None if it never was.
    """

    __slots__ = (
        *("file", "size", "top", "from_field", "sender", "recipients", "missing", "added", "whole"),
        *("checksum", "checksum_so_far", "message_id"),
    )

    def __init__(self, file, size):
        self.file, self.checksum = file, None
        chunks = unix_lines(file.read) if size >= CHUNK else iter([whole_text(file, size)])
        header, rest = split_header(chunks)
        self.top, sender, receivers = envelope_lines(header) if header[:2] in (b"X-", b"x-") else (0, None, None)
        header = header[self.top :]
        fields = address_fields(header)
        self.from_field, self.sender = parse_sender(fields) if sender is None else (sender or "<>", sender)
        self.recipients = parse_recipients(fields) if receivers is None else {"To": receivers, "Cc": [], "Bcc": []}
        self.missing, self.added = missing_fields(header), b""
        own = MESSAGE_ID.search(b"\n" + header)
        self.message_id = own[1].decode("utf-8", "replace") if own else ""
        self.whole = None
        if size < CHUNK:
            text = without_bcc(header) + rest
            self.whole = (text if text.endswith(b"\n") else text + b"\n").replace(b"\n", b"\r\n")
        self.size = size - self.top if self.whole is None else len(self.whole)  # octets to declare (RFC 1870)

    def add(self, seen, message_id):
        """What is missing, before the first field, to a mail that was first seen at a time in seconds since 1970.
        It needs no From if nobody sent it."""
        text = f"Date: {mail_date(int(seen))}\r\n" if "Date" in self.missing else ""
        if "From" in self.missing and self.sender:
            text += f"From: {self.sender}\r\n"
        if "Message-ID" in self.missing:
            text += f"Message-ID: {message_id}\r\n"
        self.added = text.encode()
        self.size += len(self.added)
        self.whole = self.whole and self.added + self.whole

    def is_unchanged(self):
        """Whether the file still says what it said when it was read to its end."""
        self.file.seek(0)
        if self.whole is None:
            now = 0
            while data := self.file.read(CHUNK):
                now = zlib.crc32(data, now)
            return now == self.checksum
        try:
            again = Message(self.file, os.fstat(self.file.fileno()).st_size)
        except (BadMessage, Unfinished):
            return False
        before = self.whole[len(self.added) :], self.sender, self.recipients
        return (again.whole, again.sender, again.recipients) == before

    def content(self):
        """The content in chunks: CRLF line ends, no envelope lines, no Bcc, a line end last."""
        return iter([self.whole]) if self.whole is not None else self._stream()

    def _read(self, octets):
        """Of a file that grows all the time there is no end. Raises Unfinished."""
        if (data := self.file.read(octets)) and self.file.tell() > self.size + self.top - len(self.added):
            raise Unfinished("the file grew while it was read")
        self.checksum_so_far = zlib.crc32(data, self.checksum_so_far)
        return data

    def _stream(self):
        self.file.seek(0)
        self.checksum_so_far = 0
        chunks = unix_lines(self._read)
        header, body = split_header(chunks)
        yield self.added
        last = b""
        for chunk in itertools.chain([without_bcc(header[self.top :]), body], chunks):
            last = chunk or last
            yield chunk.replace(b"\n", b"\r\n")
        if self.file.tell() < self.size + self.top - len(self.added):
            raise Unfinished("the file shrank while it was read")
        self.checksum = self.checksum_so_far
        if not last.endswith(b"\n"):
            yield b"\r\n"


def whole_text(file, size):
    """A small file with LF line ends; size: its octets, as they were just now. Raises Unfinished."""
    text = file.read(size + 1)
    while len(text) < size and (more := file.read(size + 1 - len(text))):  # no read has to give all
        text += more
    if len(text) != size:
        raise Unfinished("the file changed while it was read")
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in text else text


@functools.lru_cache(maxsize=1)
def mail_date(seconds):
    """``date-time`` (RFC 5322 3.3)."""
    return time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime(seconds))


def new_message_id(sender, identity):
    """In the domain of the sender, else the machine's (RFC 5322 3.6.4)."""
    host = re.sub("[^A-Za-z0-9.-]", "-", socket.gethostname())
    try:
        domain = wire_address(sender).rpartition("@")[2] if "@" in sender else host
    except ValueError:
        domain = host
    name = hashlib.sha256(f"{host} {identity}".encode()).hexdigest()[:32]
    return f"<{name}@{domain}>"


def parse_sender(fields):
    """The sender's field as it stands, and the address for MAIL: the first that has a domain, or the null sender.

    Raises BadMessage when there is only something else.
    """
    for field in fields:
        if field[0] in SENDERS:
            name, text = field
            break
    else:
        return "", ""
    if plain := plain_address(text):
        return text, plain
    try:
        sender = first_address(text)
        if len(sender.encode()) > ADDRESS_LIMIT:
            raise BadMessage(f"{TOO_LONG}: {shown(sender)}")
    except BadMessage as error:
        raise BadMessage(f'"{name.title()}" header: {error}') from None
    return text, sender


def first_address(text):
    """The address of the first item that has one; "" if there is nothing, or an empty one. Raises BadMessage."""
    failure = None
    for item, cover in items_of(text):
        start, end = span_of_address(cover)
        if cover[start - 1 : start] == "<" and not cover[start:end].strip():
            return ""
        try:
            return bare_address(item, cover, start, end)
        except BadMessage as error:
            failure = failure or error
    if failure:
        raise failure
    return ""


def parse_recipients(fields):
    """A dict of the addresses in To, Cc and Bcc; an address stands in the first of them only. Raises BadMessage."""
    found, count = {"To": [], "Cc": [], "Bcc": []}, 0
    for name, text in fields:
        try:
            if text is None:
                raise BadMessage("twice in one block")
            if name not in SENDERS:
                addresses = parse_addresses(text)
                found[name.rpartition("-")[2].title()] += addresses
                count += len(addresses)
                if count > RECIPIENT_LIMIT:
                    raise BadMessage(f"more than {RECIPIENT_LIMIT} recipients")
        except BadMessage as error:
            raise BadMessage(f'"{name.title()}" header: {error}') from None
    seen = set()
    return {key: unique(addresses, seen) for key, addresses in found.items()} if count > 1 else found


def dot_stuffed(chunks):
    """Chunks with a dot more at the start of each line that begins with one (RFC 5321 4.5.2)."""
    at_line_start = True
    for chunk in chunks:
        if chunk:
            yield (b"." if at_line_start and chunk.startswith(b".") else b"") + chunk.replace(b"\r\n.", b"\r\n..")
            at_line_start = chunk.endswith(b"\r\n")


# ---------------------------------------------------------------- envelope
#
# An envelope is one mail's entry in the status: a dict with the original's keys. A recipient is a dict in its To, Cc or
# Bcc. This section is the only code that writes either; keys that it does not know stay as they are. now is passed in,
# in seconds since 1970; a moment is the same as RFC 3339 text.

WAITING, IN_FLIGHT, DELIVERED, GIVEN_UP = "waiting", "in flight", "delivered", "given up"
MOVES = {
    (WAITING, IN_FLIGHT),  # a transaction begins
    (IN_FLIGHT, DELIVERED),  # 2xx
    (IN_FLIGHT, WAITING),  # deferred, or the relay was away
    (IN_FLIGHT, GIVEN_UP),  # the last attempt failed
    (GIVEN_UP, WAITING),  # its file was moved back from .failed
}
STATUS_NUMBERS = {WAITING: 0, IN_FLIGHT: 1, DELIVERED: 2, GIVEN_UP: 2}
MOVES_BY_NUMBER = {(STATUS_NUMBERS[before], after) for before, after in MOVES if before != GIVEN_UP}
FIELDS = ("To", "Cc", "Bcc")
TIME = re.compile(r"(\d{4}-\d\d-\d\dT(?!24)\d\d:\d\d:\d\d)(\.\d+)?(?:Z|([+-])(\d\d):(\d\d))")  # RFC 3339
ADDRESS = operator.itemgetter("Address")
CHANGED = "changed"  # an entry's Stat that may be another mail's
TOO_DEEP = "nested too deeply"  # in place of an entry that Python's JSON refuses
LONGEST_DELAY = 1800  # seconds
MOST_ATTEMPTS = 10**9  # which is also the most that -attempts takes
RECIPIENT_KEYS = {"Address": str, "Status": int, "Attempts": int, "NextAttempt": str, "Error": str}


def format_time(seconds):
    """RFC 3339 text of a time in seconds since 1970."""
    whole, microseconds = divmod(round(seconds * 1_000_000), 1_000_000)
    return f"{whole_second(whole)}.{microseconds:06}Z"


@functools.lru_cache(maxsize=16)  # thousands of mails a second
def whole_second(seconds):
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()[:19]


def parse_time(text):
    """Seconds since 1970 from RFC 3339 text; Go's zero time is far in the past. Raises ValueError."""
    if text[26:] == "Z" and text[7] + text[10] + text[19] == "-T." and text[11:13] < "24":  # format_time() made it
        return datetime.fromisoformat(f"{text[:26]}+00:00").timestamp()
    match = TIME.fullmatch(text)
    if not match:
        raise ValueError(f"not a time: {text}")
    moment, fraction, sign, hours, minutes = match.groups()
    offset = int(f"{sign}1") * (int(hours) * 3600 + int(minutes) * 60) if sign else 0
    return datetime.fromisoformat(f"{moment}+00:00").timestamp() + float(fraction or 0) - offset


def retry_delay(attempts):
    """Seconds until the next attempt: a minute for each one that failed, 30 minutes at most."""
    return min(60 * attempts, LONGEST_DELAY)


def new_envelope(message, now):
    """The entry of a mail that was not seen before; message is a Message, or None when it is not one."""
    sender = message.from_field.encode("utf-8", "replace").decode() if message else ""
    moment, entry = format_time(now), {"From": sender}
    for key in FIELDS:
        addresses = message.recipients[key] if message else []
        entry[key] = addresses and [
            {"Address": address, "Status": 0, "Attempts": 0, "NextAttempt": moment, "Error": ""}
            for address in addresses
        ]
    entry["Attempts"], entry["Enqueued"] = 0, moment
    return entry


def renew(envelope, message, now):
    """The message can be read: an entry from a time when it could not gets its recipients."""
    envelope.pop("Error", None)
    if not recipients(envelope):
        envelope.update({**new_envelope(message, now), "Enqueued": envelope.get("Enqueued", format_time(now))})


def unknown_to(envelope, message):
    """Who is named by the message and not by the entry: its file was replaced."""
    known = {recipient["Address"] for recipient in recipients(envelope)}
    named = [address for addresses in message.recipients.values() for address in addresses]
    return ", ".join(address for address in named if address not in known)


def recipients(envelope):
    """Every recipient's dict, To, Cc and Bcc in turn."""
    return [*(envelope.get("To") or ()), *(envelope.get("Cc") or ()), *(envelope.get("Bcc") or ())]


def state(recipient):
    if recipient["Status"] == 2:
        return GIVEN_UP if recipient["Error"] else DELIVERED
    return IN_FLIGHT if recipient["Status"] == 1 else WAITING


def next_attempt_of(recipient):
    return parse_time(recipient["NextAttempt"])


def state_of_all(envelope):
    """WAITING while anybody is not settled; then GIVEN_UP if anybody was given up, else DELIVERED."""
    whole = DELIVERED
    for recipient in recipients(envelope):
        if recipient["Status"] != 2:
            return WAITING
        if recipient["Error"]:
            whole = GIVEN_UP
    return whole


def has_recipients(envelope):
    """Whether it is an entry with recipients, and not one that only says why a file could not be read."""
    return isinstance(envelope, dict) and any(envelope.get(key) for key in FIELDS)


def is_partly_delivered(envelope):
    """An edit may have made anything of it."""
    return not envelope_problem(envelope) and DELIVERED in map(state, recipients(envelope))


def next_attempt(envelope):
    """When the first waiting recipient is due, in seconds since 1970; 0 when none waits."""
    times = [next_attempt_of(recipient) for recipient in recipients(envelope) if state(recipient) == WAITING]
    return min(times, default=0)


def move(recipient, target, error=""):
    """Take a recipient to another state. Raises ValueError for a move that the state diagram has not."""
    if (recipient["Status"], target) not in MOVES_BY_NUMBER and (state(recipient), target) not in MOVES:
        raise ValueError(f"{recipient['Address']} is {state(recipient)} and cannot become {target}")
    recipient["Status"], recipient["Error"] = STATUS_NUMBERS[target], error


def deferred(recipient, error, now):
    """Back to waiting, an attempt the worse."""
    move(recipient, WAITING, error)
    recipient["Attempts"] += 1
    recipient["NextAttempt"] = format_time(now + retry_delay(recipient["Attempts"]))


def gave_up(recipient, error):
    move(recipient, GIVEN_UP, error or "given up")
    recipient["Attempts"] += 1


def requeue(envelope, now):
    """The file was moved back from .failed: whoever was given up waits again, from the first attempt."""
    for recipient in recipients(envelope):
        if state(recipient) == GIVEN_UP:
            move(recipient, WAITING, recipient["Error"])
            recipient.update(Attempts=0, NextAttempt=format_time(now))


def changed(envelope, message, is_same, now):
    """The entry of a mail whose file was changed while it was out of sight: if it is the same message, who has it
    already has it still. Everybody else is due."""
    has = {recipient["Address"] for recipient in recipients(envelope) if is_same and state(recipient) == DELIVERED}
    fresh = new_envelope(message, now)
    for recipient in recipients(fresh):
        recipient["Status"] = 2 if recipient["Address"] in has else 0
    return fresh


def file_mark(identity):
    """A file's identity for the status file, without the device: that has another number after a reboot."""
    return " ".join(map(str, identity[1:]))


def identity_in(envelope, device):
    """What file_mark() made text of; None if the entry has none."""
    numbers = re.fullmatch(r"(\d{1,20}) (\d{1,20}) (-?\d{1,20})", str(envelope.get("Stat")))
    return numbers and (device, *map(int, numbers.groups()))


def set_file(envelope, identity, message_id=None):
    """The entry remembers its file, and which message that is: either may be touched, moved away, edited."""
    if message_id is not None:
        envelope["MessageID"] = message_id
    envelope["Stat"] = file_mark(identity)


def is_changed(envelope, identity):
    """Whether a file that was out of sight is not what its entry knows; the entry remembers that."""
    if envelope.get("Stat", mark := file_mark(identity)) != mark:
        envelope["Stat"] = CHANGED
    return envelope.get("Stat") == CHANGED


def may_be_anothers(envelope, identity, message_id):
    """Whether its file may be another mail: it has another Message-ID, or was changed out of sight, or when nobody
    waited for it."""
    if message_id and recipients(envelope) and message_id != envelope.get("MessageID", message_id):
        return True
    waits = envelope.get("Stat") != CHANGED and state_of_all(envelope) == WAITING
    return bool(recipients(envelope)) and not waits and is_changed(envelope, identity)


def interrupted(envelope, error=""):
    """What was in flight waits again; without an error it keeps the one that it had."""
    for recipient in recipients(envelope):
        if recipient["Status"] == 1:
            move(recipient, WAITING, error or recipient["Error"])


def envelope_problem(envelope):
    """What is wrong with an entry that was read from a file that people edit; empty when nothing is."""
    if not isinstance(envelope, dict):
        return TOO_DEEP if envelope == TOO_DEEP else "not an object"
    for key in FIELDS:
        some = envelope.get(key) or []
        if not isinstance(some, list):
            return f"{key} is not a list"
        for recipient in some:
            if problem := recipient_problem(recipient):
                return problem
    return ""


def recipient_problem(recipient):
    if not isinstance(recipient, dict):
        return "a recipient is not an object"
    for key, kind in RECIPIENT_KEYS.items():
        if not isinstance(recipient.get(key), kind):
            return f"a recipient's {key} is missing or of the wrong type"
    try:
        parse_time(recipient["NextAttempt"])
    except ValueError as error:
        return str(error)
    if not 0 <= recipient["Attempts"] <= MOST_ATTEMPTS:
        return "a recipient's Attempts are out of range"
    return "" if recipient["Status"] in (0, 1, 2) else "a recipient's Status is not 0, 1 or 2"


def is_of_another(edited, live):
    """Whether these are the entries of two messages."""
    return bool(edited.get("MessageID") and live.get("MessageID")) and edited["MessageID"] != live["MessageID"]


def merge(edited, live, has_news):
    """The edited entry, with what happened since it was written: who is in flight in the live entry stays as he is
    there, and, if it has news that the file does not know, who has the mail. What it knows of its file is newer, too.

    Every recipient of the live entry stays the same dict, since the mail's delivery may hold it.
    """
    known = {}
    for recipient in recipients(live):
        known.setdefault(recipient["Address"], deque()).append(recipient)

    def is_fixed(recipient):
        return state(recipient) == IN_FLIGHT or (has_news and state(recipient) == DELIVERED)

    def merged(recipient):
        if not known.get(recipient["Address"]):
            return recipient
        same = known[recipient["Address"]].popleft()
        if not is_fixed(same):
            same.clear()
            same.update(recipient)
        return same

    for key in FIELDS:
        edited[key] = [merged(recipient) for recipient in edited.get(key) or ()]
    unnamed = {id(recipient) for left in known.values() for recipient in left if is_fixed(recipient)}
    for key in FIELDS:
        edited[key] += [recipient for recipient in live.get(key) or () if id(recipient) in unnamed]
    return {**edited, **{key: live[key] for key in ("MessageID", "Stat") if key in live}}


# ------------------------------------------------------------------- queue
#
# Which mails there are, what each of them waits for, and whose turn it is. Pure: it touches no file, never switches
# greenlets, and now is passed in. What holds:
#
# 1. A mail is in one state, and become() alone changes it, by MOVES_OF_MAILS; any other move raises ValueError.
# 2. mails is the status: the one mail of each path. A mail that LEFT is not in it.
# 3. At rest a mail is its path, as in the status file; while its file is open it is its inode, which the open file
#    pins. known has the mails that are open, and those that somebody has already, here or away.
# 4. A mail in flight is never dropped from outside. Its delivery, however it ends, takes it to another state.
# 5. A reason why a file cannot be sent is added to what is known of its mail; it never replaces an entry.
# 6. Under -rate one mail at most lies between take() and began(); whatever ends it gives its turn back.
# 7. Who is IN_LINE stands in one of the lines; a line may also have mails that are not in line any more.

IN_LINE, FLYING, RESTING, GROUNDED, STUCK, ASIDE, LEFT = STATES = (
    "in line",  # may go now
    "flying",  # its delivery has it
    "resting",  # until it is due
    "grounded",  # until the relay is up
    "stuck",  # until its file changes
    "aside",  # given up: its file is in .failed; or it is held by its user: there is a dot before its name
    "left",  # not here: whoever still holds it lets it go
)
MOVES_OF_MAILS = {
    *((LEFT, new) for new in (IN_LINE, RESTING, ASIDE, FLYING)),  # seen; read from the status file; here again
    *((FLYING, new) for new in (IN_LINE, RESTING, GROUNDED, STUCK, ASIDE, LEFT)),
    *((waits, new) for waits in (RESTING, GROUNDED, STUCK) for new in (IN_LINE, RESTING, FLYING, LEFT)),
    *((IN_LINE, new) for new in (FLYING, LEFT)),
    *((waits, ASIDE) for waits in (IN_LINE, RESTING, GROUNDED, STUCK)),  # put aside just before a crash; held
    *((ASIDE, new) for new in (RESTING, FLYING, LEFT)),
}
AWAY_LIMIT = 1000  # how many partly delivered mails are recognised when they come back


class Mail:
    """One file of the spool, from when its name is seen until it is settled. See Queue."""

    __slots__ = (
        *("path", "state", "due", "entry", "identity", "delivery", "is_open", "seen", "print", "whole", "forced"),
        *("need", "news"),
    )

    def __init__(self, path, entry=None):
        self.path, self.state = path, LEFT
        self.due = 0.0  # until when it rests
        self.entry = entry  # the envelope: a dict in flight, packed at rest; None until it was read
        self.identity = None  # of its file, in flight and where it may be needed later
        self.delivery = None  # that has it; a new one may have, before the greenlet of the one before has ended
        self.is_open = False  # its delivery has the file open, so that no other file can have its inode
        self.seen = None  # signature of the file of a STUCK mail
        self.print = 0  # hash of its file's latest identity; 0 if it was not opened since the start
        self.whole = False  # its file was seen to be closed, or to be moved here
        self.forced = False  # new, or flushed: everybody who waits is due
        self.need = 1  # recipients of its next transaction, as far as that is known
        self.news = 0  # number of the write of the status file that has its latest delivery or giving up; 0 if none

    def envelope(self):
        """To read only, unless the mail is in flight."""
        return unpack(self.entry) if isinstance(self.entry, bytes) else self.entry


class Queue:
    """See the head of this section."""

    def __init__(self):
        self.mails = {}  # path -> Mail
        self.known = {}  # (device, inode) -> Mail, see Mail.identity
        self.away = deque()  # partly delivered mails that LEFT, the latest last
        self.fresh, self.old, self.ahead = deque(), deque(), deque()  # ahead: -rate had too little room for it
        self.old_first = False
        self.taking = None  # under -rate: the mail between take() and began()
        self.times, self.numbers = [], itertools.count()  # a heap of (due, number, mail), some outdated
        self.counts = dict.fromkeys(STATES, 0)
        self.epoch = 1  # number of the next write of the status file
        self.dropped = set()  # paths that the file may know, and whose mail LEFT

    def become(self, mail, state):
        if (mail.state, state) not in MOVES_OF_MAILS:
            raise ValueError(f"{mail.path} is {mail.state} and cannot be {state}")
        self.counts[mail.state] -= 1
        self.counts[state] += 1
        mail.state = state

    # -- which mails there are

    def add(self, path, entry=None):
        """A mail that is not in the queue yet; give it a state."""
        mail = self.mails[path] = Mail(path, entry)
        return mail

    def drop(self, mail):
        """It is settled, or its file is gone."""
        if self.mails.get(mail.path) is mail:
            del self.mails[mail.path]
            self.dropped.add(mail.path)
        self.become(mail, LEFT)
        self.forget(mail)

    def lose(self, mail):
        """Its file is somewhere else. It may come back, and then nobody should get it twice."""
        identity = mail.identity if is_partly_delivered(mail.envelope()) else None
        self.drop(mail)
        if identity:
            mail.identity, mail.entry = identity, pack(mail.path, mail.envelope())
            self.known.setdefault(identity[:2], mail)
            self.away.append(mail)
            if len(self.away) > AWAY_LIMIT and (latest := self.away.popleft()).state == LEFT:
                self.forget(latest)

    def rename(self, mail, path):
        """Its file has another name by now. Another mail of that name is gone; or it is in flight, and gets the name
        that was freed until it finds its own."""
        other, before = self.mails.get(path, mail), mail.path
        if other is not mail and other.state != FLYING:
            self.lose(other)  # it may be held
        if self.mails.get(before) is mail:
            del self.mails[before]
            self.dropped.add(before)
        mail.entry = pack(path, unpack(mail.entry)) if isinstance(mail.entry, bytes) else mail.entry
        mail.path = path
        self.mails[path], mail.news = mail, self.epoch
        if other.state == FLYING and other is not mail and before not in self.mails:
            self.mails[before], other.path, other.news = other, before, self.epoch

    def identify(self, mail, identity):
        """The mail whose file this is; another one, if that was seen under another name.

        A freed inode goes to the next file at once, so at rest only all of the identity tells.
        """
        other = self.known.get(identity[:2], mail)
        if other is not mail and (other.is_open or other.identity == identity):
            return other
        if mail.identity:
            self.forget(mail)
        mail.identity = identity
        self.known[identity[:2]] = mail
        return mail

    def forget(self, mail):
        if mail.identity and self.known.get(mail.identity[:2]) is mail:
            del self.known[mail.identity[:2]]
        mail.identity = None

    def those(self, *states):
        """The mails in these states; whoever goes through the list may change them."""
        some = any(self.counts[state] for state in states)
        return [mail for mail in self.mails.values() if mail.state in states] if some else []

    # -- what each waits for

    def line_up(self, mail, line):
        self.become(mail, IN_LINE)
        line.append(mail)

    def rest(self, mail, until):
        self.become(mail, RESTING)
        mail.due = until
        heapq.heappush(self.times, (until, next(self.numbers), mail))
        if len(self.times) > 100 + 2 * self.counts[RESTING]:
            valid = {time[2]: time for time in self.times if time[2].state == RESTING and time[2].due == time[0]}
            self.times = [*valid.values()]
            heapq.heapify(self.times)

    def next_due(self):
        return self.times[0][0] if self.times else math.inf

    def release(self, now):
        """Whose time has come is in line again."""
        while self.times and self.times[0][0] < now:
            due, _, mail = heapq.heappop(self.times)
            if mail.state == RESTING and mail.due == due:
                self.line_up(mail, self.old)

    def release_grounded(self):
        """The relay is up."""
        for mail in self.those(GROUNDED):
            self.line_up(mail, self.old)

    def look_again(self, due_of):
        """At everything that waits; at its time, which is due_of(mail)."""
        self.times = []
        for mail in self.those(RESTING, GROUNDED, STUCK):
            self.rest(mail, due_of(mail))

    def open_unread(self):
        """Whoever waits for his writer may be looked at now: that he ended may have been missed."""
        for mail in self.those(RESTING):
            if mail.entry is None:
                self.rest(mail, 0.0)

    def flush(self):
        """Everybody is due now."""
        for mail in self.mails.values():
            mail.forced = mail.state != ASIDE
        self.look_again(lambda mail: 0.0)

    # -- whose turn it is

    def take(self, room=math.inf):
        """The next mail, FLYING from now on; None if there is none. room: recipients that may go, under -rate."""
        if self.taking or not (line := self.next_line()) or line[0].need > room:
            return None
        mail = line.popleft()
        self.old_first = not self.old_first  # so that neither waits for all of the other
        self.taking = mail if room != math.inf else None
        self.become(mail, FLYING)
        return mail

    def next_line(self):
        """The line whose first mail is next."""
        for line in (self.ahead, *((self.old, self.fresh) if self.old_first else (self.fresh, self.old))):
            while line and line[0].state != IN_LINE:
                line.popleft()
            if line:
                return line
        return None

    def need(self):
        """How many recipients may have to go at the next turn; 0 when nobody is in line."""
        line = self.next_line()
        return line[0].need if line else 0

    def began(self, mail):
        """Under -rate: it has its turn or needs none. The next may be taken."""
        if self.taking is mail:
            self.taking = None


# ------------------------------------------------------------------ status
#
# The file that the queue's envelopes are kept in, so that no crash makes anybody get a mail twice. What holds:
#
# 1. A write is numbered by queue.epoch as it begins; written is the number of the latest that succeeded. What a mail
#    has news of is on the disk when its news <= written, and not before.
# 2. commit() reads the event before any switch; a write replaces it before it reads the entries.
# 3. A write that forgets entries comes after a sync of the spool: else a power cut could bring back a file of which
#    nobody knows any more who has it.
# 4. pieces() splits at white space that pack() writes, and no value contains.


class CorruptStatus(Exception):
    """The status file is not what it should be; the text says where."""


TALL = json.JSONEncoder(separators=(",\n\t\t\t\t", ": "))  # what indent gives, but from the encoder in C


def pack(path, envelope):
    """An entry as its line and those below it in the status file. Packed entries are small, cost the garbage
    collector nothing, and make a write of the file one join."""
    if isinstance(envelope, dict):
        lines = [f"\n\t\t{json.dumps(key)}: {packed_value(value)}" for key, value in envelope.items()]
        text = f"{{{','.join(lines)}\n\t}}"
    else:
        text = json.dumps(envelope)
    return f"\t{json.dumps(path)}: {text}".encode()


def packed_value(value):
    """Indented if it is a list of recipients; only white space depends on what it is."""
    text = TALL.encode(value)
    if not (text.startswith("[{") and text.endswith("}]")):
        return text
    inner = text[2:-2].replace("},\n\t\t\t\t{", "\n\t\t\t},\n\t\t\t{\n\t\t\t\t")
    return f"[\n\t\t\t{{\n\t\t\t\t{inner}\n\t\t\t}}\n\t\t]"


def unpack(packed):
    try:
        return next(iter(json.loads(b"{" + packed + b"}").values()))
    except RecursionError:  # who read the file had more room on the stack
        return TOO_DEEP


def plain_pattern():
    """Matches what pack() makes of an entry with one recipient who is not in flight, as nearly all are: that takes a
    tenth of the time of JSON and a look at each value."""
    text = r'"([ !#-\[\]-~]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[ !#-\[\]-~]*)*)"'
    values = {"TEXT": text, "STATUS": "([02])", "NUMBER": r"(0|[1-9]\d{0,8})", "NOBODY": r"(?:\[\]|null)"}
    values.update(TIME=r'"(\d{4}-\d\d-\d\dT\d\d:\d\d):([0-5]\d(?:\.\d{1,9})?)Z"', ANY=r"(?:0|[1-9]\d*)")
    person = dict(zip(RECIPIENT_KEYS, ("TEXT", "STATUS", "NUMBER", "TIME", "TEXT")))
    entry = {"From": "TEXT", "To": [person], "Cc": "NOBODY", "Bcc": "NOBODY", "Attempts": "ANY", "Enqueued": "TIME"}
    pattern = re.escape(pack("TEXT", {**entry, "MORE": 0}).decode())
    for mark, value in values.items():
        pattern = pattern.replace(f'"{mark}"', value)
    more = rf'(?:,\n\t\t"(?:MessageID|Stat)": {text.replace("(", "(?:", 1)})*\n\t\}})(?=,\n\t"|\}}?\Z)'
    return re.compile(f"({pattern[: pattern.rindex(',')]}{more}", re.ASCII)


PLAIN_ENTRY = plain_pattern()


def plain(packed):
    """A packed entry's values, if it is plain, else None: the entry itself, its path, From, Address, Status, Attempts,
    the minute and second of NextAttempt, Error, the minute and second of Enqueued. The strings are as in JSON."""
    match = PLAIN_ENTRY.fullmatch(packed.decode("latin-1"))
    return match and match.groups()


def text_in(text):
    """A string of JSON, less its quotes."""
    return json.loads(f'"{text}"') if "\\" in text else text


def file_that_somebody_has(packed, device):
    """The identity of the file of a partly delivered mail, by its packed entry; None if that does not say."""
    if b'"Status": 2' not in packed or not is_partly_delivered(envelope := unpack(packed)):
        return None
    return identity_in(envelope, device)


def read_status(path, owners=None):
    """(path, entry) for each entry of a status file; none when there is no file. Raises CorruptStatus, OSError.

    An entry is plain(), or whatever JSON says. owners: as in distrust()."""
    try:
        with naming_owner(path):
            text = read_state(path, owners)
    except FileNotFoundError:
        return
    except Untrusted as error:
        raise CorruptStatus(error.strerror) from None
    try:
        for part in pieces(text):
            yield from entries_in(part)
    except CorruptStatus:
        yield from parsed(text).items()  # raises, and knows the line


def pieces(text):
    """A JSON object's text as several with some of its entries each, if they stand as this program and the original
    write them: to parse all of a large file at once takes much memory."""
    if not (text.startswith(b'{\n\t"') and text.rstrip().endswith(b"\n}")):
        yield text.strip() or b"{}"
        return
    start, end = 2, text.rindex(b"\n}")
    while (comma := text.find(b',\n\t"', start + CHUNK, end)) >= 0:
        yield b"{" + text[start:comma] + b"}"
        start = comma + 2
    yield b"{" + text[start:end] + b"}"


def entries_in(piece):
    """(path, entry) for each entry in one of pieces(). Raises CorruptStatus."""
    text = piece.decode("latin-1")
    found = PLAIN_ENTRY.findall(text)
    if sum(len(values[0]) + 2 for values in found) == len(text):  # there is nothing else in it
        return [(text_in(values[1]), values) for values in found]
    return parsed(piece).items()


def parsed(text):
    """The JSON object in text. Raises CorruptStatus."""
    try:
        text = text.decode("utf-8-sig", "replace")  # some editors begin a file with a byte order mark
        try:
            entries = json.loads(text)
        except ValueError:  # maybe only since a number has too many digits for Python: that entry is malformed
            entries = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 20 else digits)
    except (ValueError, RecursionError) as error:
        raise CorruptStatus(str(error)) from None
    if not isinstance(entries, dict):
        raise CorruptStatus("not a JSON object")
    return entries


def status_text(packed):
    """The chunks of a status file: made one by one in the thread that writes, so that nobody else has to wait."""
    yield b"{"
    for start in range(0, len(packed), 500):
        yield (b",\n" if start else b"\n") + b",\n".join(packed[start : start + 500])
    yield b"\n}\n" if packed else b"}\n"


class Status:
    """Loads, reloads and saves the queue's entries. See the head of this section."""

    def __init__(self, queue, spool):
        self.queue, self.spool, self.path = queue, spool, spool.status_path
        self.thawed = gevent.event.Event()  # clear while suspended: nothing is written
        self.thawed.set()
        self.wanted, self.urgent = gevent.event.Event(), gevent.event.Event()
        self.written = 0
        self._saved = gevent.event.Event()
        self._writing = gevent.lock.BoundedSemaphore()
        self._cost = 0.0
        self.complaint = ""  # why it cannot be written
        self.on_news = lambda: None  # called when that changes

    # -- reading

    def load(self):
        """Read the file; a file that is not there is an empty status. Raises CorruptStatus, OSError."""
        home, held = look(os.path.realpath(self.spool.directory)), ()
        with contextlib.suppress(OSError):  # what is at their paths by now may be other mails
            held = self.spool.held()
        for path, packed in self._read("the daemon was killed in mid-transaction: the mail may have arrived"):
            if path not in self.queue.mails:
                state = ASIDE if path in held else self._at_rest(path)
                self.queue.become(mail := self.queue.add(path, packed), state)
                if home and (known := file_that_somebody_has(packed, home.st_dev)):
                    self.queue.identify(mail, known)

    def reload(self):
        """Read the file again: it is the truth, but for what happened since it was written.

        Entries that are not in the file stay, as in the original. Raises CorruptStatus, OSError and changes nothing.
        """
        with self._writing:
            entries = self._read()
        for path, packed in entries:
            if path in self.queue.dropped:
                continue  # that mail has left since, even if there is another one of its name
            if mail := self.queue.mails.get(path):
                self._merge(mail, packed)
            else:
                self.queue.become(self.queue.add(path, packed), self._at_rest(path))
        self.wanted.set()

    def _at_rest(self, path):
        return ASIDE if os.path.dirname(path) == self.spool.failed else RESTING

    def _read(self, error=""):
        entries, others = [], []
        for path, envelope in self.spool.at_home(read_status(self.path)):
            if not self.spool.may_be_mail(path):
                others.append(path)
                continue
            if isinstance(envelope, tuple):
                if envelope[4] == "0" and text_in(envelope[1]) == path:
                    entries.append((path, envelope[0].encode()))
                    continue
                envelope = unpack(envelope[0].encode())
            if not envelope_problem(envelope):
                interrupted(envelope, error)
                if error and state_of_all(envelope) == GIVEN_UP and (moved := self._moved_back(path)):
                    requeue(envelope, moved)
            entries.append((path, pack(path, envelope)))
        if others and not entries:
            raise CorruptStatus(f"it names no mail of this spool, but {others[0]}")
        if others:
            log(f"{self.path} names {len(others)} files that are no mails of this spool, ignored: {others[0]}")
        return entries

    def _moved_back(self, path):
        """When a mail of the spool that was given up was moved, if that was after the last write; it had been moved to
        .failed just before a crash, or was not yet: in doubt it is tried again."""
        status, written = look(path), look(self.path)
        here = status and written and os.path.dirname(path) == self.spool.directory
        return status.st_ctime if here and status.st_ctime_ns > written.st_ctime_ns else 0

    def _merge(self, mail, packed):
        is_live, has_news = isinstance(mail.entry, dict), mail.news > self.written
        if not (is_live or has_news):
            mail.entry = packed
        elif not envelope_problem(envelope := unpack(packed)):
            if is_of_another(envelope, mail.envelope()):  # which had this name when the file was written
                return log(f"{named(mail.path)} is another mail by now: its entry in the status file is ignored")
            merged = merge(envelope, mail.envelope(), has_news)
            if is_live:  # its delivery holds this very dict
                mail.entry.update(merged)
            else:
                mail.entry = pack(mail.path, merged)

    def set_aside(self, now, error):
        """Move a corrupt file out of the way, and say so."""
        log(f"corrupt status file {self.path}, {error}: {set_aside(self.path, now)}")

    # -- writing

    def save(self):
        """Write the file: aside, to the disk, then in place of the old one. Says once that it cannot."""
        with self._writing:
            if self.thawed.is_set():
                self._save()

    def _save(self):
        started, queue = time.monotonic(), self.queue
        saved, self._saved = self._saved, gevent.event.Event()
        epoch, queue.epoch = queue.epoch, queue.epoch + 1
        dropped, queue.dropped = queue.dropped, set()
        self.wanted.clear()
        self.urgent.clear()
        try:
            if self.is_inside() and not self.spool.is_home():  # what is mounted there by now has a status of its own
                raise self.spool.away()
            off_the_hub(write_status, self.path, self._packed(), self.spool.directory if dropped else "")
            self.written = epoch
            self._complain("")
        except Exception as error:  # noqa: BLE001 -- whatever it is, mails wait for this write
            queue.dropped |= dropped
            self.wanted.set()
            self._complain(describe(error))
        self._cost = time.monotonic() - started
        saved.set()

    def _packed(self):
        known = [mail for mail in self.queue.mails.values() if mail.entry is not None]
        return [pack(mail.path, mail.entry) if isinstance(mail.entry, dict) else mail.entry for mail in known]

    def _complain(self, reason):
        if self.complaint != reason:
            self.complaint = reason
            if reason:
                log(f"unable to write status file, {reason} (it is tried again)")
            self.on_news()

    def is_inside(self):
        """Whether the file is in the spool, and goes where that goes."""
        return os.path.dirname(self.path) == self.spool.directory

    def knows_all(self):
        """Whether the latest write succeeded, and nothing has changed since."""
        return self.written == self.queue.epoch - 1 and not self.wanted.is_set()

    def commit(self, mail):
        """Whether the file knows what the mail has news of; waits for a write if it does not, unless suspended."""
        if mail.news > self.written and self.thawed.is_set():
            saved = self._saved
            self.wanted.set()
            self.urgent.set()
            saved.wait()
        return mail.news <= self.written

    def keep_saving(self):
        """Write what changed, for ever: no more often than the file's size warrants."""
        while True:
            self.wanted.wait()
            gevent.sleep(self._cost)
            self.urgent.wait(SAVE_SECONDS + 9 * self._cost)
            self.thawed.wait()
            self.save()

    def freeze(self, save=True):
        """Suspended: write once more, then nothing until thaw()."""
        if save:
            self.save()
        self.thawed.clear()
        self._saved.set()

    def thaw(self):
        if not self.thawed.is_set():  # else somebody may wait for that event
            self._saved = gevent.event.Event()
            self.thawed.set()
        self.wanted.set()


def hidden(path, suffix):
    """A name beside path that begins with a dot, so that it is never taken for a mail."""
    directory, name = os.path.split(path)
    return os.path.join(directory, "." + name.lstrip(".") + suffix)


def write_status(path, packed, forgetful):
    """forgetful: the directory whose removals must be on the disk before the file forgets about them, if any."""
    if forgetful:
        with contextlib.suppress(FileNotFoundError):  # nothing can come back to it
            sync_directory(forgetful)
    write_durably(path, status_text(packed))


def write_durably(path, chunks):
    """Replace a file's content so that a crash leaves the old one or the new one, whole. Mode 0600."""
    with at(path) as (name, directory):
        temporary, handle = draft(name, directory)
        try:
            with open(handle, "wb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(handle)
            os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:  # half a file on a full disk is room that mails may need
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            raise
    sync_directory(os.path.dirname(path))


def draft(name, directory):
    """(name, descriptor) of a new file beside it. Raises OSError."""
    unforeseen = hidden(name, f".new-{os.urandom(8).hex()}")  # for when somebody lays a trap under the usual name
    for temporary in (hidden(name, ".new"), unforeseen):
        with contextlib.suppress(OSError):  # left by a crash
            os.unlink(temporary, dir_fd=directory)
        with contextlib.suppress(FileExistsError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_CAREFULLY
            return temporary, os.open(temporary, flags, 0o600, dir_fd=directory)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), unforeseen)


# State files: who may write the spool may also plant these, or swap them at any moment. So each is opened once, by its
# directory's descriptor, and what was opened is looked at before anything is read from it or written to it.


def open_flags(names):
    return sum(getattr(os, f"O_{name}", 0) for name in names.split())


OPEN_CAREFULLY = open_flags("NOFOLLOW NONBLOCK NOCTTY CLOEXEC BINARY")
OPEN_DIRECTORY = open_flags("DIRECTORY CLOEXEC")


class Untrusted(OSError):
    """A state file, or .failed, that others may have made or may change; strerror says why."""


@contextlib.contextmanager
def at(path):
    """(name, descriptor of its directory): what is done with these is done there, whatever is renamed meanwhile.

    (path, None) where the system has no such calls. Raises OSError.
    """
    if os.open not in os.supports_dir_fd:  # Windows
        yield path, None
        return
    directory, name = os.path.split(path)
    with closed_after(os.open(directory or ".", os.O_RDONLY | OPEN_DIRECTORY | open_flags("PATH"))) as handle:
        yield name, handle


@contextlib.contextmanager
def closed_after(handle):
    try:
        yield handle
    finally:
        with contextlib.suppress(OSError):  # what was done is done; gevent asks for the status first, which may fail
            os.close(handle)


def distrust(status, directory, owners=None, is_right=stat.S_ISREG):
    """What is wrong with a state file, or with .failed; None if nothing is.

    directory: the descriptor of the one it is in; None where files have no owners. owners: the numbers of the users
    to trust, by default ours and root's. is_right: whether a mode is that of the right kind of file.
    """
    mode = status.st_mode
    if not is_right(mode):
        return f"it is {'a symbolic link' if stat.S_ISLNK(mode) else 'not of the right kind'}"
    if is_right is stat.S_ISREG and status.st_nlink > 1:
        return f"it has {status.st_nlink} names"
    if is_right is stat.S_ISREG and status.st_size > STATE_LIMIT:
        return f"it is larger than {STATE_LIMIT >> 20} MB"
    if directory is not None and status.st_uid not in (owners or ourselves()):
        return f"it belongs to {user_name(status.st_uid)}"
    if directory is not None and mode & 0o022 & (os.fstat(directory).st_mode & 0o011) << 1:  # those who get that far
        return "others may write it"
    return None


def ourselves():
    return {os.geteuid(), 0}


def open_state(path, flags=os.O_RDONLY, owners=None, is_right=stat.S_ISREG):
    """The descriptor of a state file. owners, is_right: as in distrust(). Raises Untrusted, OSError."""
    with at(path) as (name, directory):
        try:
            handle = os.open(name, flags | OPEN_CAREFULLY, 0o600, dir_fd=directory)
        except OSError as error:
            status = look(name, directory)
            if problem := status and distrust(status, directory, owners, is_right):
                raise Untrusted(error.errno, problem, path) from None
            raise OSError(error.errno, error.strerror, path) from None
        if problem := distrust(os.fstat(handle), directory, owners, is_right):
            os.close(handle)
            raise Untrusted(errno.EPERM, problem, path)
        return handle


def read_state(path, owners=None):
    """The content of a state file, as long as it is now. Raises Untrusted, OSError."""
    with open(open_state(path, owners=owners), "rb") as file:
        return file.read(os.fstat(file.fileno()).st_size)


def set_aside(path, now):
    """Move a state file that is no good out of the way. Returns what came of it, to be said."""
    moment = datetime.fromtimestamp(now, timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    try:
        with at(path) as (name, directory):
            suffixes = itertools.chain([""], map(".{}".format, itertools.count(1)))
            asides = (hidden(name, f".corrupt-{moment}{suffix}") for suffix in suffixes)
            aside = next(each for each in asides if not look(each, directory))
            os.rename(name, aside, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError as problem:
        return describe(problem)
    return f"moved to {os.path.join(os.path.dirname(path), aside)}"


def move_anew(path, target, directory):
    """Rename path to target's name, in a directory (its descriptor) that only we may write. Raises FileExistsError
    rather than replace anything, OSError."""
    name = target if directory is None else os.path.basename(target)
    with contextlib.suppress(AttributeError, TypeError):  # not every system has renameat2(2)
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        if rename(-100, os.fsencode(path), directory, os.fsencode(name), 1) == 0:  # AT_FDCWD, RENAME_NOREPLACE
            return
        if (error := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS):  # nor every file system
            raise OSError(error, os.strerror(error), path)
    if look(name, directory):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
    os.rename(path, name, dst_dir_fd=directory)


def off_the_hub(function, *arguments):
    """Call, in a thread, what would hold up everybody else. Returns and raises what the function does.

    Raises OSError when there can be no thread now.
    """
    quiet = gevent.util.wrap_errors(Exception, function)  # gevent prints an exception that leaves its thread
    try:
        result = gevent.get_hub().threadpool.apply(quiet, arguments)
    except RuntimeError as problem:
        raise OSError(errno.EAGAIN, f"no thread: {problem}") from None
    if isinstance(result, Exception):
        raise result
    return result


def sync_directory(path):
    """Make what was renamed or removed in it last through a power cut, where directories can be synced."""
    if os.name == "posix":
        with closed_after(os.open(path or ".", os.O_RDONLY | OPEN_DIRECTORY)) as handle:
            os.fsync(handle)


def describe(error):
    """One line of text for an exception."""
    if isinstance(error, OSError) and error.strerror:
        name = f": {os.fspath(error.filename)}" if error.filename else ""
        return f"{error.strerror}{name}"
    return str(error) or type(error).__name__


def reason_of(error):
    """Why an OSError came, without the path, unless that is another's fault."""
    return describe(error) if isinstance(error, Untrusted) else error.strerror


# ------------------------------------------------------------------- spool
#
# The directory: list it, open a mail, remove it or put it aside, watch it. What holds:
#
# 1. Only ENOENT and ENOTDIR mean that something is not there. Any other error says nothing, and is raised.
# 2. Between the look that shows that a name is still the mail's file, and unlink or rename, no greenlet switches.


class NotAMail(Exception):
    """This name is no regular file; the text says so."""


class Locked(Exception):
    """Another process has the spool; the text says which."""


def look(path, directory=None):
    """The status of a path itself (os.lstat); None when it is gone. Raises OSError when that is not to be known."""
    try:
        return os.lstat(path, dir_fd=directory)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # no file has such a name: an edit made it
        return None


def identity(status):
    """What tells that a name is still the same file with the same content."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def signature(status):
    """What changes whenever a file, its content or its permissions do."""
    return status and identity(status) + (status.st_ctime_ns, status.st_mode)


def modified(path):
    """When a file was written last, in seconds since 1970; 0 when it is gone, or is no regular file. Raises OSError."""
    status = look(path)
    return status.st_mtime if status and stat.S_ISREG(status.st_mode) else 0.0


def lease_refused(handle):
    """Whether somebody has the file open for writing; None where the system cannot say (fcntl(2), F_SETLEASE)."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return None
    try:
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:  # not our file, or a file system without leases
        return None
    return False


def is_being_written(refused, status, now, whole):
    """Whether a file has to wait. refused: what lease_refused() says; whole: whether it was seen to be closed.

    A lease that is refused means that somebody writes the file, or that it lies on NFS or CIFS, where they are refused
    for ever. So a file that nobody changed for long is believed to be whole in any case.
    """
    if refused:
        return abs(now - status.st_ctime) < UNCLOSED_SECONDS
    return refused is None and not whole and abs(now - status.st_mtime) < QUIET_SECONDS


def whole_at_birth(path):
    """A file that turns up is open in its writer's hands, unless it is another link to what was there before."""
    status = os.lstat(path)
    return not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_ctime_ns != status.st_mtime_ns


def write_at(handle, text, position):
    """os.pwrite(), which is not on Windows."""
    os.lseek(handle, position, os.SEEK_SET)
    return os.write(handle, text.encode("utf-8", "replace"))


FLOCK = "hhqqi4x"  # struct flock of Linux: type, whence, start, length, pid


def flock(start, length):
    return struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)


def msvcrt_lock(handle, mode):
    os.lseek(handle, 2**30, os.SEEK_SET)  # far behind the text: nobody else can read what is locked there
    msvcrt.locking(handle, mode, 1)


def take_lock(handle):
    """Lock a file for this process. Raises OSError.

    A POSIX lock ends when any descriptor of the file is closed; one of the open file description (F_OFD_SETLK) does
    not, but has no pid to be asked for. So its first octet gets the one, and the rest the other. Either keeps out a
    program that wants a POSIX lock on the whole file, as older versions of this one do.
    """
    if not fcntl:
        return msvcrt and msvcrt_lock(handle, msvcrt.LK_NBLCK)
    length = 0
    if sys.platform == "linux":
        try:
            fcntl.fcntl(handle, fcntl.F_OFD_SETLK, flock(1, 0))
            length = 1
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise
    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, length)


def is_free(handle):
    """Whether no process has locked this file, for msvcrt."""
    try:
        msvcrt_lock(handle, msvcrt.LK_NBLCK)
    except OSError:
        return False
    msvcrt_lock(handle, msvcrt.LK_UNLCK)
    return True


def lock_holder(handle, pid):
    """The process that has locked this file (F_GETLK); 0 if none has, -1 if it is not known here by a number: it may be
    in another container. Where that cannot be asked: pid, if it lives."""
    if not fcntl:  # Windows can only try; os.kill(pid, 0) would be a Ctrl-C there
        return pid if msvcrt and not is_free(handle) else 0
    if sys.platform == "linux":
        for length in (1, 0):
            lock = struct.unpack(FLOCK, fcntl.fcntl(handle, fcntl.F_GETLK, flock(0, length)))
            if lock[0] != fcntl.F_UNLCK:
                return lock[4] if lock[4] > 0 else -1
        return 0
    try:
        os.kill(pid, 0)
    except OSError as error:
        return pid if error.errno == errno.EPERM else 0
    return pid


@contextlib.contextmanager
def naming_owner(path):
    """An OSError says whose file it is; of the directory, while there is no such file."""
    try:
        yield
    except Untrusted as error:
        user = os.stat(os.path.dirname(path)).st_uid
        if user and user not in ourselves() and user == os.lstat(path).st_uid:
            error.strerror += f", run this as {user_name(user)}"
        raise
    except OSError as error:
        shown, owner = whose(path)
        raise OSError(error.errno, f"{error.strerror}{owner}", shown) from None


def whose(path):
    """(path, whom it belongs to), for an error; of the directory, if the file is not there or not to be seen."""
    for shown in (path, os.path.dirname(path)):
        with contextlib.suppress(OSError):
            return shown, f" (it belongs to {user_name(os.lstat(shown).st_uid)})"
    return shown, ""


def user_name(uid):
    """The name of a user, else his number."""
    with contextlib.suppress(ImportError, KeyError):
        import pwd  # not on Windows

        return pwd.getpwuid(uid).pw_name
    return uid


def int_or_zero(text):
    return int(text) if re.fullmatch(r"[0-9]{1,18}", str(text or "")) else 0


def facts_in(lock):
    """The first line of a lock's octets, and the facts in the others as a dict."""
    text, end, _ = lock.decode("utf-8", "replace").partition("\n\n")
    word, *lines = text.split("\n")
    lines += [] if end else ["trouble: the lock file cannot be written"]
    return word, dict(line.partition(": ")[::2] for line in lines)


def absolute(path):
    """os.path.abspath(). Raises OSError that says whose fault it is."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError as error:
        raise OSError(error.errno, "the current directory was removed", path) from None


class Spool:
    """See the head of this section."""

    def __init__(self, directory, status_path=""):
        self.directory = absolute(directory)
        self.failed = os.path.join(self.directory, ".failed")
        self.status_path = self._here(absolute(status_path or os.path.join(self.directory, ".spoolgore.js")))
        self.owners = None  # whose state files are to be trusted, as in distrust()
        self._lock = self._home = self._lock_id = None
        self.published = None  # what publish() let others know last

    def _here(self, path):
        """The path by the name that the spool was given, if it leads there by another."""
        parent, name = os.path.split(path)
        return self.path(name) if os.path.realpath(parent) == os.path.realpath(self.directory) else path

    def path(self, name):
        return f"{self.directory}{os.sep}{name}"

    def at_home(self, entries):
        """(path, entry) pairs of a status file with paths as this spool has them: the directory may have been moved,
        or be reached by another name than before, and nobody should get a mail twice for it. Raises OSError."""
        homes = {self.directory: self.directory, self.failed: self.failed}  # where what was in a directory is now
        for path, entry in entries:
            parent, _, name = path.rpartition(os.sep)
            if parent not in homes:
                homes[parent] = self._home_of(parent)
            yield (path if homes[parent] == parent else f"{homes[parent]}{os.sep}{name}"), entry

    def _home_of(self, parent):
        is_failed = os.path.basename(parent) == ".failed"
        spool = os.path.dirname(parent) if is_failed else parent
        if look(spool) and os.path.realpath(spool) != os.path.realpath(self.directory):
            return parent
        return self.failed if is_failed else self.directory

    # -- what is there

    def named(self, names):
        """The paths of those names that a mail may have."""
        prefix = self.path("")
        return [path for name in names if name and name[0] != "." and (path := prefix + name) != self.status_path]

    def may_be_mail(self, path):
        """Whether a path of the status file is one of the spool, or of what was given up."""
        parent, _, name = path.rpartition(os.sep)
        return parent in (self.directory, self.failed) and bool(self.named([name]))

    def list(self):
        """The paths of the files and sub-directories. Raises OSError."""
        return self.named(os.listdir(self.directory))

    def list_failed(self):
        """The paths of what was given up. Raises Untrusted, OSError."""
        try:
            with self._opened_failed() as handle:
                names = os.listdir(self.failed if handle is None else handle)
        except FileNotFoundError:
            return []
        return [f"{self.failed}{os.sep}{name}" for name in names]

    def _opened_failed(self):
        """A context with the descriptor of .failed, if only we may write that directory. Raises Untrusted, OSError."""
        if os.open not in os.supports_dir_fd:  # Windows
            return contextlib.nullcontext()
        return closed_after(open_state(self.failed, os.O_RDONLY | OPEN_DIRECTORY, self.owners, stat.S_ISDIR))

    def mails(self):
        """The paths of the regular files. Raises OSError."""
        with os.scandir(self.directory) as entries:
            return self.named([entry.name for entry in entries if entry.is_file(follow_symlinks=False)])

    def held(self):
        """The paths without the dot that their users put before the names. Raises OSError."""
        paths = {self.path(name[1:]) for name in os.listdir(self.directory) if name[0] == "."}
        return {path for path in paths if self.is_held(path)}

    def is_held(self, path):
        """Whether a file has the name of that mail with a dot before it, and is none of ours. Raises OSError."""
        aside = hidden(path, "")
        is_ours = os.path.basename(aside).startswith(".spoolgore.") or aside == self.status_path
        return not is_ours and bool(status := look(aside)) and stat.S_ISREG(status.st_mode)

    # -- the lock

    def owner(self):
        """The facts of the daemon that has the lock, as it published them, and its pid, which is -1 if it is not to be
        reached from here; None when there is none. Asks, and takes nothing. Raises Untrusted, OSError."""
        try:
            handle = open_state(self.path(".spoolgore.lock"), owners=self.owners)
        except FileNotFoundError:
            return None
        with open(handle, "rb") as file:
            word, facts = facts_in(file.read())
            pid = lock_holder(handle, int_or_zero(word.strip()))
            return {"pid": str(pid), **facts} if pid else None

    def holder(self):
        """The number of the user whose process has locked a lock of his own, if that is to be known (Linux)."""
        path = self.path(".spoolgore.lock")
        with contextlib.suppress(OSError):
            user = os.lstat(path).st_uid
            with open(open_state(path, owners={user}), "rb") as file:
                if os.stat(f"/proc/{lock_holder(file, 0)}").st_uid == user:
                    yield user

    def lock(self):
        """Make this process the only one that sends from here. Returns the facts of the daemon before us. Raises
        Locked, Untrusted, OSError."""
        path, previous = self.path(".spoolgore.lock"), self._lock
        with naming_owner(path):
            handle = open_state(path, os.O_RDWR | os.O_CREAT, self.owners)
            if previous is not None and os.path.samestat(os.fstat(handle), os.fstat(previous)):
                os.close(handle)
                handle = previous
            self._take(handle, path)
            if previous not in (None, handle):
                os.close(previous)
            status = os.fstat(handle)
            self._lock, self._lock_id, self._home = handle, (status.st_dev, status.st_ino), os.stat(self.directory)
            os.lseek(handle, 0, os.SEEK_SET)
            before = facts_in(os.read(handle, CHUNK))[1]
        self.publish({})
        return before

    def _take(self, handle, path):
        """Raises Locked, OSError; then the handle is closed."""
        try:
            take_lock(handle)
        except OSError as error:
            os.lseek(handle, 0, os.SEEK_SET)
            word = os.read(handle, 32).decode("ascii", "replace").partition("\n")[0].strip()
            pid = lock_holder(handle, 0)
            os.close(handle)
            if fcntl and error.errno not in (errno.EAGAIN, errno.EACCES):
                raise OSError(error.errno, f"{error.strerror} (it cannot be locked)", path) from None
            raise Locked(f"spool directory {self.directory} is in use by pid {pid if pid > 0 else word}") from None

    def publish(self, facts):
        """Let owner() know, in ``key: value`` lines below the pid; an empty line ends them while they are written."""
        self.published = facts
        lines = [str(os.getpid()), *(f"{key}: {one_line(value)}" for key, value in facts.items()), "", ""]
        with contextlib.suppress(OSError):  # a full disk: it is locked all the same
            os.ftruncate(self._lock, write_at(self._lock, "\n".join(lines), 0))

    def still_locked(self):
        """Whether the lock is there: it may have been removed, or the directory with it. Raises OSError."""
        status = look(self.path(".spoolgore.lock"))
        return status is not None and os.path.samestat(status, os.fstat(self._lock))

    def look(self, path):
        """look(), but that the whole directory may be away says nothing of what is in it. Raises OSError."""
        status = look(path)
        if status is None and not self.still_locked():
            raise self.away()
        return status

    def away(self):
        return FileNotFoundError(errno.ENOENT, "it is away or was made again", self.directory)

    def is_home(self):
        """Whether the directory is the one that was locked, if it was. Raises OSError."""
        return not self._home or os.path.samestat(os.stat(self.directory), self._home)

    # -- one mail's file

    def open(self, path):
        """(file, lease_refused(), its status). Raises FileNotFoundError, NotAMail, or another OSError."""
        try:
            handle = os.open(path, os.O_RDONLY | OPEN_CAREFULLY)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
                raise NotAMail("not a regular file, ignored") from None
            if error.errno == errno.EACCES and (status := look(path)) and stat.S_ISDIR(status.st_mode):
                raise NotAMail("") from None  # Windows opens no directory
            if error.errno == errno.ENOTDIR:
                raise FileNotFoundError(errno.ENOENT, error.strerror, path) from None
            raise
        refused, status = lease_refused(handle), os.fstat(handle)  # in this order: the writer has ended
        if stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) != self._lock_id:
            return io.FileIO(handle), refused, status
        os.close(handle)
        if stat.S_ISREG(status.st_mode):
            take_lock(self._lock)  # as much of it as that has ended
            raise NotAMail("is the lock by another name, ignored")
        raise NotAMail("" if stat.S_ISDIR(status.st_mode) else "not a regular file, ignored")

    def names(self, known):
        """Every name in the spool of the file of this identity. Raises OSError."""
        with os.scandir(self.directory) as entries:
            names = [entry.name for entry in entries if entry.inode() == known[1]]
        return [path for path in self.named(names) if self.leads_to(path, known)]

    def links(self, path, known):
        """How many names the file of this identity has by now; 0 if the path is none of them, or its content changed.
        Raises OSError."""
        try:
            status = os.lstat(path)
        except OSError:
            status = self.look(path)
        return status.st_nlink if status and identity(status) == known else 0

    @staticmethod
    def leads_to(path, known):
        """Whether a path is a name of the file of this identity. Raises OSError."""
        status = look(path)
        return status is not None and identity(status) == known

    def name_of(self, file, known):
        """The path that an open file has by now in the spool, if it has any. Raises OSError."""
        with contextlib.suppress(OSError, ValueError):  # the kernel knows, where there is /proc and the file is open
            name = os.path.basename(os.readlink(f"/proc/self/fd/{file.fileno()}"))
            if self.named([name]) and self.leads_to(self.path(name), known):
                return self.path(name)
        names = self.names(known) or self.names(known)  # a listing may just miss it
        return names[0] if names else None

    def failed_path(self, path):
        return f"{self.failed}{os.sep}{path.rpartition(os.sep)[2]}"

    def failed_paths(self, path):
        """Where a mail may lie in .failed: under its own name, or one with a number."""
        yield self.failed_path(path)
        name = os.fsencode(os.path.basename(path))
        for suffix in (b".%d" % number for number in itertools.count(1)):
            yield os.path.join(self.failed, os.fsdecode(name[: NAME_LIMIT - len(suffix)] + suffix))

    def put_aside(self, path):
        """Move a mail that was given up to .failed; returns its new path. Raises Untrusted, OSError."""
        if not look(self.failed):
            os.mkdir(self.failed, 0o700)
            sync_directory(self.directory)  # or a power cut may take it away, and with it what is moved there
        with self._opened_failed() as handle:
            for target in self.failed_paths(path):
                with contextlib.suppress(FileExistsError):
                    move_anew(path, target, handle)
                    return target

    def sync(self):
        """Make what was put aside last through a power cut."""
        sync_directory(self.failed)
        sync_directory(self.directory)


class Watch:
    """The names that turn up in a directory, by inotify(7). Raises OSError where it is not to be had."""

    ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE = 0x4, 0x8, 0x40, 0x80, 0x100
    DELETE_SELF, MOVE_SELF = 0x400, 0x800
    OVERFLOW, IGNORED, ONLYDIR = 0x4000, 0x8000, 0x1000000
    LOST = OVERFLOW | DELETE_SELF | MOVE_SELF | IGNORED | ATTRIB

    def __init__(self, directory, lock):
        """lock: a file in it whose removal is noticed too, as ATTRIB (it has a link less)."""
        libc = None if msvcrt else ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "inotify_init1"):
            raise OSError(errno.ENOSYS, "this system has none")
        self.handle = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        wanted = self.CLOSE_WRITE | self.MOVED_FROM | self.MOVED_TO | self.CREATE | self.ONLYDIR
        wanted |= self.DELETE_SELF | self.MOVE_SELF
        for path, mask in ((directory, wanted), (lock, self.ATTRIB)):
            if self.handle < 0 or libc.inotify_add_watch(self.handle, os.fsencode(path), mask) < 0:
                self.close()
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def wait(self):
        """The next (mask, name) events, when there are any. Raises OSError."""
        gevent.socket.wait_read(self.handle)
        data, events = os.read(self.handle, 65536), []
        while data:
            _, mask, _, length = struct.unpack_from("iIII", data)
            events.append((mask, os.fsdecode(data[16 : 16 + length].rstrip(b"\0"))))
            data = data[16 + length :]
        return events

    def close(self):
        if self.handle >= 0:
            os.close(self.handle)
        self.handle = -1


# ------------------------------------------------------------------- relay
#
# The SMTP conversation, and the store of connections. What holds:
#
# 1. An octet that was not asked for is found before the next command is sent. Else a stray 250 becomes its answer.
# 2. A mail is delivered to a recipient if every reply that concerns it is 2xx, and as many came as were asked for.
# 3. A transaction is made again, uncounted, only if the relay had gone before it (nothing was answered), or if an
#    extension is not used any more the next time. The second time is careful: no content before the relay's word.
# 4. What went wrong with a relay is not used again with it until it was down, or an hour is over.

ERROR_LIMIT = 1024  # octets of a relay's words that are kept
REPLY_LIMIT = 64 * 1024  # octets of one reply, all its lines; and of what the password command prints
EHLO_LINES, REPLY_LINES = 250, 100  # more lines than this are no reply
SHUNNED_SECONDS = 3600  # an extension that went wrong with a relay is not used for so long
FINAL_REPLY_SECONDS = 600  # RFC 5321 4.5.3.2.6
ATTEND_SECONDS = 0.5  # how often connections are looked after: so much later may a time limit strike
IDLE_SECONDS = 5  # then an unused connection is closed
FRESH_SECONDS = 1  # a connection unused for longer is asked before content is sent
LAST_WORDS_SECONDS = 1  # for what a relay said before it stopped listening
CONNECTION_SECONDS = 300  # a connection's life
LOGIN_PROBE_SECONDS = 1800  # between two dials to a relay that refuses the login, at the longest
SILENT_SECONDS = 60  # a relay of which nothing was heard for so long, and that takes no connection, is down
CAP_SECONDS = 30  # how long a relay's limit on connections is believed

MAYBE = ": the mail may have arrived"
SURPLUS = "the relay said more than it was asked for"
REPLY = re.compile(rb"((?:[2-5]\d\d-[^\n]*\n)*)([2-5]\d\d)(?: [^\n]*|\r)?\n")  # RFC 5321 4.2.1
BEGUN_REPLY = re.compile(rb"(?:[2-5]\d\d-[^\n]*\n)*[^\n]*")
NO_BDAT = (500, 502, 503, 504)  # what a relay says that does not know this command, whatever it offers
NO_MECHANISM = (500, 502, 504)
EXTENSIONS = ("CHUNKING", "PIPELINING")
IS_OK = operator.attrgetter("ok")  # of a reply
OURS_ALONE = ("SPOOLGORE_", "NOTIFY_SOCKET", "WATCHDOG_")  # how the variables begin that no command of ours gets
# What a connection raises that nobody is at the other end of. A relay that is silent, or talks nonsense, is there, and
# may still act on what it was sent.
GONE = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
# Paths, a line each, that stand in MAIL and RCPT as they are.
PLAIN_PATHS = re.compile(rf"(?:(?:{PLAIN.pattern})?\n)+", re.ASCII)


class Verdict(enum.Enum):
    """What a transaction did for one recipient."""

    DELIVERED = "delivered"
    DEFERRED = "deferred"
    REFUSED = "refused"
    AGAIN = "again"  # the relay takes no more recipients in this transaction


class Outcome(NamedTuple):
    verdict: Verdict
    text: str = ""


class RelayDown(Exception):
    """No relay can be used now, which is no fault of any mail; the text says why."""


class RelayError(OSError):
    """The conversation cannot go on."""


class RelayRefused(RelayError):
    """The relay is there, and does not want this connection."""


class LoginRefused(RelayError):
    """The relay does not accept the user or the password."""


class Silence(RelayError):
    """A reply did not come in time."""


class Surplus(RelayError):
    """The relay said something that it was not asked for."""


class Repeat(Exception):
    """The transaction is to be made again, on another connection, carefully."""


class Reply(NamedTuple):
    """An SMTP reply (RFC 5321 4.2): its code, all its lines' text, and whether it is 2xx."""

    code: int
    text: str
    ok: bool

    def __str__(self):
        return f"{self.code} {self.text}"

    @property
    def verdict(self):
        """530 asks for a login (RFC 4954 6): no fault of the mail."""
        return Verdict.REFUSED if 500 <= self.code < 600 and self.code != 530 else Verdict.DEFERRED


@functools.lru_cache(maxsize=64)  # a relay says the same again and again
def make_reply(code, lines):
    text = readable(b"\n".join(line[4:].rstrip(b"\r") for line in lines.split(b"\n")))
    return Reply(int(code), text, code.startswith(b"2"))


def readable(data):
    """A relay's bytes as text without control characters, but for the ends of lines."""
    text = data.decode("utf-8", "replace").strip()
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text).strip()


def octets_of(text):
    """UTF-8, and what was none on the command line or in the environment as it was there."""
    return text.encode("utf-8", "surrogateescape")


class Secrets:
    """What a relay was told, and may repeat, whole or in part, plain or in base64."""

    def __init__(self):
        self.parts = {}  # from a length to the parts of so many octets in a row

    def add(self, text):
        """Text, as it looks when a relay repeats it."""
        secret = readable(octets_of(text)).encode().lower()
        if len(secret) > 2:  # less is no secret: it stands in every text
            size = min(len(secret), max(4, min(len(secret) // 2, 6)))
            self.parts.setdefault(size, set()).update(secret[n : n + size] for n in range(len(secret) - size + 1))

    def add_password(self, password):
        """Itself, and what it becomes in base64 wherever it stands in what is encoded."""
        self.add(password)
        for before, start in ((0, 0), (1, 2), (2, 3)):  # octets before it, and letters of which these have a part
            self.add(base64.b64encode(bytes(before) + octets_of(password))[start:].decode().rstrip("="))

    def redact(self, text):
        """The beginning of a relay's words, with three asterisks in place of secrets."""
        kept = text.encode("utf-8", "replace")[:ERROR_LIMIT]
        plain, shown = kept.lower(), bytearray(kept)
        for size, parts in self.parts.items():
            for start in range(len(plain) - size + 1):
                if plain[start : start + size] in parts:
                    shown[start : start + size] = bytes(size)
        return re.sub(b"\0+", b"***", shown).decode("utf-8", "ignore")


class Offers(NamedTuple):
    """What a relay offers in its reply to EHLO, as a transaction needs it."""

    pipelining: bool = False  # RFC 2920
    chunking: bool = False  # RFC 3030
    smtputf8: bool = False  # RFC 6531
    limit: int = 0  # octets of a mail (RFC 1870); 0 if it names none
    parameters: str = ""  # of MAIL, with a place for the mail's size


class Connection:
    """An open connection: commands go out, replies come back, each within a time limit.

    timeout: seconds for a command to be taken, and for each reply.
    """

    def __init__(self, sock, address, timeout):
        self.sock, self.address, self.seconds = sock, address, timeout
        self.encrypted = False
        self.offers = Offers()
        self.shunned = {}  # extension -> until when it is not used; all connections of a relay share it
        self.most_lines = EHLO_LINES
        self.buffer = b""
        self.broken = ""  # why it cannot be used any more
        self.secrets = Secrets()
        self.is_mute = False  # the relay's words are not quoted: they may be a secret's in any shape
        self.uses = 0
        self.deadline, self.watched, self.expired = math.inf, False, False
        self.quiet = None  # whose poll(0) tells that nothing has come
        self.born = self.used = self.heard = time.monotonic()

    def spoil(self, reason):
        """It is not used again after this."""
        self.broken = self.broken or reason

    def close(self):
        self.sock.close()

    # -- time limits

    def watch(self):
        """From now on somebody looks at the deadline and calls expire(): a timer for each wait costs more than it."""
        self.watched, self.most_lines = True, REPLY_LINES
        self.sock.settimeout(None)
        if hasattr(select, "poll"):  # not on Windows
            self.quiet = gevent.monkey.get_original("select", "poll")()
            self.quiet.register(self.sock, select.POLLIN)

    def expire(self):
        """Wake whoever waits for the relay: it takes too long."""
        self.expired = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # SSLSocket's would break the reader's object

    def _fault(self, error, late):
        """The error, or, if that is only how a time limit shows, late."""
        return late if self.expired or isinstance(error, socket.timeout) else error

    # -- commands and replies

    def quote(self, data):
        """The beginning of what the relay said."""
        return "..." if self.is_mute else readable(data[:80])

    def send(self, data):
        """Write commands or content; all of it must be taken within the time limit. Raises RelayError, OSError."""
        if self.buffer:  # whatever it means, the next reply would be taken for that to this
            raise Surplus(f"{SURPLUS}: {self.quote(self.buffer)}")
        self.deadline = time.monotonic() + self.seconds
        if not self.watched:
            self.sock.settimeout(self.seconds)
        try:
            sent = self.sock.send(data)  # nearly always all of it
            if sent < len(data):
                self.sock.sendall(memoryview(data)[sent:])
            self.heard = time.monotonic()  # a sign of life: a large mail is taken piece by piece
        except OSError as error:
            raise self._fault(error, RelayError("timed out, the relay does not read what it is sent")) from None

    def reply(self, seconds=None):
        """The next Reply, whole within the time limit. Raises RelayError, OSError."""
        found = []
        self.read_replies(found, 1, seconds or self.seconds)
        return found[0]

    def read_replies(self, found, count, seconds):
        """Add replies to those that were found until there are so many, or one is 421. Each must be whole within
        so many seconds. Raises RelayError, OSError."""
        self.deadline = time.monotonic() + seconds
        while len(found) < count and not self.broken:
            match = REPLY.match(self.buffer)
            if (match[0] if match else self.buffer).count(b"\n") > self.most_lines:
                raise RelayError(f"a reply of more than {self.most_lines} lines: {self.quote(self.buffer)}")
            if not match:
                self._receive_line()
                continue
            self.buffer = self.buffer[match.end() :]
            found.append(make_reply(match[2], match[0]))
            self.deadline = time.monotonic() + seconds
            if match[2] == b"421":
                self.spoil(str(found[-1]))

    def surplus(self):
        """The replies that have come and were not asked for; not 421, which may come at any time (RFC 5321 3.8)."""
        found = []
        while REPLY.match(self.buffer) and not self.broken:
            self.read_replies(found, len(found) + 1, 0)
        if self.buffer and not b"421".startswith(self.buffer[:3]):
            found.append(Reply(0, self.quote(self.buffer), False))
        return [reply for reply in found if reply.code != 421]

    def _receive_line(self):
        """Add what comes to the buffer, until a line ends in it."""
        if self.buffer and (len(self.buffer) > REPLY_LIMIT or not BEGUN_REPLY.fullmatch(self.buffer)):
            raise RelayError(f"not an SMTP reply: {self.quote(self.buffer)}")
        while b"\n" not in self._receive() and len(self.buffer) <= REPLY_LIMIT:
            pass  # only what is new is looked at

    def _receive(self):
        if not self.watched:
            self.sock.settimeout(max(0.001, self.deadline - time.monotonic()))
        try:
            data = self.sock.recv(4096)
            if not data:
                raise ConnectionResetError("connection closed by the relay")
        except OSError as error:
            raise self._fault(error, Silence("timed out waiting for the relay's reply")) from None
        self.heard = time.monotonic()
        self.buffer += data
        return data

    # -- use and end

    def usable(self):
        """Whether an idle connection is young enough, and neither closed by the relay nor spoken to."""
        if time.monotonic() - self.born > CONNECTION_SECONDS:
            return False
        if self.quiet and not self.quiet.poll(0) and not (self.encrypted and self.sock.pending()):
            return True
        try:
            self.sock.settimeout(0)
            self.buffer += self.sock.recv(4096)  # anything at all that comes here is the end: 421, or nothing
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            return False
        finally:
            self.sock.settimeout(None)
        if surplus := self.surplus():
            self.shun(EXTENSIONS, f"{SURPLUS}, maybe of the mail before: {surplus[0]}")
        return False

    def shun(self, extensions, reason):
        """Do not use these any more with this relay. reason: what went wrong."""
        self.spoil(reason)
        self.shunned.update(dict.fromkeys(extensions, time.monotonic() + SHUNNED_SECONDS))
        log(f"{self.address}: {self.secrets.redact(reason)}: no {' and no '.join(extensions)} from now on")

    def transact(self, sender, addresses, message, carefully=False):
        """Send one mail to up to 100 addresses; returns a dict from address to Outcome. Raises Repeat."""
        try:
            outcomes = Transaction(self, sender, addresses, message, carefully).run()
            for address, (verdict, text) in outcomes.items():
                if self.secrets.parts or verdict is not Verdict.DELIVERED or len(text) > ERROR_LIMIT:
                    outcomes[address] = Outcome(verdict, self.secrets.redact(text))
            return outcomes
        except BaseException:
            self.spoil("it was left in the middle of a transaction")
            raise
        finally:
            self.uses, self.used = self.uses + 1, time.monotonic()

    def quit_politely(self):
        """QUIT, but nothing depends on it."""
        with contextlib.suppress(OSError, gevent.Timeout), gevent.Timeout(min(5, self.seconds)):
            if not self.broken:
                self.send(b"QUIT\r\n")
                self.reply()
        self.close()


def is_over(greenlet):
    return greenlet is None or greenlet.dead


# -- opening a connection


def dial(address, timeout, security, witness=None):
    """A Connection that is greeted, encrypted and logged in. Raises OSError, as most errors here are.

    witness: told, for -check, what each step found.
    """
    connection = Connection(connect(address, timeout), address, timeout)
    connection.secrets = security.secrets
    try:
        if witness:
            witness(f"connected to {Address(*connection.sock.getpeername()[:2])}")
        if security.implicit_tls(address):
            security.encrypt(connection)
        opening = Opening(connection, security.helo)
        expect(connection.reply())
        opening.say_hello()
        if security.wants_starttls(opening):
            opening.starttls(security)
        if witness:
            witness(encryption(connection))
            witness(connection.secrets.redact(opening.offered()))
        security.login(opening)
        connection.offers = opening.offers()
    except BaseException as error:
        if isinstance(error, RelayError):
            error.args = (connection.secrets.redact(str(error)),)
        connection.close()
        raise
    return connection


def connect(address, timeout):
    """A TCP connection to the first of the name's addresses that takes one. Raises OSError.

    timeout: seconds for the name, and as many again for all its addresses together.
    """
    with limited(timeout, f"{address}: timed out looking up the name"):
        found = socket.getaddrinfo(ascii_domain(address.host), address.port, type=socket.SOCK_STREAM)
    deadline, failure = time.monotonic() + timeout, None
    for left, (family, kind, protocol, _, where) in zip(range(len(found), 0, -1), found):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.1, (deadline - time.monotonic()) / left))
            sock.connect(where)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def limited(seconds, text):
    """A context that raises RelayError(text) in this greenlet when the time is over."""
    return gevent.Timeout(seconds, RelayError(text))


class Opening(smtplib.SMTP):
    """smtplib's part in a connection: EHLO, STARTTLS, AUTH, spoken through a Connection, which has the time limits."""

    def __init__(self, connection, helo):
        super().__init__(local_hostname=helo or literal(connection.sock))
        self.connection, self.sock = connection, connection.sock

    def send(self, data):
        self.connection.send(data.encode() if isinstance(data, str) else data)

    def getreply(self):
        self.latest = self.connection.reply()
        return self.latest.code, self.latest.text.encode()

    def say_hello(self):
        """EHLO, or HELO where that is not known. Raises RelayRefused."""
        self.ehlo()
        if not self.latest.ok and self.latest.code != 421:
            self.helo()
        expect(self.latest)

    def starttls(self, security):
        expect(self.ask("STARTTLS"))
        self.connection.buffer = b""  # what came before the handshake is not the relay's word
        security.encrypt(self.connection)
        self.say_hello()

    def ask(self, command):
        """The Reply to a command."""
        self.putcmd(command)
        return self.connection.reply()

    def offers(self):
        size = " SIZE={}" if self.has_extn("size") else ""
        body = " BODY=8BITMIME" if self.has_extn("8bitmime") else ""
        names = map(self.has_extn, ("pipelining", "chunking", "smtputf8"))
        return Offers(*names, int_or_zero(self.esmtp_features.get("size")), f"{size}{body}")

    def offered(self):
        """All that the relay offers, for people."""
        lines = [" ".join([name.upper(), *value.split()]) for name, value in self.esmtp_features.items()]
        return f"offers {', '.join(lines) or 'nothing'}"


def encryption(connection):
    """How a connection is encrypted, and the name and expiry of the certificate that was verified, for people."""
    if not connection.encrypted:
        return "not encrypted"
    certificate = connection.sock.getpeercert()
    subject = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    names = dict.fromkeys([value for _, value in certificate.get("subjectAltName", ())] or subject)
    left, end = ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time(), certificate["notAfter"]
    return f"{connection.sock.version()}, certificate of {', '.join(names)} until {end} (in {ago(left)})"


def expect(reply):
    if not reply.ok:
        raise RelayRefused(str(reply))


def literal(sock):
    """The address literal of our end (RFC 5321 4.1.3)."""
    host = sock.getsockname()[0]
    return f"[IPv6:{host}]" if ":" in host else f"[{host}]"


def is_loopback(end):
    """Whether an end of a connection, as (host, port...), is on this machine, so that nobody is between."""
    host = ipaddress.ip_address(end[0].partition("%")[0])
    return (getattr(host, "ipv4_mapped", None) or host).is_loopback


def unspeakable(address, offers):
    """Why a relay with these Offers cannot be told this address; empty when it can."""
    try:
        wire = wire_address(address)
    except ValueError as error:
        return f"{address} has an impossible domain: {error}"
    return "" if wire.isascii() or offers.smtputf8 else f"{address} needs SMTPUTF8, which the relay does not offer"


class Transaction:
    """One mail on one connection (RFC 5321 3.3): MAIL, RCPT and DATA or BDAT, and their replies.

    With PIPELINING (RFC 2920) they go out in one write; with CHUNKING (RFC 3030) a small mail's content does too, or,
    carefully, waits for the relay's word that it is there.
    """

    def __init__(self, connection, sender, addresses, message, carefully=False):
        self.connection, self.message = connection, message
        self.sender, self.addresses = sender, addresses
        self.replies = []  # to MAIL, each RCPT, and DATA or BDAT
        self.final = None  # the reply to the content
        self.surplus = []  # replies that came after it
        self.complete = False  # the relay may have the whole content
        self.error = None  # what the connection was lost by
        self.plain = PLAIN_PATHS.fullmatch("\n".join([sender, *addresses, ""]))
        self.chunked = connection.offers.chunking and message.whole is not None and "CHUNKING" not in connection.shunned
        self.pipelined = connection.offers.pipelining and "PIPELINING" not in connection.shunned
        self.carefully = carefully or time.monotonic() - connection.used > FRESH_SECONDS

    def run(self):
        """A dict from address to Outcome. Raises Repeat."""
        refusals = {}
        if not self.plain or self.message.size > self.connection.offers.limit > 0:
            refusals = self._local_refusals()
            self.addresses = [address for address in self.addresses if address not in refusals]
        if self.addresses:
            try:
                self._converse()
            except OSError as error:
                self.error = error
                self.connection.spoil(describe(error))
        if self.all_went_well():
            taken = Outcome(Verdict.DELIVERED, f"{self.final.code} {self.final.text}")
            return {**refusals, **dict.fromkeys(self.addresses, taken)}
        self._judge()
        content = self._content_outcome()
        return {**refusals, **{to: self._outcome(number, content) for number, to in enumerate(self.addresses, 1)}}

    def all_went_well(self):
        asked = self.replies[: len(self.addresses) + 1]
        is_taken = self.final and self.final.ok and self.complete and not (self.surplus or self.error)
        return bool(is_taken) and all(map(IS_OK, asked))

    # -- before anything is sent

    def _local_refusals(self):
        """Outcomes for what this relay cannot take, known from what it offers."""
        limit = self.connection.offers.limit
        if self.message.size > limit > 0:
            text = f"552 5.3.4 not sent: {self.message.size} octets are over the relay's limit of {limit}"
            return dict.fromkeys(self.addresses, Outcome(Verdict.REFUSED, text))
        offers = self.connection.offers
        problems = {address: unspeakable(address, offers) for address in self.addresses}
        if problem := unspeakable(self.sender, offers):
            problems = dict.fromkeys(self.addresses, f"the sender {problem}")
        return {to: Outcome(Verdict.REFUSED, f"553 5.6.7 not sent: {why}") for to, why in problems.items() if why}

    # -- the conversation

    def _converse(self):
        commands = self._commands()
        if self.pipelined and not (self.chunked and self.carefully):
            self._ask(commands)
        else:
            self._ask(commands[:-1])
            if self._accepted() and not self.connection.broken:
                self._ask(commands[-1:])
        self._content()
        if not (self.final and self.final.ok) and not self.connection.broken:
            self.connection.send(b"RSET\r\n")
            if not (reply := self.connection.reply()).ok:
                self.connection.spoil(str(reply))

    def _commands(self):
        """MAIL, each RCPT, and DATA, or BDAT with the content."""
        addresses = [self.sender, *self.addresses]
        sender, *wires = addresses if self.plain else map(wire_address, addresses)
        utf8 = "" if sender.isascii() and all(map(str.isascii, wires)) else " SMTPUTF8"
        mail = f"MAIL FROM:<{sender}>{self.connection.offers.parameters.format(self.message.size)}{utf8}\r\n"
        whole, opening = self.message.whole, b"DATA\r\n"
        if self.chunked:
            opening = b"BDAT %d LAST\r\n%b" % (len(whole), whole)
        return [*map(str.encode, [mail, *map("RCPT TO:<{}>\r\n".format, wires)]), opening]

    def _ask(self, commands):
        """Send commands, and read their replies; without PIPELINING one by one, while it makes sense."""
        for group in [commands] if self.pipelined else [[command] for command in commands]:
            if self.connection.broken or (self.replies and not self.replies[0].ok):
                break
            self.connection.send(b"".join(group))
            self.complete = group[-1].startswith(b"BDAT")
            # a relay may hold its replies to what came in one write until it has dealt with all of it
            seconds = FINAL_REPLY_SECONDS if self.complete else self.connection.seconds
            self.connection.read_replies(self.replies, len(self.replies) + len(group), seconds)

    def _accepted(self):
        """How many of the RCPTs were accepted; none, when MAIL was not."""
        is_open = self.replies and self.replies[0].ok
        return sum(map(IS_OK, self.replies[1 : len(self.addresses) + 1])) if is_open else 0

    @property
    def opened(self):
        """The reply to DATA or BDAT."""
        return self.replies[-1] if len(self.replies) == len(self.addresses) + 2 else None

    def _content(self):
        """After DATA's 354: the content, or a lone dot when nobody is left to have it (RFC 2920 3.1). Its reply."""
        opened = self.opened
        if not opened or (opened.code != 354 and not self.chunked):
            return
        if not self.chunked:
            self._send_content()
        self.final = opened if self.chunked else self.connection.reply(FINAL_REPLY_SECONDS)
        if self.connection.buffer:  # then the reply may be that to an earlier command
            self.surplus = self.connection.surplus()
            self.connection.spoil(SURPLUS)
        if self.chunked and opened.code == 354:
            self.connection.spoil("it waits for content")

    def _send_content(self):
        wanted, whole, chunks = bool(self._accepted()), self.message.whole, [b".\r\n"]
        if wanted and whole is None:
            chunks = itertools.chain(dot_stuffed(self.message.content()), chunks)
        elif wanted:
            chunks = [(b"\r\n" + whole).replace(b"\r\n.", b"\r\n..")[2:] + b".\r\n"]
        try:
            for number, chunk in enumerate(chunks):
                if number:  # a relay that takes all at once gets one chunk a turn: the others have theirs
                    gevent.sleep(0)
                self.connection.send(chunk)
        except OSError:  # the relay may have said why it stopped listening
            with contextlib.suppress(OSError):
                self.final = self.connection.reply(LAST_WORDS_SECONDS)
            raise
        self.complete = wanted

    # -- whether it is to be made again

    def _judge(self):
        """Raises Repeat when what happened says more about the relay than about the mail."""
        suspects, reason = self._suspects()
        if suspects:
            self.connection.shun(suspects, reason)
        elif not (self.connection.uses and self._unanswered()):
            return
        if self.complete and isinstance(self.error, Silence):
            return
        if self._may_have_arrived():
            names = ", ".join(self.addresses)
            log(f"{self.connection.address}: the mail to {names} is sent again, it may have arrived")
        raise Repeat

    def _unanswered(self):
        """The relay had gone before this transaction: nothing was answered, or 421 first of all."""
        return self.replies[0].code == 421 if self.replies else isinstance(self.error, GONE)

    def _suspects(self):
        """The extensions that may have led to what happened, and what that was."""
        opened, used = self.opened, list(itertools.compress(EXTENSIONS, (self.chunked, self.pipelined)))
        if self.chunked and opened and opened.code in NO_BDAT and self._accepted():
            return ["CHUNKING"], f"BDAT was answered with {opened}"
        if self.surplus:
            return used, f"{SURPLUS}: {', '.join(map(str, [self.final, *self.surplus]))}"
        if isinstance(self.error, Surplus):
            return used, str(self.error)
        if self.pipelined and isinstance(self.error, Silence) and self.replies and not opened:
            return ["PIPELINING"], f"silence after {len(self.replies)} of {len(self.addresses) + 2} replies"
        return [], ""

    def _may_have_arrived(self):
        """Whether the relay has the content and did not clearly refuse it."""
        known = [self.final, *self.surplus] if self.final else self.replies[:1]
        return self.complete and (not known or any(map(IS_OK, known)))

    # -- what it meant

    def _outcome(self, number, content):
        """Of the recipient whose RCPT has this number: what MAIL, RCPT or the content met; the first refusal counts."""
        for reply in (*self.replies[:1], *self.replies[number : number + 1]):
            if not reply.ok:  # if that is MAIL's, no RCPT was accepted
                verdict = Verdict.AGAIN if too_many(reply) and self._accepted() else reply.verdict
                return Outcome(verdict, str(reply))
        return content

    def _content_outcome(self):
        if self.surplus:
            worst = max([self.final, *self.surplus], key=lambda reply: (not reply.ok, reply.code))
            verdict = Verdict.DEFERRED if self._may_have_arrived() else worst.verdict
            return Outcome(verdict, f"{worst} ({SURPLUS}{MAYBE if self._may_have_arrived() else ''})")
        if self.final and (self.complete or not self.final.ok):
            return Outcome(Verdict.DELIVERED if self.final.ok else self.final.verdict, str(self.final))
        if self.opened and self.opened.code != 354:
            return Outcome(self.opened.verdict, str(self.opened))
        maybe = f" (no reply to the content{MAYBE})" if self.complete else ""
        return Outcome(Verdict.DEFERRED, f"{self.connection.broken or 'no reply'}{maybe}")


def too_many(reply):
    """Whether a RCPT reply says that the transaction has enough recipients (RFC 5321 4.5.3.1.10, RFC 3463 x.5.3)."""
    if enhanced := re.match(r"[45]\.(\d+\.\d+)", reply.text):
        return enhanced[1] == "5.3"
    return reply.code in (452, 552)


class Security:
    """How connections are encrypted and logged in. Raises UsageError for a file that is no good."""

    def __init__(self, options, environ):
        self._options, self.mode, self.name = options, options.tls, options.tlsname
        self.user = options.smtpuser or options.smtpmd5user
        by_cram = self.user and not options.smtpuser
        self._wanted = [options.smtpauth] if options.smtpauth else ["cram-md5"] if by_cram else ["plain", "login"]
        kind = "smtpmd5password" if by_cram else "smtppassword"
        self._password, self._fallback = getattr(options, kind), environ.get(f"SPOOLGORE_{kind.upper()}", "")
        if self.user and not (self._password or self._fallback or options.smtppasswordcommand):
            log(f"-{kind}: no password was given, an empty one is tried")
        self._output = None  # of the password command
        self.secrets = Secrets()  # of the latest login: the next connection redacts them from the start
        if options.tlsca or options.tlscert:
            self.context  # noqa: B018 -- a file that is no good is reported at the start

    @functools.cached_property
    def context(self):
        """What verifies relays. Made for the first that speaks TLS: the system's certificates take 2 MB."""
        return tls_context(self._options)

    @functools.cached_property
    def helo(self):
        """The name for EHLO, looked up at the first connection; empty when this machine has no full one."""
        if self._options.helo:
            return self._options.helo
        name = ""
        with gevent.Timeout(self._options.timeout, False):  # the name server may be away
            name = socket.getfqdn()
        return name if "." in name and not name.startswith("localhost") else ""

    def implicit_tls(self, address):
        return self.mode == "smtps" or (self.mode == "auto" and address.port == 465)

    def wants_starttls(self, opening):
        """In auto mode it is done whenever it is offered, but for this machine: nobody is between, and the certificate
        of a local relay is hardly ever one for localhost."""
        offered, connection = opening.has_extn("starttls"), opening.connection
        if connection.encrypted or self.mode == "off":
            return False
        if self.mode == "starttls" and not offered:
            raise RelayError("the relay does not offer STARTTLS")
        return offered and (self.mode == "starttls" or self.name or not is_loopback(connection.sock.getpeername()))

    def encrypt(self, connection):
        """The TLS handshake; the certificate must bear the relay's name, or that of -tlsname."""
        name = (self.name or ascii_domain(connection.address.host)).rstrip(".")
        with limited(connection.seconds, "timed out in the TLS handshake"):
            connection.sock = self.context.wrap_socket(connection.sock, server_hostname=name)
        connection.encrypted = True

    # -- login

    def login(self, opening):
        """AUTH (RFC 4954), if there is a user. Raises LoginRefused, RelayError; neither has the relay's words."""
        if not self.user:
            return
        connection, mechanisms, was_asked = opening.connection, self._mechanisms(opening), self._output is not None
        connection.secrets, connection.is_mute = Secrets(), True
        for mechanism in mechanisms:
            self._check_secrecy(mechanism, connection)
            reply = self._authenticate(opening, mechanism)
            if was_asked and reply.code >= 500 and reply.code not in NO_MECHANISM:
                self._output = None  # it may be out of date
                reply = self._authenticate(opening, mechanism)
            if reply.code not in NO_MECHANISM:  # else it is offered, and not known all the same
                break
        if reply.code != 235:
            enhanced = re.match(r"[245]\.\d{1,3}\.\d{1,3}\b", reply.text)  # RFC 3463
            text = f"{reply.code} {enhanced[0] + ' ' if enhanced else ''}in reply to AUTH {mechanism.upper()}"
            if reply.code < 500:
                raise RelayError(text)
            self._output = None
            raise LoginRefused(f"login refused: {text}")
        connection.is_mute = False

    def _mechanisms(self, opening):
        """What may be tried, in order of preference."""
        offered = (opening.esmtp_features.get("auth") or "").lower().replace("=", " ").split()
        if mechanisms := [mechanism for mechanism in self._wanted if mechanism in offered]:
            return mechanisms
        names, found = " or ".join(map(str.upper, self._wanted)), " ".join(offered) or "none"
        hint = "; with -tls starttls it may offer more" if opening.has_extn("starttls") else ""
        raise RelayError(f"the relay does not offer AUTH {names} (it offers {found}{hint})")

    def _check_secrecy(self, mechanism, connection):
        """A password goes over TLS, or to this machine, or not at all; CRAM-MD5, from which one that is short can be
        found, in the clear only with -tls off. Raises RelayError."""
        if not connection.encrypted and not is_loopback(connection.sock.getpeername()):
            if mechanism != "cram-md5":
                raise RelayError("unencrypted connection")
            if self.mode != "off":
                raise RelayError("unencrypted connection (CRAM-MD5 is done in the clear with -tls off only)")

    def _authenticate(self, opening, mechanism):
        """One AUTH exchange; returns its last Reply."""
        password, secrets = self.password(), opening.connection.secrets
        secrets.add_password(password)
        self.secrets = secrets

        def response(challenge, step):
            answer = auth_response(mechanism, self.user, password, challenge, step)
            for secret in (encoded(answer), *(answer.split()[-1:] if mechanism == "cram-md5" else ())):
                secrets.add(secret)
            return encoded(answer)

        at_once = [response(b"", 0)] if mechanism in ("plain", "xoauth2") else []
        reply = opening.ask(" ".join(["AUTH", mechanism.upper(), *at_once]))
        for step in range(len(at_once), 3):
            if reply.code == 334:
                reply = opening.ask(response(decoded(reply.text), step))
        return reply

    def password(self):
        """The password or token: by a flag, else by the command, else by the environment. The command is asked at the
        first login, and after one that was refused."""
        if self._password or not self._options.smtppasswordcommand:
            return self._password or self._fallback
        if self._output is None:
            self._output = first_line_of(self._options.smtppasswordcommand, self._options.timeout)
        return self._output


def environment_of_commands(environ):
    """What a command that we run finds in its environment: ours without what is ours alone."""
    return {name: value for name, value in environ.items() if not name.startswith(OURS_ALONE)}


def pass_on(stream):
    """What the password command complains of, as lines of the log, but no more than of a relay."""
    for number, line in enumerate(iter(functools.partial(stream.readline, ERROR_LIMIT), b"")):
        if number < REPLY_LINES:
            log(f"password command: {line.decode('utf-8', 'replace').rstrip()}")


def first_line_of(command, seconds):
    """The first line that a shell command prints. Raises RelayError; its output is never part of the text.

    What it writes to standard error goes to the log.
    """
    environ = environment_of_commands(os.environ)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, shell=True, start_new_session=True, env=environ, **pipes)
    listener = gevent.spawn(pass_on, process.stderr)
    try:
        with limited(seconds, f"the password command took longer than {seconds} s"):
            output = process.stdout.read(REPLY_LIMIT + 1)
            if len(output) > REPLY_LIMIT:
                raise RelayError(f"the password command printed more than {REPLY_LIMIT} octets")
            process.wait()
    except BaseException:  # one of these, or we are to stop
        kill_all(process)
        raise
    finally:
        process.stdout.close()
        listener.join(LAST_WORDS_SECONDS)  # something that it started may have it open for ever
        listener.kill()
        process.stderr.close()
    if process.returncode:
        raise RelayError(f"the password command failed with exit status {process.returncode}")
    if not (line := output.decode("utf-8", "surrogateescape").partition("\n")[0].rstrip("\r")):
        raise RelayError("the password command printed nothing")
    return line


def kill_all(process):
    """End the leader of a session and whatever it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def tls_context(options):
    """What verifies relays: chain and name, TLS 1.2 at least."""
    flag, path = "tlsca", options.tlsca
    try:
        context = ssl.create_default_context(cafile=options.tlsca or None)
        flag, path = "tlscert", options.tlscert
        if options.tlscert:
            context.load_cert_chain(options.tlscert, password=no_passphrase)
    except OSError as error:
        raise bad_value(flag, path, error.strerror or str(error)) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = not ssl.HAS_NEVER_CHECK_COMMON_NAME  # RFC 6125 6.4.4: it is no host's name
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    return context


def no_passphrase():
    """OpenSSL would ask for it on the terminal."""
    raise OSError(errno.EACCES, "its key is encrypted: there is nobody who could enter the passphrase")


def auth_response(mechanism, user, password, challenge, step):
    """The answer to a challenge: RFC 4616 (PLAIN), RFC 2195 (CRAM-MD5), LOGIN, and Google's XOAUTH2."""
    if mechanism == "plain":
        return f"\0{user}\0{password}"
    if mechanism == "login":
        return (user, password)[min(step, 1)]
    if mechanism == "cram-md5":
        return f"{user} {hmac.new(octets_of(password), challenge, 'md5').hexdigest()}"
    return "" if step else f"user={user}\1auth=Bearer {password}\1\1"


def encoded(text):
    return base64.b64encode(octets_of(text)).decode()


def decoded(challenge):
    try:
        return base64.b64decode(challenge)
    except ValueError:
        return b""


class Relay:
    """One relay and the connections to it: dials, keeps and reuses them, and knows when it is down.

    dial: a function that returns an open Connection or raises OSError. limit: the most connections.
    on_news: called when the relay has gone down, was dialled in vain, or answers again.
    """

    def __init__(self, name, dial, limit, on_news=lambda: None):
        self.name, self.on_news = name, on_news
        self._dial = dial
        self.idle = []  # the most recently used last
        self.in_use = set()
        self.dialling = 0
        self.limit = self.cap = limit
        self._capped = 0.0
        self.opened = self.transactions = 0  # so many, since the start
        self.seconds = 0.0  # that all the transactions took
        self.down = ""  # why it cannot be used
        self.again = 0.0  # when it is dialled again, while it is down
        self._failures, self._pause = 0, 0.0  # dials in vain since it went down, and seconds until the next
        self.shunned = {}  # extension -> until when it is not used; it went wrong
        self._waiting = deque()  # an Event for each greenlet that wants a connection
        self._probe_now = gevent.event.Event()
        self._prober = self._attender = None
        self._retired = False
        self._goodbyes = gevent.pool.Group()

    def send(self, sender, addresses, message):
        """One transaction; returns a dict from address to Outcome. Raises RelayDown when there is no connection."""
        carefully = False
        while True:
            connection = self._acquire()
            began = time.monotonic()
            try:
                return connection.transact(sender, addresses, message, carefully)
            except Repeat:
                carefully = True
            finally:
                self.transactions, self.seconds = self.transactions + 1, self.seconds + connection.used - began
                self._release(connection)

    def poke(self):
        """If the relay is down, try it now."""
        self._probe_now.set()

    def retire(self):
        """No new connections from now on."""
        self._retired = True
        self.down = self.down or "the daemon is stopping"
        self._wake(len(self._waiting))
        self.on_news()

    def tend(self):
        """Start, also when it has died, what looks after connections, and what waits for the relay while it is down.
        Forget what went wrong with the relay long ago."""
        if self.established and is_over(self._attender):
            self._attender = gevent.spawn(self._attend)
        if self.down and not self._retired and is_over(self._prober):
            self._prober = gevent.spawn(self._probe)
        for extension in [each for each, until in self.shunned.items() if until < time.monotonic()]:
            del self.shunned[extension]

    def close(self):
        """QUIT all that is idle."""
        gevent.killall([each for each in (self._attender, self._prober) if each])
        while self.idle:
            self._discard(self.idle.pop())
        self._goodbyes.join(timeout=2)

    # -- connections

    def _acquire(self):
        """A connection that is in use from now on. Raises RelayDown."""
        connection = None
        while not (self.down or connection):
            connection = self._take_idle() or (self._dial_one() if self._may_dial() else self._wait())
        if not connection:
            raise RelayDown(self.down)
        self.in_use.add(connection)
        return connection

    @property
    def established(self):
        return len(self.idle) + len(self.in_use)

    def _take_idle(self):
        while self.idle:
            connection = self.idle.pop()
            if connection.usable():
                return connection
            self._discard(connection)

    def _may_dial(self):
        """One dial at first, then as many at once as there are connections: a relay that is away is not stormed."""
        if self.cap < self.limit and time.monotonic() - self._capped > CAP_SECONDS:
            self.cap, self._capped = self.cap + max(1, self.cap // 2), time.monotonic()
        return self.dialling < max(1, self.established) and self.established + self.dialling < min(self.cap, self.limit)

    def _dial_one(self):
        """A new connection; None if it cannot be had."""
        self.dialling += 1
        try:
            return self._establish(self._dial())
        except Exception as error:  # noqa: BLE001
            return self._dial_failed(error)
        finally:
            self.dialling -= 1
            self._wake(2)

    def _establish(self, connection):
        connection.shunned = self.shunned
        connection.watch()
        self.in_use.add(connection)
        self.opened += 1
        self.tend()
        return connection

    def _dial_failed(self, error):
        """With other connections alive the relay has enough of us; else, or when it refuses the login, it is down."""
        alive = isinstance(error, RelayRefused) or self._silence() < SILENT_SECONDS
        if self.established and alive and not isinstance(error, LoginRefused):
            self.cap, self._capped = self.established, time.monotonic()
        elif not self.down:
            self._go_down(error)

    def _silence(self):
        """Seconds since anything was heard on any connection; infinity when there is none."""
        return time.monotonic() - max((each.heard for each in (*self.in_use, *self.idle)), default=-math.inf)

    def _wait(self):
        """Until there may be a connection, or the relay may take more of them than it did."""
        turn = gevent.event.Event()
        self._waiting.append(turn)
        turn.wait(CAP_SECONDS)
        if not turn.is_set():
            self._waiting.remove(turn)

    def _wake(self, count):
        for _ in range(min(count, len(self._waiting))):
            self._waiting.popleft().set()

    def _release(self, connection):
        self.in_use.discard(connection)
        if connection.broken:
            self._discard(connection)
        else:
            self.idle.append(connection)
            if self._waiting:
                self._wake(1)

    def _discard(self, connection):
        self._wake(1)
        if connection.broken:
            connection.close()
        else:
            self._goodbyes.spawn(connection.quit_politely)

    def _attend(self):
        """End what takes too long, close what is idle for long; until there are no connections."""
        while self.established:
            gevent.sleep(ATTEND_SECONDS)
            now = time.monotonic()
            for connection in [connection for connection in self.in_use if connection.deadline < now]:
                connection.expire()
            while self.idle and now - self.idle[0].used >= IDLE_SECONDS:
                self._discard(self.idle.pop(0))

    # -- down and up

    def _go_down(self, error):
        """It is not used until a dial succeeds; the pause before the next one grows with each failure."""
        self._pause = probe_delay(self._failures, isinstance(error, LoginRefused))
        self._failures += 1
        self.again = time.time() + self._pause
        before, self.down = self.down, f"{self.name}: {describe(error)}"
        if self.down != before:
            log(f"relay unavailable, {self.down}")
        self._wake(len(self._waiting))
        self.tend()
        self.on_news()

    def _probe(self):
        """Dial now and then until the relay answers."""
        while self.down:
            self._probe_now.clear()
            self._probe_now.wait(self._pause)
            try:
                connection = self._dial()
            except Exception as error:  # noqa: BLE001
                self._go_down(error)
            else:
                self._came_up(connection)

    def _came_up(self, connection):
        log(f"relay available again, {self.name}")
        self.down, self._failures, self.cap = "", 0, self.limit
        self.shunned.clear()
        self._release(self._establish(connection))
        self.on_news()

    def fact(self):
        """How it is, as text, which relays_of() reads."""
        reason = self.down.removeprefix(f"{self.name}: ")
        return f"down, tried again {format_time(self.again)}, {reason}" if self.down else "up"


def probe_delay(failures, login_refused):
    """Seconds until the next dial: 1, 2, 4 and so on; slower where each dial is a failed login."""
    if login_refused:
        return min(LOGIN_PROBE_SECONDS, 60 * 2 ** min(failures, 10))
    return min(PROBE_SECONDS, 2 ** min(failures, 10))


class Relays:
    """Several relays in order of preference: the first that is not down is used."""

    def __init__(self, relays, on_news=lambda: None):
        self.relays, self.on_news = relays, on_news
        self.down = ""  # why no relay can be used
        for relay in relays:
            relay.on_news = self.note

    def note(self):
        """A relay has news: see Relay."""
        reasons = [relay.down for relay in self.relays]
        self.down = "; ".join(reasons) if all(reasons) else ""
        self.on_news()

    def send(self, sender, addresses, message):
        """As Relay.send(). If there are several, each outcome names the relay that took the mail."""
        for relay in self.relays:
            try:
                outcomes = relay.send(sender, addresses, message)
            except RelayDown:
                continue
            for address, (verdict, text) in outcomes.items() if len(self.relays) > 1 else ():
                if verdict is Verdict.DELIVERED:
                    outcomes[address] = Outcome(verdict, f"{relay.name}: {text}")
            return outcomes
        raise RelayDown(self.down or "the relays are unavailable")

    def _each(self, does):
        for relay in self.relays:
            does(relay)

    tend, poke = functools.partialmethod(_each, Relay.tend), functools.partialmethod(_each, Relay.poke)
    retire, close = functools.partialmethod(_each, Relay.retire), functools.partialmethod(_each, Relay.close)


def check(options, environ, say):
    """Talk to each relay, and say what it offers and what is wrong. Returns the exit status. Raises UsageError."""
    security, status = Security(options, environ), EX_OK
    for address in options.smtpaddr:

        def witness(text, address=address):
            say(one_line(f"{address}: {text}"))

        try:
            connection = dial(address, options.timeout, security, witness)
            witness(f"logged in as {security.user}" if security.user else "no login: there is no -smtpuser")
            try:
                if options.checkto:
                    ask_for_leave(connection, options.checkto, witness)
            finally:
                connection.quit_politely()
        except (OSError, ValueError) as error:
            witness(f"FAILED: {security.secrets.redact(describe(error))}")
            status = EX_ERROR
    return status


def ask_for_leave(connection, address, witness):
    """MAIL and RCPT, then RSET. Raises OSError."""
    if problem := unspeakable(address, connection.offers):  # a lenient relay would say yes all the same
        raise RelayRefused(problem)
    wire = wire_address(address)
    utf8 = "" if wire.isascii() else " SMTPUTF8"
    for command in (f"MAIL FROM:<{wire}>{utf8}", f"RCPT TO:<{wire}>", "RSET"):
        connection.send(f"{command}\r\n".encode())
        reply = connection.reply()
        if not reply.ok:
            raise RelayRefused(f"{command}: {reply}")
        if command != "RSET":
            witness(f"{command}: {connection.secrets.redact(str(reply))}")


class Printer(Relays):
    """No relay, but a binary stream: every mail's envelope and content are printed."""

    def __init__(self, stream):
        super().__init__([])
        self.stream = stream

    def send(self, sender, addresses, message):
        lines = [f"MAIL FROM:<{sender}>", *(f"RCPT TO:<{address}>" for address in addresses), ""]
        text = b"".join([*(f"{line}\n".encode() for line in lines), *message.content()])
        try:
            self.stream.write(self.shown(text.replace(b"\r\n", b"\n")) + b"\n")
            self.stream.flush()
        except OSError as error:
            return dict.fromkeys(addresses, Outcome(Verdict.DEFERRED, describe(error)))
        return dict.fromkeys(addresses, Outcome(Verdict.DELIVERED))

    def shown(self, text):
        """As it is, but that a mail does not steer a terminal."""
        if not self.stream.isatty():
            return text
        return re.sub(r"[^\n\t]+", lambda part: one_line(part[0]), text.decode("utf-8", "backslashreplace")).encode()


def make_relay(options, environ, stream, on_news):
    """The relay that the command line asks for. Raises UsageError."""
    if not options.smtpaddr:
        if stream.name == os.devnull:  # ours, in its place: see set_up_streams
            raise bad_value("smtpaddr", "-", "standard output is closed")
        return Printer(stream)
    security = Security(options, environ)
    relays = []
    for address in options.smtpaddr:
        dial_it = functools.partial(dial, address, options.timeout, security)
        relays.append(Relay(str(address), dial_it, options.concurrency))
    return Relays(relays, on_news)


# -------------------------------------------------------------------- rate


class Rate:
    """How many recipients may go out: exactly, in every window. Pure: now is passed in, in seconds.

    A recipient counts from the moment its transaction begins until a window's length after its end, since it went
    out at some moment between the two. limits: (recipients, seconds) pairs.
    """

    def __init__(self, limits):
        self.windows = [Window(count, seconds) for count, seconds in limits]
        self.in_flight = 0
        self.most = min([RECIPIENTS_PER_TRANSACTION, *(count for count, _ in limits)])  # recipients of one transaction

    def room(self, now):
        """How many recipients may begin now."""
        return min((window.room(now) for window in self.windows), default=self.most) - self.in_flight

    def wait(self, wanted, now):
        """Seconds until so many may begin; 0 when they may, None when that depends on what is in flight."""
        waits = [window.wait(wanted + self.in_flight, now) for window in self.windows]
        return None if None in waits else max(waits, default=0)

    def note(self, count, end=None):
        """So many begin; or they end, and went out by then; or, if end is 0, did not go out."""
        self.in_flight += count if end is None else -count
        for window in self.windows if end else ():
            window.add(count, end)


class Window:
    """One limit: at most count recipients in any period of so many seconds."""

    def __init__(self, count, seconds):
        self.count, self.seconds = count, seconds
        self.ends = deque()  # of [first, last, recipients]; those close to each other count as if at the last moment
        self.used = 0

    def room(self, now):
        while self.ends and self.ends[0][1] + self.seconds < now:
            self.used -= self.ends.popleft()[2]
        return self.count - self.used

    def wait(self, wanted, now):
        """Seconds until there is room; None when there never is."""
        missing = wanted - self.room(now)
        if missing <= 0:
            return 0
        for _, last, recipients in self.ends:
            missing -= recipients
            if missing <= 0:
                return last + self.seconds - now + 0.001  # only after the window's last moment
        return None

    def add(self, recipients, now):
        self.used += recipients
        if self.ends and now - self.ends[-1][0] < self.seconds / 5000:
            self.ends[-1][1:] = [max(now, self.ends[-1][1]), self.ends[-1][2] + recipients]
        else:
            self.ends.append([now, now, recipients])


class Turnstile:
    """Rate with a memory on the disk, so that a restart, whatever the reason for it, forgets nothing.

    Each line of the file is a note: ``+N`` (so many begin; on the disk before they do) or ``-N END``. What began and
    has no end went out when the process died, at the latest now.
    """

    def __init__(self, limits, path, clock):
        self.rate, self.path, self.clock = Rate(limits), path, clock
        self._file, self._lines = None, 0
        self._complaint = ""

    def room(self):
        return self.rate.room(self.clock())

    def wait(self, wanted):
        return self.rate.wait(wanted, self.clock())

    def begin(self, count):
        self.rate.note(count)
        self._write(f"+{count}\n", durable=True)

    def end(self, count, went_out=True):
        end = self.clock() if went_out else 0
        self.rate.note(count, end)
        self._write(f"-{count} {end:.6f}\n")

    def load(self):
        """Read the file, and write it anew with what still counts. Raises OSError."""
        if not self.rate.windows:
            return
        now = self.clock()
        try:
            lines = read_state(self.path).decode("ascii", "replace").splitlines(keepends=True)
        except FileNotFoundError:
            lines = []
        except Untrusted as error:
            lines = []
            what = f"{error.strerror}: {set_aside(self.path, time.time())}"
            log(f"corrupt rate file {self.path}, {what}: -rate may not hold across this restart")
        if any(line[-1] == "\n" and not note_of(line) for line in lines):
            log(f"lines of {self.path} could not be read: -rate may not hold across this restart")
        for count, end in filter(None, map(note_of, lines)):
            self.rate.note(count, end and min(end, now))
        self.rate.note(max(0, self.rate.in_flight), now)
        self.rate.in_flight = 0
        self.rate.room(now)
        self._write("")

    def _write(self, line, durable=False):
        if not self.rate.windows:
            return
        try:
            if self._file is None or self._lines > 50_000:
                self._rewrite()  # which has this line's news already
            else:
                self._append(line, durable)
            self._complaint = ""
        except OSError as error:
            self._file = None  # written anew next time: half a line may stand at its end
            before, self._complaint = self._complaint, describe(error)
            if self._complaint != before:
                log(f"unable to write {self.path}, {self._complaint}: -rate may not hold across a restart")

    def _rewrite(self):
        longest = max(self.rate.windows, key=lambda window: window.seconds)
        lines = [f"+{count}\n-{count} {last:.6f}\n" for _, last, count in longest.ends]
        lines += [f"+{self.rate.in_flight}\n"] if self.rate.in_flight else []
        write_durably(self.path, [line.encode() for line in lines])
        handle = open_state(self.path, os.O_WRONLY | os.O_APPEND)
        self._file, self._lines = open(handle, "ab", buffering=0), len(lines)

    def _append(self, line, durable):
        file, self._lines = self._file, self._lines + 1
        if file.write(line.encode()) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if durable:
            off_the_hub(os.fsync, file.fileno())


def note_of(line):
    """(count, end) of a line; end is None for a begin; None for a line that is corrupt or that a crash cut short."""
    match = re.fullmatch(r"\+(\d{1,15})\n|-(\d{1,15}) (\d{1,15}\.\d+)\n", line)
    if not match:
        return None
    return (int(match[1]), None) if match[1] else (int(match[2]), float(match[3]))


def steady_clock():
    """A clock that agrees with the wall's now, and then never jumps."""
    offset = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset


# ------------------------------------------------------------------ report
#
# What people are told: -status, progress, the service manager, and -failcommand.

TITLES = ("FILE", "STATE", "AGE", "SENDER", "RECIPIENT", "ATTEMPTS", "NEXT IN", "ERROR")
KINDS = ("new", "waiting", "in flight", "deferred", "given up", "unusable", "held")
PATIENT = KINDS[:4]  # the kinds that wait to be sent
FOREMOST = ("in flight", "deferred", "waiting", "given up", "unusable")  # the kind of one counts for all
NOBODY = {"Address": "", "Attempts": 0, "Error": ""}
MOST_ERRORS = 1000  # that are told from each other
SPEED_SECONDS = 10  # mails a second are those of this time
FAIL_SECONDS = 60  # -failcommand's time for one mail
FAIL_LINE = 1000  # mails that wait for it at most


class Line(NamedTuple):
    """One mail in the table of -status."""

    due: float  # seconds since 1970
    kind: str
    path: str
    since: float
    sender: str = ""
    recipient: str = ""
    attempts: int = 0
    error: str = ""
    entry: str = "null"  # as JSON, where it is asked for


def lines_of(entries, paths, now, running=True, mtime=modified, whole=False, held=()):
    """A Line for each mail, sorted by when it is due. entries: (path, entry) pairs; paths: of the files; held: of those
    that have a dot before their names.

    mtime() is called only where no entry gives the age: it takes longer than everything else.
    """
    left, lines, lost = set(paths), [], {}
    for path, entry in entries:
        line = line_of(path, entry, mtime, running, whole)
        if path in left:
            left.remove(path)
            lines.append(line)
        elif path in held:
            lines.append(held_line(line, now))
        elif line.kind == "given up":  # its new path is not written yet
            lost[os.path.basename(path)] = line
    for path in left:
        if since := mtime(path):
            name = os.path.basename(path)
            line = is_aside(path) and (lost.get(re.sub(r"\.\d+\Z", "", name)) or lost.get(name))
            lines.append(line._replace(path=path) if line else line_without_entry(path, since, now))
    return sorted(lines)


def is_aside(path):
    return os.path.basename(os.path.dirname(path)) == ".failed"


def enqueued(entry):
    """When the mail was first seen, in seconds since 1970; 0 if the entry has no such time."""
    return moment_of(entry.get("Enqueued")) if isinstance(entry, dict) else 0.0


@functools.lru_cache(maxsize=10_000)
def minute_of(text):
    """Seconds since 1970 of a minute, as plain() has it. Raises ValueError."""
    return parse_time(f"{text}:00Z")


def moment_of(text):
    """parse_time() of anything; 0 if it is not a time."""
    try:
        return parse_time(text)
    except (TypeError, ValueError, KeyError):  # a slice may be a key from Python 3.12 on
        return 0.0


def line_without_entry(path, since, now):
    """A file that the status file does not know yet: a new one, or one that was just put aside."""
    return Line(math.inf, "given up", path, since) if is_aside(path) else Line(now, "new", path, since)


def held_line(line, now):
    return line._replace(kind="held", due=math.inf, since=line.since or now)


def line_of(path, entry, mtime=modified, running=True, whole=False):
    """entry: plain(), or what JSON says. The others: as in lines_of()."""
    if isinstance(entry, tuple):
        try:
            return plain_line(path, entry, mtime, whole)
        except ValueError:  # there is no such day; or everybody has it
            entry = unpack(entry[0].encode())
    since = enqueued(entry) or mtime(path)
    if problem := envelope_problem(entry):
        return Line(math.inf, "unusable", path, since, error=f"malformed entry: {problem}")
    if not running:
        interrupted(entry)
    everybody, text = recipients(entry), json.dumps(entry) if whole else "null"
    left = [recipient for recipient in everybody if recipient["Status"] != 2]
    concerned = left or [recipient for recipient in everybody if recipient["Error"]]
    first = concerned[0] if len(concerned) == 1 else min(concerned, key=next_attempt_of, default=NOBODY)
    due = next_attempt_of(first) if left else math.inf
    recipient = f"{first['Address']} +{len(concerned) - 1}" if len(concerned) > 1 else first["Address"]
    error = str(entry.get("Error") or "")  # an edit may have made anything of it
    error = error or ("" if concerned or not everybody else "delivered, but the file is still there")
    kinds = [kind_of(each["Status"], each["Attempts"], each["Error"]) for each in everybody]
    kind = "unusable" if error else min(kinds, key=FOREMOST.index, default="unusable")
    sender = address_in(str(entry.get("From") or ""))
    return Line(due, kind, path, since, sender, recipient, first["Attempts"], error or first["Error"], text)


def plain_line(path, values, mtime, whole):
    """line_of() an entry that is plain(). Raises ValueError."""
    packed, name, sender, address, status, attempts, minute, second, error, since, and_second = values
    if "\\" in packed:
        sender, address, error = text_in(sender), text_in(address), text_in(error)
    attempts, next_attempt = int(attempts), minute_of(minute) + float(second)
    if (kind := kind_of(int(status), attempts, error)) == "unusable":
        raise ValueError
    due = next_attempt if status == "0" else math.inf
    since = minute_of(since) + float(and_second) or mtime(path)
    start = len(name) + 5  # a tab, two quotes, colon, space
    entry = packed[start:].replace("\n", "").replace("\t", "") if whole else "null"
    return Line(due, kind, path, since, address_in(sender), address, attempts, error, entry)


def kind_of(status, attempts, error):
    """What a mail is called for one of its recipients. "unusable": it has it, and yet the file is still there."""
    if status == 2:
        return "given up" if error else "unusable"
    return "in flight" if status == 1 else "deferred" if attempts or error else "waiting"


@functools.lru_cache(maxsize=1000)  # an application has few senders
def address_in(field):
    return field.rpartition("<")[2].partition(">")[0]


@functools.lru_cache(maxsize=10_000)
def ago(seconds):
    """A duration in its largest unit: 45s, 12m, 3h, 2d."""
    for unit in "dhm":
        if seconds >= UNITS[unit]:
            return f"{int(seconds // UNITS[unit])}{unit}"
    return f"{max(0, seconds):.0f}s"


# What differs between errors that mean the same: what is in brackets, addresses, names of queue files.
BRACKETED = re.compile(r"<[^<>]*>")
PARTICULAR = re.compile(
    r"[^<>(),:;]+@[^<>(),:;]+|(?<![\w.-])(?:(?=[A-F]*\d)(?=\d*[A-F])[0-9A-F]{3,}"
    r"|(?=[A-Za-z-]*\d[A-Za-z-]*\d)[\w-]{8,}(?:\.\d+)?)(?![\w-]|\.\w)"
)


def alike(error):
    """An error less what is particular to it."""
    return general(BRACKETED.sub("", error[:500]))


@functools.lru_cache(maxsize=10_000)  # most errors differ only by what is in brackets
def general(text):
    return " ".join(filter(None, map(general_word, text.split()))).replace(" :", ":").strip(" :")


general_word = functools.lru_cache(maxsize=10_000)(functools.partial(PARTICULAR.sub, ""))


class Tally:
    """What there is to say of lines in all: how many there are of each kind and with each error, and the oldest."""

    def __init__(self, lines=()):
        self.kinds, self.errors, self.oldest = collections.Counter(), collections.Counter(), None
        deque(self.passing(lines), 0)

    def passing(self, lines):
        """The lines; each is counted as it passes."""
        lines = iter(lines)
        while some := [*itertools.islice(lines, PAGE_ROWS)]:
            self.kinds.update(line.kind for line in some)
            for text, count in collections.Counter(line.error for line in some if line.error).items():
                error = alike(text)
                self.errors[error if error in self.errors or len(self.errors) < MOST_ERRORS else "others"] += count
            patient = [line for line in (self.oldest, *some) if line and line.kind in PATIENT]
            self.oldest = min(patient, key=operator.attrgetter("since"), default=None)
            yield from some


def relays_of(facts):
    """Each Relay.fact() in the facts of a daemon, as a dict."""
    for key, value in facts.items():
        if key.startswith("relay "):
            state, again, reason = [*value.split(", ", 2), "", ""][:3]
            yield {"address": key[6:], "state": state, "again": again.removeprefix("tried again "), "reason": reason}


def summary_of(tally, facts, now, older=math.inf):
    """What -status says above the table, as a dict. facts: the daemon's, None if none runs; older: seconds."""
    facts, oldest = facts or {}, tally.oldest
    state = "not running" if not facts else "suspended" if facts.get("suspended") == "yes" else "running"
    is_today = facts.get("today") == time.strftime("%Y-%m-%d", time.localtime(now))
    summary = {
        "daemon": state,
        **{key: facts.get(key) for key in ("version", "since")},
        "pid": int_or_zero(facts.get("pid")),
        "relays": [*relays_of(facts)],
        "sent_today": int_or_zero(facts.get("sent today")) if is_today else 0,
        "sent": int_or_zero(facts.get("sent")),
        "next_turn": facts.get("next turn"),
        "trouble": facts.get("trouble"),
        "mails": {kind: tally.kinds[kind] for kind in KINDS},
        "oldest": oldest and {"path": oldest.path, "seconds": round(now - oldest.since)},
        "errors": dict(tally.errors.most_common()),
    }
    return {**summary, "attention": [*attention(summary, older)]}


def attention(summary, older):
    """Why somebody should look; nothing if all is well."""
    if summary["daemon"] != "running":
        yield f"the daemon is {summary['daemon']}"
    for relay in summary["relays"]:
        if relay["state"] != "up":
            yield f"relay {relay['address']} is down"
    if summary["trouble"]:
        yield summary["trouble"]
    for kind in ("given up", "unusable"):
        if count := summary["mails"][kind]:
            yield f"{count} {kind}"
    if summary["oldest"] and summary["oldest"]["seconds"] > older:
        yield f"a mail waits for {ago(summary['oldest']['seconds'])}"


def headlines(summary, now):
    """The lines above the table."""
    yield daemon_line(summary, now)
    for relay in summary["relays"]:
        if relay["state"] != "up":
            again = ago(moment_of(relay["again"]) - now)
            yield f"relay: {relay['address']} is {relay['state']}, tried again in {again}, {relay['reason']}"
    if summary["daemon"] != "not running":
        yield f"sent: {summary['sent_today']} today, {summary['sent']} since the start"
    if summary["next_turn"]:
        yield f"rate: the next turn is in {ago(moment_of(summary['next_turn']) - now)}"
    yield "mails: " + ", ".join(f"{count} {kind}" for kind, count in summary["mails"].items())
    if oldest := summary["oldest"]:
        yield f"oldest: {ago(oldest['seconds'])}, {oldest['path']}"
    for error, count in itertools.islice(summary["errors"].items(), 5):
        yield f"error: {count} x {error}"
    if summary["attention"]:
        yield f"attention: {', '.join(summary['attention'])}"


def daemon_line(summary, now):
    if summary["daemon"] == "not running":
        return "daemon: not running"
    hint = "; -flush ends it" if summary["daemon"] == "suspended" else ""
    since = f", since {ago(now - moment_of(summary['since']))}" if summary["since"] else ""  # it is just starting
    version = f", version {summary['version']}" if summary["version"] else ""
    return f"daemon: {summary['daemon']}, pid {summary['pid'] or 'not known here'}{version}{since}{hint}"


def waits_for(summary):
    """What a mail that is due waits for."""
    relays = summary["relays"]
    if relays and all(relay["state"] != "up" for relay in relays):
        return "relay"
    return "rate" if summary["next_turn"] else "now"


def table(lines, now, when_due="now"):
    """Rows of text; the first is the heading. when_due: what waits_for() a mail that is due."""
    yield TITLES
    for due, kind, path, since, sender, recipient, attempts, error, _ in lines:
        is_now = "now" if kind == "in flight" else when_due
        wait = "-" if due == math.inf else ago(int(due - now)) if due > now else is_now
        name = path.rpartition(os.sep)[2]
        sender = sender or ("" if kind == "new" else "<>")  # a new mail's is not known; a bounce's is <>
        yield (name, kind, ago(int(now - since)), sender, recipient, str(attempts), wait, error)


def aligned(rows, width):
    """Rows as lines with aligned columns, cut to width unless it is 0, without control characters."""
    rows = list(rows)
    widths = [min(40, max(map(len, column))) for column in zip(*rows)]
    form = "  ".join(f"%-{size}s" for size in widths[:-1]) + "  %s"
    return [one_line(form % row)[: width or None].rstrip() for row in rows]


def text_report(lines, summary, now, width=0, height=sys.maxsize):
    """Lines of text, cut to a terminal's size if there is one."""
    text = [one_line(line)[: width or None] for line in headlines(summary, now)]
    if lines:
        shown = lines[: max(1, height - len(text) - 4)]  # less an empty line, heading, "more", prompt
        text += ["", *aligned(table(shown, now, waits_for(summary)), width)]
        text += [f"... and {len(lines) - len(shown)} more"] if len(shown) < len(lines) else []
    return text


def json_line(line):
    """A mail as JSON. since, next: seconds since 1970, null for never; entry: as in the status file, or null."""
    due = "null" if line.due == math.inf else f"{line.due:.0f}"
    mail = f'"path": {json.dumps(line.path)}, "state": "{line.kind}", "since": {line.since:.0f}, "next": {due}'
    return f'{{{mail}, "entry": {line.entry}}}'


def all_about(line, now):
    """Lines of text about one mail and each of its recipients."""
    yield line.path
    yield f"  {line.kind}, for {ago(now - line.since)}, from {line.sender or '<>'}{line.error and ', '}{line.error}"
    for recipient in recipients(json.loads(line.entry) or {}):
        what, wait = state(recipient), next_attempt_of(recipient) - now
        next_in = "" if what != WAITING else f", next in {ago(wait)}" if wait > 0 else ", due now"
        attempts = f", attempts: {recipient['Attempts']}{next_in}" if what != DELIVERED else ""
        yield f"  {recipient['Address']}: {what}{attempts}{recipient['Error'] and ', '}{recipient['Error']}"


def report(options, stream, now):
    """Print how the spool is doing, without disturbing the daemon. Returns the exit status.

    Raises OSError, CorruptStatus.
    """
    spool, in_json = spool_of_others(options), options.format == "json"
    gc.disable()  # many small objects, none of them garbage
    (failed, status), facts = failed_of(spool), spool.owner()
    paths = [*spool.list(), *failed]
    entries = spool.at_home(read_status(spool.status_path, spool.owners))
    lines = lines_of(entries, paths, now, bool(facts), whole=in_json or bool(options.names), held=spool.held())
    if options.names:
        return report_on(spool, options.names, lines, stream, now, in_json)
    summary = summary_of(Tally(lines), facts, now, options.older)
    size = shutil.get_terminal_size() if stream.isatty() else ()
    text = [json.dumps(summary), *map(json_line, lines)] if in_json else text_report(lines, summary, now, *size)
    stream.write("\n".join(text) + "\n")
    return EX_UNAVAILABLE if not facts else EX_ERROR if summary["attention"] else status


def failed_of(spool):
    """(paths of what was given up, the exit status): who planted a .failed hides nothing else."""
    try:
        return spool.list_failed(), EX_OK
    except OSError as error:
        return [], complain(describe(error))


def report_on(spool, names, lines, stream, now, in_json):
    """Print all about the mails of these names. Returns EX_ERROR if one of them is not there."""
    found = {}
    for line in lines:
        found.setdefault(os.path.basename(line.path), []).append(line)
    status = EX_OK
    for name in map(os.path.basename, names):
        if name not in found:
            status = complain(f"{name or shown(name)} {absence(spool.path(name))}")
        for line in found.get(name, ()):
            text = [json_line(line)] if in_json else map(one_line, all_about(line, now))
            stream.write("\n".join(text) + "\n")
    return status


def absence(path):
    """Why nothing is known of a mail. Raises OSError."""
    if look(path):
        return "is ignored: mails are regular files whose names do not begin with a dot"
    return "is not in the spool: it was sent, or removed, or never there"


def spool_of_others(options):
    """The spool for someone who only asks: its owner's and the daemon's are trusted too. Raises OSError."""
    spool = Spool(options.directory, options.json)
    if hasattr(os, "geteuid"):
        spool.owners = {*ourselves(), os.stat(spool.directory).st_uid, *spool.holder()}
    return spool


def ask_to_flush(options, stream):
    """Have the daemon send everything now. Returns the exit status. Raises OSError."""
    spool = spool_of_others(options)
    if not (owner := spool.owner()):
        return complain(f"no daemon runs on {spool.directory}")
    if not (pid := int_or_zero(owner["pid"])):
        return complain(f"the daemon of {spool.directory} is not to be reached from here")
    try:
        os.kill(pid, signal.SIGURG)
    except AttributeError:  # Windows
        return complain("the daemon cannot be asked: this system has no SIGURG; start it again instead")
    except OSError as error:
        return complain(f"pid {pid} cannot be asked, {describe(error)}")
    stream.write(f"pid {pid} was asked to send everything now\n")
    return EX_OK


class Progress:
    """Tells now and then how far the queue is, if it takes more than a few seconds. Pure: now is passed in.
    interval: seconds; show: what its texts go to."""

    def __init__(self, interval, show=log):
        self.interval, self.show = interval, show
        self.past = deque()  # (when, mails sent by then): the start of the work, then each text of the last ten seconds

    def line(self, now, waiting, in_flight, sent, turn=0):
        """The text to show, or an empty one. turn: for how many seconds -rate holds back what waits."""
        if not in_flight and (not waiting or turn >= NEAR_SECONDS):
            self.past.clear()
            return ""
        if not self.past:
            self.past.append((now, sent))
        if now < self.next_word():
            return ""
        while len(self.past) > 1 and now - self.past[0][0] > SPEED_SECONDS:
            self.past.popleft()
        start, before = self.past[0]
        self.past.append((now, sent))
        speed = (sent - before) / (now - start)
        left = (waiting + in_flight) / speed if speed and turn <= self.interval else math.inf
        if left < 3:
            return ""
        shown, ending = f"{speed:.{0 if speed >= 10 else 1}f}", "" if left == math.inf else f", {ago(left)} left"
        return f"{waiting} waiting, {in_flight} in flight, {sent} sent, {shown} mails/s{ending}"

    def next_word(self):
        """The earliest time of the next text; infinity if there is no work."""
        return self.past[-1][0] + self.interval if self.past else math.inf


class Facts:
    """What nobody knows but the running daemon. -status reads it in the lock file, and the page asks for it."""

    def __init__(self, spooler):
        self.spooler, self.since = spooler, format_time(spooler.clock())
        self.totals = {"sent": 0, "deferred": 0, "given up": 0}  # recipients, since the start
        self.today, self.sent_before = time.strftime("%Y-%m-%d"), 0  # of the total, what was sent before today
        self.next_look = 0.0  # when they may be published again (monotonic); 0 for as soon as something happens

    def go_on_counting(self, before):
        """before: the facts of the daemon that was here before."""
        if before.get("today") == self.today:
            self.sent_before = -int_or_zero(before.get("sent today"))

    def now(self):
        """A dict of texts; moments are RFC 3339."""
        spooler, today, sent = self.spooler, time.strftime("%Y-%m-%d"), self.totals["sent"]
        if today != self.today:
            self.today, self.sent_before = today, sent
        facts = {"version": VERSION, "since": self.since, "suspended": "yes" if spooler.suspended else "no"}
        facts.update((f"relay {relay.name}", relay.fact()) for relay in spooler.relay.relays)
        facts.update({"sent": str(sent), "sent today": str(sent - self.sent_before), "today": today})
        if complaint := spooler.status.complaint:
            facts["trouble"] = f"the status file cannot be written: {complaint}"
        if turn := spooler.turn():
            facts["next turn"] = format_time(spooler.turnstile.clock() + turn)
        return facts

    def publish(self):
        """Let -status know them, if they have changed; then not for a while."""
        facts, spool = self.now(), self.spooler.spool
        is_news = facts != spool.published
        self.next_look = time.monotonic() + FACTS_SECONDS if is_news else 0.0
        if is_news:
            spool.publish(facts)


class ServiceManager:
    """Tells systemd how the daemon is doing (sd_notify(3)), if it listens.

    environ: NOTIFY_SOCKET, and for the watchdog WATCHDOG_USEC and WATCHDOG_PID.
    """

    def __init__(self, environ):
        self.address = environ.get("NOTIFY_SOCKET", "")
        is_ours = self.address and environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.interval = int_or_zero(environ.get("WATCHDOG_USEC")) / 2e6 if is_ours else 0
        self.next_sign = 0.0 if self.interval else math.inf
        self.said = ""

    def tell(self, text):
        """Send a text if it differs from the last one. Nothing depends on it."""
        if self.address and text != self.said:
            self.said = text
            self._send(text)

    def sign_of_life(self, now):
        """For the watchdog, twice in each of its intervals. now is monotonic."""
        if now >= self.next_sign:
            self.next_sign = now + self.interval
            self._send("WATCHDOG=1")

    def _send(self, text):
        with contextlib.suppress(OSError, AttributeError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)  # never wait for a service manager
            sock.sendto(text.encode(), "\0" + self.address[1:] if self.address[0] == "@" else self.address)


class FailCommand:
    """Runs -failcommand for the mails that were given up, one at a time."""

    def __init__(self, spooler, environ):
        self.spooler, self.command = spooler, spooler.options.failcommand
        self.environ = environment_of_commands(environ)
        self.line = deque()  # (mail, its entry as JSON); the command runs for the first

    def add(self, mail):
        """A mail was given up, and lies in .failed."""
        if not self.command:
            return
        if len(self.line) >= FAIL_LINE:
            return log(f"{named(mail.path)} -failcommand is not run for it: {FAIL_LINE} mails wait for that already")
        self.line.append((mail, f"{json.dumps({'File': mail.path, **mail.envelope()})}\n".encode()))
        self.spooler.wake.set()

    def has_work(self):
        """Whether the command runs, or may run soon: not while the status file cannot be written."""
        status = self.spooler.status
        return bool(self.line) and not (status.complaint and self.line[0][0].news > status.written)

    def keep_running(self):
        """Run the command for each mail in the line; the loop starts this again whenever the line is not empty."""
        while self.line:
            mail, entry = self.line[0]
            while not self.spooler.status.commit(mail):
                gevent.sleep(QUIET_SECONDS)  # suspended, or the status cannot be written
            try:
                self.run(entry)
            except OSError as error:
                log(f"{named(mail.path)} -failcommand: {describe(error)}")
            self.line.popleft()

    def run(self, entry):
        """Run the command, then kill whatever it left running. Raises OSError if it fails."""
        process = subprocess.Popen(
            self.command, shell=True, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=self.environ,
            start_new_session=True
        )  # fmt: skip
        try:
            with limited(FAIL_SECONDS, f"it took longer than {FAIL_SECONDS} s"):
                process.communicate(entry)
            if process.returncode:
                raise OSError(f"it failed with exit status {process.returncode}")
        finally:
            kill_all(process)

    def stop(self, seconds):
        """The line has some seconds left; the rest of it is logged."""
        if self.has_work():
            self.spooler.keep("failcommand", self.keep_running)
            self.spooler.keepers["failcommand"].join(seconds)
        for mail, _ in self.line:
            log(f"{named(mail.path)} -failcommand was not run for it to the end: the daemon stops")


# -------------------------------------------------------------------- page
#
# -http: what -status tells, for browsers, Prometheus and monitors. What holds:
#
# 1. Nothing can be changed by it. A request has 8 KB and 5 s, its answer 10 s; then the connection is closed.
# 2. However many mails there are, nothing blocks the loop for over 20 ms: one greenlet looks through the queue,
#    a few milliseconds at a time, and what it found is good for twenty times as long as the look took.
# 3. What comes from a mail, a relay or a file's name gets into the page through shown_text() only.

PAGE_ROWS = 100  # mails that are shown
TURN_SECONDS = 0.005  # how long the page does something before everybody else has a turn
PAGE_SECONDS = 1  # how long an answer is good
TEXT = "text/plain; charset=utf-8"
REQUEST_LIMIT, REQUEST_SECONDS, ANSWER_SECONDS = 8192, 5, 10
VISITORS = 1000  # connections at once; more wait
STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --dim: #57606a; --line: #d5dae0; --bad: #b42318;
  --good: #1a7f4b; --sent: #2a7de1; --deferred: #d99000; --given: #c62f2f }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --text: #e4e8ec; --dim: #98a2ad; --line: #333a42;
  --bad: #ff8a7a; --good: #5fd39a; --sent: #5aa2f5; --deferred: #e8b04a; --given: #f0625f } }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; font: 15px/1.45 system-ui, sans-serif; color: var(--text);
  background: var(--back); overflow-wrap: anywhere }
h1, h2, p { margin: 0 } h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 1.5rem 0 .4rem }
.bad { color: var(--bad) } .good { color: var(--good) } .dim { color: var(--dim) }
.Mails { display: flex; flex-wrap: wrap; gap: .5rem 2rem } .Mails b { display: block; font-size: 1.6rem }
svg { display: block; width: 100%; height: 8rem; border-bottom: 1px solid var(--line) }
.sent { color: var(--sent) } .deferred { color: var(--deferred) } .given { color: var(--given) }
rect { fill: currentcolor }
i { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .8em; background: currentcolor }
table { border-collapse: collapse; width: 100%; font-size: .87rem } th { color: var(--dim); font-weight: 500 }
th, td:nth-child(2), td:nth-child(3), td:nth-child(6), td:nth-child(7) { white-space: nowrap }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0; border-top: 1px solid var(--line) }
@media (max-width: 60rem) { thead { display: none } td { display: block; border: 0; padding: 0 }
  td:first-child { border-top: 1px solid var(--line); padding-top: .4rem; font-weight: 600 }
  td + td::before { content: attr(data-name) " "; color: var(--dim) } td:empty { display: none } }
"""
SECURITY = (
    ("Content-Security-Policy", "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
     f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"),
    ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store"),
    ("Cross-Origin-Resource-Policy", "same-origin"), ("Connection", "close"),
)  # fmt: skip
RELAY_FIGURES = {
    "relay_up": ("Whether a relay can be used.", lambda relay: int(not relay.down)),
    "connections": ("Open connections.", lambda relay: relay.established),
    "connections_opened_total": ("Connections that were opened.", lambda relay: relay.opened),
    "transactions_total": ("SMTP transactions.", lambda relay: relay.transactions),
    "transaction_seconds_total": ("Seconds that they took.", lambda relay: f"{relay.seconds:.6f}"),
}


class Page:
    """See the head of this section."""

    def __init__(self, spooler):
        self.spooler, self.server, self.where = spooler, None, ""
        self.marks = deque([(0, 0, 0)] * 60, maxlen=60)  # recipients, at the beginning of each of the last 60 minutes
        self._drawing, self._found, self._good_until = gevent.lock.BoundedSemaphore(), None, 0.0
        pages = {"/": self.page, "/metrics": self.metrics, "/health": self.health}
        self.drawn = {path: (draw, 0.0, None) for path, draw in pages.items()}  # (how, good until when, the answer)

    # -- the server

    def open(self, where, visitors):
        """Start to answer requests. where: as in the options; visitors: the most at once. Raises OSError."""
        from gevent import pywsgi  # takes 10 ms, and only the page needs it

        listener, self.where = listen_on(where), where
        self.server = pywsgi.WSGIServer(
            listener, self, spawn=gevent.pool.Pool(visitors), log=None, error_log=None,
            handler_class=visit_class(pywsgi), environ={"SERVER_NAME": "localhost"}
        )  # fmt: skip
        self.server.max_accept = 10  # in one turn
        self.server.start()
        self.spooler.keep("page", self.mark_minutes)

    def close(self):
        if self.server:
            self.server.stop(0)
            if isinstance(self.where, str):
                with contextlib.suppress(OSError):
                    os.unlink(self.where[5:])

    def mark_minutes(self):
        """Note the tally at each minute's beginning, for ever."""
        end = time.monotonic()
        while True:
            end += 60
            gevent.sleep(max(0, end - time.monotonic()))
            self.marks.append(tuple(self.spooler.facts.totals.values()))

    def __call__(self, environ, start_response):
        """The WSGI application."""
        method, host = environ["REQUEST_METHOD"], environ.get("HTTP_HOST", "")
        status, kind, body = self.answer(method, environ["PATH_INFO"], host, environ["LOCAL"])
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("Allow", "GET, HEAD"), *SECURITY]
        start_response(status, headers)
        return [] if method == "HEAD" else [body]

    def answer(self, method, path, host, local):
        """(status, content type, body). local: our end of the connection, as getsockname() returns it."""
        if isinstance(local, tuple) and not is_ours(host, local[0], self.where):
            return "421 Misdirected Request", TEXT, b"The Host is not the address that this page is at.\n"
        if method not in ("GET", "HEAD"):
            return "405 Method Not Allowed", TEXT, b"GET and HEAD only.\n"
        if path not in self.drawn:
            return "404 Not Found", TEXT, f"There are {', '.join(self.drawn)}.\n".encode()
        return self.draw(path)

    def draw(self, path):
        """The same answer for all who ask within a second."""
        with self._drawing:
            draw, until, answer = self.drawn[path]
            if time.monotonic() >= until:
                status, kind, text = draw()
                answer = status, f"{kind}; charset=utf-8", text.encode("utf-8", "replace")
                self.drawn[path] = draw, time.monotonic() + PAGE_SECONDS, answer
            return answer

    # -- what there is to say

    def summary(self):
        """(summary_of() all mails, the lines of the first of them)."""
        spooler, now, began = self.spooler, self.spooler.clock(), time.monotonic()
        if began >= self._good_until:
            tally = Tally()
            self._found = tally, heapq.nsmallest(PAGE_ROWS, tally.passing(self.lines(now)))
            self._good_until = began + 21 * (time.monotonic() - began)
        tally, lines = self._found
        return summary_of(tally, spooler.facts.now(), now, spooler.options.older), lines

    def lines(self, now):
        """A Line for each mail, also for what lies in .failed and is not known."""
        queue, failed = self.spooler.queue, []
        with contextlib.suppress(OSError):
            failed = off_the_hub(self.spooler.spool.list_failed)
        for mail in in_turns([*queue.mails.values()]):
            if mail.state != LEFT and (line := page_line(mail, now)):
                yield line
        for path in in_turns(failed):
            if path not in queue.mails and (since := written(path)):
                yield line_without_entry(path, since, now)

    def health(self):
        text = "".join(f"{one_line(line)}\n" for line in self.summary()[0]["attention"])
        return "503 Service Unavailable" if text else "200 OK", "text/plain", text or "ok\n"

    def metrics(self):
        spooler, (summary, _) = self.spooler, self.summary()
        wait, mails = summary["oldest"]["seconds"] if summary["oldest"] else 0, summary["mails"]
        build = {"version": VERSION, "python": sys.version.split()[0], "gevent": gevent.__version__}
        families = [
            ("build_info", "What runs.", [(build, 1)]),
            ("mails", "Mails by state.", [({"state": kind}, count) for kind, count in mails.items()]),
            ("oldest_wait_seconds", "For how long the oldest mail has been waiting.", [({}, wait)]),
            ("suspended", "Whether it is suspended.", [({}, int(spooler.suspended))]),
        ]
        for kind, count in spooler.facts.totals.items():
            families.append((f"recipients_{kind.replace(' ', '_')}_total", f"Recipients {kind}.", [({}, count)]))
        for name, (about, value) in RELAY_FIGURES.items():
            families.append((name, about, [({"relay": each.name}, value(each)) for each in spooler.relay.relays]))
        return "200 OK", "text/plain; version=0.0.4", "".join(family_text(*family) for family in families)

    def page(self):
        spooler, now, (summary, lines) = self.spooler, self.spooler.clock(), self.summary()
        where, troubles = shown_text(spooler.spool.directory), summary["attention"]
        rows = [html_row(row) for row in in_turns(table(lines, now, waits_for(summary)))]
        rows[0] = f"<table><thead><tr><th>{'<th>'.join(TITLES)}</thead>"
        sections = {
            "": [f"<p class=bad>{shown_text(line)}" for line in troubles] or ["<p class=good>All is well"],
            "Mails": [f"<p><b>{count}</b>{kind}" for kind, count in summary["mails"].items()],
            "Relays": [html_relay(relay, now) for relay in summary["relays"]],
            "The last 60 minutes": [chart(spooler.facts.totals, [*self.marks, tuple(spooler.facts.totals.values())])],
            "Errors": [f"<p>{count} x {shown_text(error)}" for error, count in [*summary["errors"].items()][:10]],
            f"The first {PAGE_ROWS} mails": [*rows, "</table>"],
        }
        return "200 OK", "text/html", "".join([
            "<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=refresh content=10>"
            "<meta name=viewport content='width=device-width, initial-scale=1'>"
            f"<title>{'! ' if troubles else ''}Spoolgore: {where}</title><style>{STYLE}</style>"
            f"<h1>Spoolgore</h1><p class=dim>{VERSION} on {where}, since {spooler.facts.since[:19]}Z",
            *[f"<h2>{each}</h2><div class='{each}'>{''.join(sections[each]) or 'None'}</div>" for each in sections],
        ])  # fmt: skip


def in_turns(things):
    """The things one by one. Everybody else has a turn now and then; a sleep of 0 would not do, since gevent looks at
    its sockets only once in fifty of these."""
    until = time.monotonic() + TURN_SECONDS
    for thing in things:
        yield thing
        if time.monotonic() > until:
            gevent.sleep(0.001)
            until = time.monotonic() + TURN_SECONDS


def written(path):
    """modified(); 0 also if that is not to be known."""
    with contextlib.suppress(OSError):
        return modified(path)
    return 0.0


def page_line(mail, now):
    """A mail's Line, None if it is no mail; very many recipients are only counted."""
    entry = mail.entry
    if entry is None:
        return (since := written(mail.path)) and line_without_entry(mail.path, since, now)
    if isinstance(entry, bytes) and len(entry) <= CHUNK:
        line = line_of(mail.path, plain(entry) or mail.envelope(), written)
    elif isinstance(entry, dict) and len(recipients(entry)) <= PAGE_ROWS * 5:
        line = line_of(mail.path, entry, written)
    else:
        text = entry if isinstance(entry, bytes) else pack(mail.path, entry)
        many, seen = text.count(b'"Address"'), text.rpartition(b'\n\t\t"Enqueued": "')[2].partition(b'"')[0]
        kind = {FLYING: "in flight", STUCK: "unusable", ASIDE: "given up"}.get(mail.state, "deferred")
        line = Line(mail.due, kind, mail.path, moment_of(seen.decode()) or now, "...", f"{many} recipients")
    return held_line(line, now) if mail.state == ASIDE and not is_aside(mail.path) else line


def family_text(name, about, samples):
    """A family of metrics in Prometheus' text format. samples: (labels, value) pairs."""
    kind = "counter" if name.endswith("_total") else "gauge"
    lines = [f"# HELP spoolgore_{name} {about}", f"# TYPE spoolgore_{name} {kind}"] if samples else []
    for labels, value in samples:
        pairs = ",".join(f"{key}={json.dumps(one_line(text), ensure_ascii=False)}" for key, text in labels.items())
        lines.append(f"spoolgore_{name}{f'{{{pairs}}}' if pairs else ''} {value}")
    return "".join(f"{line}\n" for line in lines)


def shown_text(text):
    """Any text, as it may be put into the page."""
    return html.escape(one_line(text[:500]))


def html_relay(relay, now):
    """relay: from relays_of()."""
    if relay["state"] == "up":
        return f"<p class=good>{shown_text(relay['address'])} is up"
    again = ago(moment_of(relay["again"]) - now)
    return f"<p class=bad>{shown_text(relay['address'])} is down, tried again in {again}: {shown_text(relay['reason'])}"


def html_row(row):
    return f"<tr>{''.join(f'<td data-name={name!r}>{shown_text(cell)}' for name, cell in zip(TITLES, row))}"


def chart(kinds, marks):
    """An SVG of the recipients in each minute. marks: how many of each kind in all, at each minute's beginning."""
    minutes = [[b - a for a, b in zip(before, after)] for before, after in zip(marks, marks[1:])]
    most, bars = max(map(sum, minutes)), []
    for number, minute in enumerate(minutes):
        words = ", ".join(f"{count} {kind}" for count, kind in zip(minute, kinds))
        ends = [100 - 100 * height / (most or 1) for height in itertools.accumulate(minute)]
        rects = [
            f"<rect class='{kind}' x={10 * number + 1} width=8 y={end:.2f} height={100 * count / most:.2f} />"
            for kind, count, end in zip(kinds, minute, ends) if count
        ]  # fmt: skip
        bars += [f"<g><title>{len(minutes) - number} min ago: {words}</title>{''.join(rects)}</g>"] if rects else []
    legend = "".join(f"<i class='{kind}'></i>{kind}" for kind in kinds)
    svg = f"<svg viewBox='0 0 600 100' preserveAspectRatio=none role=img aria-label='Recipients'>{''.join(bars)}</svg>"
    return f"{svg}<p class=dim>{legend}; recipients a minute, {most} at most"


# -- the server of the page


def listen_on(where):
    """A listening socket. where: as in the options. Raises OSError that names the flag."""
    try:
        if isinstance(where, Address):
            family, _, _, _, name = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)[0]
            listener = gevent.socket.socket(family)
            if os.name == "posix":  # elsewhere it would let two listen
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(name)
            if not is_loopback(name):
                log(f"-http {where}: whoever can reach this address sees who gets mail")
        else:
            listener = bind_privately(where[5:])
        listener.listen(VISITORS)
    except OSError as error:
        raise OSError(error.errno or errno.EINVAL, error.strerror or str(error), f"-http {where}") from None
    return listener


def bind_privately(path):
    """A socket at a path, for our user alone; it replaces one that nobody listens at. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), gevent.socket.socket(socket.AF_UNIX) as other:
        if stat.S_ISSOCK(os.lstat(path).st_mode) and other.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)
    listener, mask = gevent.socket.socket(socket.AF_UNIX), os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(mask)
    return listener


def is_ours(host, local, where):
    """Whether a request's Host is the address that it came to, not a name that somebody made lead here."""
    name = re.sub(r":\d+$", "", host).strip("[]").lower()
    return name in ("localhost", local.lower(), local.lower().replace("::ffff:", ""), where.host.lower())


def head_of(sock):
    """The head of a request; empty if it is too long or too slow, or ends too early. Raises OSError."""
    head = b""
    with gevent.Timeout(REQUEST_SECONDS, False):
        while b"\n\r\n" not in head and len(head) <= REQUEST_LIMIT and (more := sock.recv(REQUEST_LIMIT)):
            head += more
    return head if b"\n\r\n" in head and len(head) <= REQUEST_LIMIT else b""


def visit_class(pywsgi):
    """gevent's handler of a connection, with limits."""

    class Visit(pywsgi.WSGIHandler):
        def read_requestline(self):
            self.rfile = io.BytesIO(head_of(self.socket))
            self.socket.settimeout(ANSWER_SECONDS)
            return super().read_requestline()

        def read_request(self, raw_requestline):
            try:
                return super().read_request(raw_requestline)
            except Exception as error:  # noqa: BLE001 -- for anything else gevent prints a traceback
                raise ValueError(describe(error)) from None

        def get_environ(self):
            return {**super().get_environ(), "LOCAL": self.socket.getsockname()}

        def handle_error(self, kind, error, trace):
            self.close_connection = True
            if not isinstance(error, OSError):  # a visitor that reads too slowly, or has gone, is no news
                super().handle_error(kind, error, trace)

    return Visit


# ---------------------------------------------------------------- delivery
#
# One mail's journey in its greenlet: open, read, transact, settle. What holds:
#
# 1. Recipients are in flight before the first switch of their transaction: else an edit reaches them.
# 2. Who has a mail that others wait for is on the disk before anything else is done with it, if the disk can be
#    written. That a mail was given up is on the disk before its file moves, or it does not move.
# 3. Whatever happens to one mail stops no other; however its greenlet ends, landed() leaves it in a state.


class OutOfTurn(Exception):
    """-rate has no room yet for the recipients that the mail needs next."""


def name_message(mail, message):
    """The entry remembers which message it is of, and which file: both may be touched, and be held."""
    entry, name = mail.entry, message.message_id
    if "Message-ID" in message.missing:
        known = str(entry.get("MessageID"))
        name = known if OUR_MESSAGE_ID.fullmatch(known) else new_message_id(message.sender, mail.identity[1:])
    set_file(entry, mail.identity, name)
    if message.missing:
        message.add(max(enqueued(entry), 0) or mail.identity[3] / 1e9, name)


def judged(mail, envelope, message, now):
    """The file was changed while it was held, in .failed, or settled: is it the same mail? In doubt it is another one.
    Returns the entry that it has from now on."""
    is_same = bool(message.message_id) and message.message_id == envelope.get("MessageID")
    verdict = "has the same Message-ID: nobody gets it twice" if is_same else "is taken for a new mail"
    fresh = changed(envelope, message, is_same, now)
    has = {each["Address"] for each in recipients(envelope) if state(each) == DELIVERED}
    again = [to for to in map(ADDRESS, recipients(fresh)) if to in has]
    if again and not is_same:
        verdict += f", and goes to {', '.join(again)} again"
    log(f"{named(mail.path)} was changed meanwhile, and {verdict}")
    return fresh


class Delivery:
    """See the head of this section. mail: FLYING; it may turn out to be another one that was renamed."""

    __slots__ = ("spooler", "mail", "path", "file", "size", "names", "message")

    def __init__(self, spooler, mail):
        self.spooler, self.mail, self.path = spooler, mail, named(mail.path)  # as the log calls it all the time
        self.file, self.names, mail.delivery = None, 1, self

    def run(self):
        try:
            if self.open() and self.read():
                self.deliver()
        except Unfinished:
            self.rest(QUIET_SECONDS)
        except (OSError, MemoryError) as error:
            self.cannot_reach(error)
        except Exception:  # noqa: BLE001
            log.traceback(f"{self.path} unexpected error, it is tried again in a minute")

    def landed(self, _greenlet):
        """The greenlet has ended, or could not even begin."""
        mail, queue = self.mail, self.spooler.queue
        if self.file:
            self.file.close()
        if mail.delivery is not self:
            return
        mail.delivery, mail.is_open = None, False
        if mail.state == FLYING:
            self.rest()
        if mail.state != LEFT and isinstance(mail.entry, dict):
            interrupted(mail.entry)
            if self.names == 1 and not is_partly_delivered(mail.entry):
                queue.forget(mail)
            mail.entry = pack(mail.path, mail.entry)
        if queue.taking is mail:
            queue.began(mail)
        self.spooler.status.wanted.set()
        self.spooler.wake.set()

    def rest(self, seconds=60):
        """Unless something else has become of it already."""
        if self.mail.state == FLYING:
            self.spooler.queue.rest(self.mail, self.spooler.clock() + seconds)

    # -- its file

    def open(self):
        """True when the file is open, nobody writes it, and it is this mail's alone."""
        mail, spooler = self.mail, self.spooler
        if spooler.queue.counts[ASIDE]:
            spooler.lookout.take_back(mail)
        try:
            self.file, refused, status = spooler.spool.open(mail.path)
        except FileNotFoundError:
            return spooler.lookout.gone(mail)
        except NotAMail as error:
            return self.stick(str(error))
        except PermissionError as error:
            if msvcrt:  # another program has it open, and may end that without a change
                return self.cannot_reach(error)
            return self.stick(self.shown(f"unable to read mail file, {error.strerror}"))
        if refused is not False and is_being_written(refused, status, spooler.clock(), mail.whole):
            return self.rest(QUIET_SECONDS)
        if refused:
            log(f"{self.path} is sent, though somebody has it open for writing: it was left alone for a minute")
        self.size, self.names, known = status.st_size, status.st_nlink, identity(status)
        if not self.is_its_own(known):
            return False
        self.mail.print, self.mail.is_open = hash(known), True
        return True

    def is_its_own(self, known):
        """False when the file is another mail's, which has one more name, or a new one."""
        queue, mail = self.spooler.queue, self.mail
        other = queue.identify(mail, known)
        if other is mail:
            return True
        if other.state != LEFT and (there := look(other.path)) and identity(there)[:2] == known[:2]:
            # two names of one file are one mail: this one goes when the other does, and what is known of it is kept
            return queue.drop(mail) if mail.entry is None else self.rest(max(1, self.spooler.options.freq))
        queue.lose(mail)  # its file may be here by another name: two may have been swapped
        self.spooler.lookout.rename(other, mail.path)
        if other.state == FLYING:
            return False
        queue.taking = other if queue.taking is mail else queue.taking
        queue.become(other, FLYING)
        self.mail, other.delivery = other, self
        return True

    def stick(self, reason):
        """Leave the file alone until it changes. The reason is said once of each change."""
        mail, before = self.mail, self.mail.seen
        mail.seen = signature(os.fstat(self.file.fileno()) if self.file else look(mail.path))  # of what was read
        self.spooler.queue.become(mail, STUCK)
        if reason and mail.seen != before:
            log(f"{self.path} {reason}")

    def shown(self, reason):
        """The entry says why the file cannot be sent, beside what is known. Returns the reason."""
        mail = self.mail
        envelope = mail.envelope() or new_envelope(None, self.spooler.clock())
        if isinstance(envelope, dict):  # an edit may have made anything of it
            mail.entry = pack(mail.path, {**envelope, "Error": reason})
        return reason

    def cannot_reach(self, error):
        """Out of descriptors or memory, or a fault of the disk: the file itself may be fine, and need not change."""
        self.rest(PROBE_SECONDS if isinstance(error, FileNotFoundError) else 60)  # that is the whole directory's
        reason = getattr(error, "strerror", "") or describe(error)
        self.spooler.say("read", f"unable to read mail files, {reason} (it is tried again)")
        if not isinstance(self.mail.entry, dict):
            self.shown(f"unable to read mail file, {reason}")

    # -- its envelope

    def read(self):
        """True when there is a message, and somebody to have it."""
        mail = self.mail
        try:
            if self.size < CHUNK:
                self.message = Message(self.file, self.size)
            else:  # a header of some MB takes seconds to parse, in which nobody else would be served
                self.message = off_the_hub(Message, self.file, self.size)
            mail.forced |= mail.entry is None
            mail.entry = new_envelope(self.message, self.spooler.clock()) if mail.entry is None else self.envelope()
            name_message(mail, self.message)
        except BadMessage as error:
            return self.stick(self.shown(f"unable to parse mail file, {error}"))
        except CorruptStatus as error:
            return self.stick(f"is held, its entry in the status file is malformed: {error}")
        if not recipients(mail.entry):
            return self.stick(self.shown("has no recipients"))
        self.spooler.status.wanted.set()
        return True

    def envelope(self):
        """The mail's own entry, to change. Raises CorruptStatus."""
        mail = self.mail
        envelope = mail.envelope()
        if problem := envelope_problem(envelope):
            raise CorruptStatus(problem)
        if may_be_anothers(envelope, mail.identity, self.message.message_id):
            return judged(mail, envelope, self.message, self.spooler.clock())
        renew(envelope, self.message, self.spooler.clock())
        if others := unknown_to(envelope, self.message):
            kept = f"{named(mail.path)} keeps the recipients of the first mail of its name, and not {others}"
            self.spooler.say(f"{mail.path} recipients", kept)
        return envelope

    # -- its transactions

    def deliver(self):
        """Transactions until nobody is due; then see what became of the mail."""
        mail, spooler, now = self.mail, self.spooler, self.spooler.clock()
        forced, mail.forced = mail.forced, False
        everybody = recipients(mail.entry)
        due = [each for each in everybody if each["Status"] == 0 and (forced or next_attempt_of(each) <= now)]
        try:
            self.transact_all(due)
        except (RelayDown, OutOfTurn) as error:  # nobody was asked: who was due is due
            interrupted(mail.entry, "" if spooler.stopping else str(error))
            mail.forced |= forced
            self.settle(error)
        except BaseException:
            interrupted(mail.entry)  # else those in flight would stay so until the next start
            if not spooler.spool.links(mail.path, mail.identity):
                self.settle()
            raise
        else:
            self.settle()

    def transact_all(self, asked):
        """Transactions until nobody is due; addresses that are no good are given up. Raises RelayDown, OutOfTurn."""
        spooler, most, due = self.spooler, self.spooler.turnstile.rate.most, []
        for recipient in asked:
            if problem := address_problem(recipient["Address"]):
                move(recipient, IN_FLIGHT, recipient["Error"])
                self.give_up(recipient, f"553 5.1.3 not sent: {problem}", "bad address")
            else:
                due.append(recipient)
        while due and not (spooler.suspended or spooler.stopping):
            due = self.transact(due[:most]) + due[most:]
            if due:
                spooler.status.commit(self.mail)
                named = {id(recipient) for recipient in recipients(self.mail.entry)}  # an edit may have come meanwhile
                due = [each for each in due if id(each) in named and each["Status"] == 0]

    def transact(self, batch):
        """One transaction; returns the recipients that the relay wants in another one. Raises RelayDown, OutOfTurn."""
        for recipient in batch:  # before the turn is written down: an edit that comes meanwhile leaves them alone
            move(recipient, IN_FLIGHT, recipient["Error"])
        outcomes, again, failure = self.send(batch), [], None
        for recipient in batch:
            try:
                again += [recipient] if self.conclude(recipient, *outcomes[recipient["Address"]]) else []
            except Exception as error:  # noqa: BLE001 -- what goes wrong with one is no reason to forget the others'
                failure = error
        if failure:
            raise failure
        return again

    def send(self, batch):
        """A dict from address to Outcome. Raises RelayDown, OutOfTurn."""
        spooler, path, turn = self.spooler, self.path, 0
        if not spooler.relay.down:
            turn = spooler.take_turn(self.mail, len(batch)) if spooler.options.rate else 0
            for recipient in batch:
                log(f"{path} sending mail to {recipient['Address']} attempt: {recipient['Attempts']}")
        addresses = list(dict.fromkeys(map(ADDRESS, batch)))
        went_out = True
        try:
            return spooler.relay.send(self.message.sender, addresses, self.message)
        except RelayDown:
            went_out = False
            raise
        except (gevent.GreenletExit, MemoryError) as error:
            ended = "stopped" if isinstance(error, gevent.GreenletExit) else "no memory"
            interrupted(self.mail.entry, f"{ended} in the middle of a transaction: the mail may have arrived")
            for recipient in batch:
                say_error(path, recipient)
            raise
        except Exception:  # noqa: BLE001
            log.traceback(f"{path} unexpected error")
            return dict.fromkeys(addresses, Outcome(Verdict.DEFERRED, "unexpected error, see the log"))
        finally:
            if turn:
                spooler.turnstile.end(turn, went_out)

    def conclude(self, recipient, verdict, text):
        """What a transaction's outcome means for one recipient; the only place that decides it. True: ask again."""
        mail, options = self.mail, self.spooler.options
        if verdict is Verdict.DELIVERED:
            move(recipient, DELIVERED)
            mail.news = self.spooler.queue.epoch
            self.spooler.facts.totals["sent"] += 1
            log(f"{self.path} successfully sent to {recipient['Address']}{text and ': '}{text}")
        elif verdict is Verdict.AGAIN:
            move(recipient, WAITING, text)
        elif recipient["Attempts"] + 1 >= options.attempts:
            self.give_up(recipient, text, "max SMTP attempts reached")
        elif verdict is Verdict.REFUSED and options.fail5xx:
            self.give_up(recipient, text, "permanent SMTP error")
        else:
            deferred(recipient, text, self.spooler.clock())
            self.spooler.facts.totals["deferred"] += 1
            say_error(self.path, recipient)
        return verdict is Verdict.AGAIN

    def give_up(self, recipient, text, reason):
        gave_up(recipient, text)
        self.spooler.facts.totals["given up"] += 1
        self.mail.news = self.spooler.queue.epoch
        say_error(self.path, recipient)
        log(f"{self.path} {reason} for {recipient['Address']} ... giving up")

    # -- its end

    def settle(self, stopped_by=None):
        """What becomes of the mail now: it waits, is put aside, or is done. stopped_by: RelayDown, OutOfTurn."""
        mail, path = self.mail, self.mail.path
        while not (is_settled := self.is_settled(stopped_by)) and self.find():
            pass
        if (mail.path != path or not is_settled) and look(path):
            self.spooler.lookout.appeared(path)  # what stands there now is another mail

    def is_settled(self, stopped_by):
        """False when its file is not what it was, or not there. Raises OSError when that is not to be known."""
        mail, spooler, queue = self.mail, self.spooler, self.spooler.queue
        end = state_of_all(mail.entry)
        if end != DELIVERED:
            known = spooler.status.commit(mail)
            end = state_of_all(mail.entry)  # that took time, and an edit may have come
        links = spooler.spool.links(mail.path, mail.identity)
        if not links:
            return False
        if end == DELIVERED:
            return self.is_done(self.remove, links)
        if end == GIVEN_UP and known:
            return self.is_done(functools.partial(spooler.lookout.put_aside, mail), links)
        if end == GIVEN_UP:  # suspended, or the status cannot be written: in a minute, see landed()
            return True
        if isinstance(stopped_by, OutOfTurn):
            queue.line_up(mail, queue.ahead)
        elif stopped_by and spooler.relay.down:
            queue.become(mail, GROUNDED)
        else:
            queue.rest(mail, 0.0 if mail.forced else next_attempt(mail.entry))
        return True

    def is_done(self, finish, links):
        """Finish a settled mail's file. False if that is not at its path; True if it is done, or tried in a minute."""
        mail, spooler = self.mail, self.spooler
        try:
            paths = [mail.path] if links == 1 else spooler.spool.names(mail.identity)
            if mail.path not in paths:
                return False
            self.file.close()  # Windows removes and renames no file that is open
            finish(paths)
        except OSError as error:
            if not spooler.spool.links(mail.path, mail.identity):  # it was renamed or removed a moment ago
                return False
            what = "is settled, unable to remove it" if finish == self.remove else "was given up, unable to move it"
            text = f"{self.path} {what}, {reason_of(error)} (it is tried again)"
            spooler.say(f"remove {mail.path}", text)
        return True

    def remove(self, paths):
        """Everybody has it."""
        for path in paths:
            os.unlink(path)
        self.spooler.queue.drop(self.mail)
        self.spooler.sent += 1

    def find(self):
        """The path leads to another file, or to none. True if ours has another name or time, which the queue knows
        now; False if the mail has left, or is held."""
        mail, queue = self.mail, self.spooler.queue
        if path := self.spooler.spool.name_of(self.file, mail.identity):
            queue.rename(mail, path)
            return True
        if self.is_touched():
            return True
        if self.spooler.lookout.is_held(mail):
            return False
        is_somewhere = self.file.closed or os.fstat(self.file.fileno()).st_nlink
        (queue.lose if is_somewhere else queue.drop)(mail)
        return False

    def is_touched(self):
        """Whether nothing but the file's time is another: some copiers set it last."""
        mail, queue = self.mail, self.spooler.queue
        if self.file.closed:
            return False
        now, before, message = identity(os.fstat(self.file.fileno())), mail.identity, self.message
        if now == before or now[:3] != before[:3]:
            return False
        if message.whole is not None:
            is_same = message.is_unchanged()
        else:  # copiers that set the time set one that is past
            is_same = now[3] < before[3] if message.checksum is None else off_the_hub(message.is_unchanged)
        if not is_same:
            return False
        queue.identify(mail, now)
        mail.print, mail.news = hash(now), queue.epoch  # else a reload brings back the time that it had
        set_file(mail.entry, now)
        return True


def say_error(path, recipient):
    log(f"{path} SMTP error, mail to {recipient['Address']} {recipient['Error']}")


# ----------------------------------------------------------------- spooler


class Lookout:
    """Which files there are, by events and scans, and what became of one that is not where it was."""

    def __init__(self, spooler):
        self.spooler, self.spool, self.queue = spooler, spooler.spool, spooler.queue
        self.since = spooler.clock()

    def watch(self):
        """See new names without a listing, for ever; where that cannot be had, the scan finds them."""
        spooler = self.spooler
        try:
            watch = Watch(self.spool.directory, self.spool.path(".spoolgore.lock"))
        except (OSError, AttributeError, TypeError) as error:
            text = f"no inotify ({describe(error)}): new mails are seen every {spooler.options.freq} s"
            return spooler.say("watch", text)
        spooler.next_scan = 0.0  # for what came before the watch
        try:
            while True:
                spooler.wake.set()
                for mask, name in watch.wait():
                    with contextlib.suppress(OSError):  # the scan will see
                        self.noticed(mask, name)
        finally:
            watch.close()

    def noticed(self, mask, name):
        """Raises OSError."""
        path = self.spool.path(name)
        if mask & Watch.LOST:
            self.spooler.next_scan = 0.0
            self.queue.open_unread()
        elif mask & Watch.MOVED_TO:
            self.appeared(path, whole=True)
        elif mask & Watch.MOVED_FROM:  # it may be held, be changed and come back before the next scan
            if (mail := self.queue.mails.get(path)) and mail.state != FLYING and not look(path):
                self.is_held(mail)
        elif mask & Watch.CLOSE_WRITE:
            self.appeared(path, whole=True, pause=GRACE_SECONDS)
            self.retry_if_touched(path)
        else:
            whole = whole_at_birth(path)
            self.appeared(path, whole, 0 if whole else UNCLOSED_SECONDS)

    def appeared(self, path, whole=False, pause=0):
        """There may be a file of this name. whole: nobody writes it any more; pause: seconds until it may be opened."""
        queue = self.queue
        if not self.spool.named([os.path.basename(path)]):
            return
        if (mail := queue.mails.get(path)) and mail.state == ASIDE:
            self.release(mail)
        mail = queue.mails.get(path) or queue.add(path)
        if not (mail.state == LEFT or has_changed(mail) or (mail.state == RESTING and mail.entry is None)):
            return
        mail.whole = whole
        if pause:
            queue.rest(mail, self.spooler.clock() + pause)
        else:
            queue.line_up(mail, queue.fresh)
        self.spooler.wake.set()

    def take_stock(self, paths):
        """Line up what is new or changed, oldest first; forget what is gone. Raises OSError."""
        queue, present = self.queue, set(paths)
        for mail in queue.those(ASIDE):
            if mail.path in present:
                self.release(mail)
        if is_over(self.spooler.keepers.get("watch")):
            for path in present & queue.mails.keys():
                self.retry_if_touched(path, first_look_counts=False)
        for path in sorted(present - queue.mails.keys(), key=age_key):
            queue.line_up(queue.add(path), queue.fresh)
        for mail in queue.those(STUCK):
            if mail.path in present and has_changed(mail):
                queue.line_up(mail, queue.fresh)
        absent = queue.mails.keys() - present
        if queue.counts[ASIDE]:
            absent.difference_update(self.failed_now())
        for mail in [queue.mails[path] for path in absent]:
            if mail.state not in (FLYING, LEFT):
                with contextlib.suppress(OSError):  # nothing is known: it stays
                    self.gone(mail)

    def failed_now(self):
        """The paths of what lies in .failed; as far as we know, if it cannot be listed."""
        try:
            paths = self.spool.list_failed()
            self.spooler.said.pop("failed", None)
            return paths
        except OSError as error:
            self.spooler.say("failed", f"unable to look into {self.spool.failed}, {reason_of(error)}")
            return [mail.path for mail in self.queue.those(ASIDE) if is_aside(mail.path)]

    def retry_if_touched(self, path, first_look_counts=True):
        """If a mail's file is not as it was, its user wants it to be tried now."""
        mail = self.queue.mails.get(path)
        if not mail or mail.entry is None or mail.state not in (RESTING, GROUNDED):
            return
        with contextlib.suppress(OSError):
            before, mail.print = mail.print, hash(identity(os.lstat(path)))
            if before != mail.print and (before or first_look_counts):
                mail.forced = True
                self.queue.line_up(mail, self.queue.fresh)
                self.spooler.relay.poke()
                self.spooler.wake.set()

    def gone(self, mail):
        """The file is not there: somebody removed it, or it was put aside just before a crash. Raises OSError."""
        if self.spool.look(mail.path) or self.was_put_aside(mail) or self.is_back(mail) or self.is_held(mail):
            return
        self.spooler.said.pop(f"{mail.path} recipients", None)
        self.queue.lose(mail)
        self.spooler.status.wanted.set()

    # -- what is in .failed

    def put_aside(self, mail, paths):
        """Some recipients were given up: its entry goes with its file, of which paths are all the names."""
        for other in paths:
            if other != mail.path:
                os.unlink(other)
        path, aside = mail.path, self.spool.put_aside(mail.path)
        if not is_partly_delivered(mail.envelope()):  # else it may come back by any name
            self.queue.forget(mail)
        self.queue.rename(mail, aside)
        self.queue.become(mail, ASIDE)
        log(f"{named(path)} moved to {named(aside)}")
        try:
            off_the_hub(self.spool.sync)
        except OSError as error:
            self.spooler.say("sync", f"unable to sync {self.spool.failed}, {error.strerror}")
        self.spooler.fail_command.add(mail)

    def was_put_aside(self, mail):
        """Whether it lies in .failed, and the daemon was killed before the status file could say so."""
        envelope = mail.envelope()
        if mail.state != RESTING or envelope_problem(envelope) or state_of_all(envelope) != GIVEN_UP:
            return False
        asides = itertools.takewhile(look, self.spool.failed_paths(mail.path))
        aside = next((aside for aside in asides if aside not in self.queue.mails), None)
        if aside:
            self.queue.rename(mail, aside)
            self.queue.become(mail, ASIDE)
            self.spooler.status.wanted.set()
            self.spooler.fail_command.add(mail)  # it cannot have been run yet
        return bool(aside)

    def is_back(self, aside):
        """Whether this file was moved from .failed into the spool again, where its delivery is still to come."""
        path = self.spool.path(os.path.basename(aside.path))
        back = self.queue.mails.get(path)
        if back is aside:  # it was held, and not in .failed
            return False
        return aside.state == ASIDE and (not has_recipients(back.envelope()) if back else bool(look(path)))

    def take_back(self, mail):
        """If its file was moved here from .failed, it has the entry that it had there. Raises OSError."""
        aside = self.queue.mails.get(self.spool.failed_path(mail.path))
        if aside and not has_recipients(mail.envelope()) and not look(aside.path) and (status := look(mail.path)):
            envelope, is_other = aside.envelope(), False
            if not envelope_problem(envelope):
                requeue(envelope, self.spooler.clock())
                is_other = is_changed(envelope, identity(status))
            mail.entry, mail.news = pack(mail.path, envelope), self.queue.epoch
            (self.queue.lose if is_other else self.queue.drop)(aside)  # it may be here by another name

    def rename(self, mail, path):
        """Its file has this name in the spool. If it lay in .failed, whoever was given up waits again."""
        if is_aside(mail.path) and not envelope_problem(envelope := mail.envelope()):
            requeue(envelope, self.spooler.clock())
            mail.entry = pack(mail.path, envelope)
        self.queue.rename(mail, path)

    # -- what its user holds, by a dot before its name

    def is_held(self, mail):
        """Whether its user holds it: its entry waits for its name, ASIDE. What comes back may be another file: see
        judged(). Raises OSError."""
        parent, name = os.path.split(mail.path)
        path = self.spool.path(name)
        if mail.entry is None or len(name.encode("utf-8", "replace")) >= NAME_LIMIT or not self.spool.is_held(path):
            return False
        if parent == self.spool.failed:  # moved from there, to be mended
            if path in self.queue.mails or envelope_problem(mail.envelope()):
                return False
            self.rename(mail, path)
        elif mail.state == ASIDE:
            return True
        else:
            self.queue.become(mail, ASIDE)
        self.spooler.status.wanted.set()
        return True

    def release(self, mail):
        """A file has the name of a mail that was held: it goes on where it was, if the file is its own."""
        with contextlib.suppress(OSError):  # the next scan will see
            if status := look(mail.path):
                known, envelope = identity(status), mail.envelope()
                mail.print = hash(known)
                if isinstance(envelope, dict) and is_changed(envelope := {"Stat": "", **envelope}, known):
                    self.queue.lose(mail)  # it may come by another name
                    mail = self.queue.add(mail.path)
                    mail.entry, mail.news = pack(mail.path, envelope), self.queue.epoch
                    self.queue.rest(mail, 0.0)
                    mail.forced = True
                else:
                    self.queue.rest(mail, self.spooler.due_at(mail))
                self.spooler.status.wanted.set()
                self.spooler.wake.set()


def age_key(path):
    """Sorts files by their age, the oldest first."""
    try:
        return os.lstat(path).st_mtime, path
    except OSError:
        return 0.0, path


def has_changed(mail):
    """Whether the file of a STUCK mail is not what it was; no, when that is not to be known."""
    with contextlib.suppress(OSError):
        return mail.state == STUCK and mail.seen != signature(look(mail.path))
    return False


class Spooler:
    """The loop: signals, scans, events, and a delivery for each mail whose turn it is.

    All times are seconds since 1970, from clock().
    """

    def __init__(self, options, spool, queue, status, turnstile, clock=time.time):
        self.options, self.spool, self.queue, self.status = options, spool, queue, status
        self.turnstile, self.clock = turnstile, clock
        self.relay = None  # what sends; set before run()
        self.lookout, self.fail_command, self.page = Lookout(self), FailCommand(self, os.environ), Page(self)
        self.facts = Facts(self)
        self.manager, self.progress = ServiceManager({}), Progress(10)
        self.pool = gevent.pool.Pool(options.concurrency)
        self.wake = gevent.event.Event()
        status.on_news = self.wake.set
        self.wanted = []  # suspend, reload, flush: what signals ask for, in their order
        self.said = {}  # what was complained about -> the text
        self.keepers = {}  # name -> greenlet that does something for ever
        self.next_scan = 0.0
        self.offset = clock() - time.monotonic()
        self.once_until = clock() + 5 * QUIET_SECONDS  # -once waits for files that are being written, but not for ever
        self.sent = 0
        self.suspended = self.stopping = False
        self.exit_status = EX_OK

    # -- the loop

    def run(self):
        """Send until told to stop; with -once, until nothing is due. Returns the exit status."""
        self.queue.look_again(self.due_at)
        self.keep("watch", self.lookout.watch)
        gevent.sleep(0)  # it begins before the first look
        self.wake.set()
        while not self.finished():
            try:
                self.wake.wait(self.idle_seconds())
                self.wake.clear()
                self.round()
            except Exception:  # noqa: BLE001 -- the loop goes on whatever it met
                log.traceback("unexpected error in the loop")
                gevent.sleep(QUIET_SECONDS)
                self.wake.set()
        self.stop()
        return self.exit_status or (EX_TEMPFAIL if self.options.once and self.remains() else EX_OK)

    def round(self):
        """Do what is asked for, look, take up what is due, say how we are."""
        self.check_clock()
        while self.wanted:
            getattr(self, self.wanted.pop(0))()
        if not (self.suspended or self.stopping):
            self.keep("status", self.status.keep_saving)
            if self.fail_command.line:
                self.keep("failcommand", self.fail_command.keep_running)
            if self.clock() >= self.next_scan:
                self.scan()
            self.queue.release(self.clock())
            self.dispatch()
        self.tell()

    def check_clock(self):
        """Times are the wall clock's: when it is set back, nobody waits for it to come round again."""
        offset = self.clock() - time.monotonic()
        back, self.offset = self.offset - offset, offset
        if back > CLOCK_STEP_SECONDS:
            log(f"the clock was set back by {ago(back)}: everything is tried now")
            self.queue.flush()
            self.once_until -= back
            self.next_scan = 0.0

    def dispatch(self):
        """A greenlet for each mail that may go."""
        queue, under_rate = self.queue, bool(self.options.rate)
        while queue.counts[IN_LINE] and queue.counts[FLYING] < self.options.concurrency and not self.stopping:
            mail = queue.take(self.turnstile.room() if under_rate else math.inf)
            if not mail:
                break
            delivery = Delivery(self, mail)
            try:
                greenlet = self.pool.spawn(delivery.run)
                greenlet.rawlink(delivery.landed)
                greenlet.delivery = delivery
            except MemoryError:
                delivery.landed(None)
                break

    def rescue(self):
        """Deliveries whose greenlets ended without a word, since there was no memory to begin them."""
        for greenlet in [greenlet for greenlet in self.pool if greenlet.dead]:
            self.pool.discard(greenlet)
            greenlet.delivery.landed(greenlet)

    def keep(self, name, work):
        """Have a greenlet do this for ever: whatever it ends by, it is started again."""
        if is_over(self.keepers.get(name)):
            self.keepers[name] = gevent.spawn(self.attempt, name, work)

    def attempt(self, name, work):
        try:
            work()
        except Exception as error:  # noqa: BLE001
            self.say(name, f"{name}: {describe(error)} (it is started again)")
            gevent.sleep(QUIET_SECONDS)
        finally:
            self.wake.set()

    def finished(self):
        if self.stopping:
            return True
        if not self.options.once or not self.next_scan or self.suspended or self.wanted:
            return False
        near = self.queue.counts[IN_LINE] and self.turn() < NEAR_SECONDS
        busy = self.queue.counts[FLYING] or self.fail_command.has_work()
        return not (busy or near or self.queue.next_due() < self.once_until)

    def turn(self):
        """Seconds until -rate lets the next in line go; 0 also when that depends on what is in flight."""
        need = self.queue.need() if self.options.rate else 0
        return (need and self.turnstile.wait(need)) or 0

    def take_turn(self, mail, size):
        """A mail's next transaction has so many recipients. Returns size; raises OutOfTurn if -rate has no room."""
        if self.turnstile.room() < size:
            mail.need = size
            raise OutOfTurn
        mail.need = 1
        self.turnstile.begin(size)
        self.queue.began(mail)
        self.wake.set()
        return size

    def due_at(self, mail):
        """When a mail that waits is due by its entry; now, for all, if the clock was ahead when that was written."""
        envelope, now = mail.envelope(), self.clock()
        due = 0.0 if envelope_problem(envelope) or envelope.get("Stat") == CHANGED else next_attempt(envelope)
        if due > now + LONGEST_DELAY and enqueued(envelope) > now + CLOCK_STEP_SECONDS:
            due, mail.forced = 0.0, True
        return due

    def idle_seconds(self):
        """How long nothing needs doing; None: until something happens."""
        now, ticks = self.clock(), time.monotonic()
        pauses = [self.manager.next_sign - ticks, (self.facts.next_look or math.inf) - ticks]
        if not self.suspended:
            scan = math.inf if self.options.once else self.next_scan
            pauses += [min(self.progress.next_word(), self.queue.next_due(), scan) - now, self.turn() or math.inf]
        return None if min(pauses) == math.inf else max(0.0, min(pauses))

    def tell(self):
        """The log and the service manager hear how we are."""
        counts, turn = self.queue.counts, self.turn()
        if turn >= NEAR_SECONDS and "rate" not in self.said:
            self.say("rate", f"rate limit: the next turn is in {ago(turn)}")
        elif not counts[IN_LINE]:
            self.said.pop("rate", None)
        if text := self.progress.line(self.clock(), counts[IN_LINE], counts[FLYING], self.sent, turn):
            self.progress.show(text)
        self.manager.sign_of_life(time.monotonic())
        if time.monotonic() >= self.facts.next_look:
            self.facts.publish()

    def condition(self):
        """One line for the service manager."""
        counts, trouble = self.queue.counts, f", relay unavailable: {self.relay.down}" if self.relay.down else ""
        deferred = counts[RESTING] + counts[GROUNDED]
        return f"{counts[IN_LINE]} waiting, {counts[FLYING]} in flight, {deferred} deferred{trouble}"

    def stop(self):
        """What is in flight, and -failcommand, may finish; then the status is saved."""
        deadline = time.monotonic() + STOP_SECONDS
        self.manager.tell("STOPPING=1\nSTATUS=stopping")
        self.relay.retire()
        if not self.pool.join(timeout=STOP_SECONDS):
            self.pool.kill()
        if self.suspended:  # what was delivered meanwhile is not in the file yet
            self.take_edit(is_last=True)
            self.status.thaw()
        self.status.save()
        self.facts.publish()
        if not self.status.knows_all():
            self.exit_status = self.exit_status or complain("the status could not be saved")
        self.relay.close()
        self.fail_command.stop(max(0, deadline - time.monotonic()))
        self.page.close()
        gevent.killall(list(self.keepers.values()))
        log(f"stopped ({self.queued()} messages in the queue)")

    def remains(self):
        try:
            return bool(self.spool.mails())
        except OSError:
            return True

    def queued(self):
        return sum(self.queue.counts[state] for state in (IN_LINE, FLYING, RESTING, GROUNDED))

    # -- signals: the handlers set a flag, the loop acts

    def ask(self, what):
        self.wanted.append(what)
        self.wake.set()

    def ask_to_stop(self):
        if self.stopping:
            os._exit(EX_ERROR)
        self.stopping = True
        self.wake.set()

    def suspend(self, save=True):
        self.suspended = True
        self.status.freeze(save)
        self.manager.tell("STATUS=suspended")
        log("Spoolgore is suspended, send SIGHUP or SIGURG to unpause it")

    def resume(self):
        self.suspended = False
        self.status.thaw()
        self.next_scan = 0.0
        self.relay.poke()

    def reload(self):
        if self.take_edit():
            self.queue.look_again(self.due_at)
            self.resume()
        else:  # or the next write would take the edit away
            self.suspend(save=False)

    def take_edit(self, is_last=False):
        """Whether the status file could be read. is_last: it is written next, so a bad one is moved aside."""
        try:
            self.status.reload()
        except (CorruptStatus, OSError) as error:
            if is_last:
                self.status.set_aside(self.clock(), describe(error))
            else:
                log(f"status not reloaded, {self.status.path}: {getattr(error, 'strerror', '') or error}")
            return False
        log("status reloaded")
        return True

    def flush(self):
        if self.suspended and not self.take_edit():
            return  # as in reload()
        self.queue.flush()
        log(f"spool directory flushed ({self.queued()} messages in the queue)")
        self.resume()

    def relay_has_news(self):
        """What waited for the relay goes at once if it is up."""
        if not self.relay.down:
            self.queue.release_grounded()
        self.wake.set()

    def scan(self):
        started, freq = time.monotonic(), self.options.freq
        self.next_scan = self.clock() + freq  # whatever this one meets, the rest of the loop has its turns
        try:
            if not self.spool.still_locked():
                self.reopen()
            self.lookout.take_stock(self.spool.list())
            if self.said.pop("scan", None):
                log("spool directory is accessible again")
        except Locked as error:
            self.give_way(error)
        except OSError as error:
            self.say("scan", f"unable to access spool directory, {describe(error)}")
            freq = min(freq, PROBE_SECONDS)  # nothing else tells that it is back
        self.keep("watch", self.lookout.watch)
        self.relay.tend()
        self.rescue()
        hour_ago = time.monotonic() - SAY_AGAIN_SECONDS  # what is older would be said again, if its mail is still here
        self.said = {subject: (text, when) for subject, (text, when) in self.said.items() if when >= hour_ago}
        pause = max(freq, 0.1, 9 * (time.monotonic() - started))  # -freq 0 is no reason to spin
        self.next_scan = self.clock() + pause
        self.manager.tell(f"READY=1\nSTATUS={one_line(self.condition())}")

    def reopen(self):
        """Take the lock again. If the directory is another one than before, removed and made again or mounted, its
        status file counts; one elsewhere forgets the mails now, and may need them when the directory is back. Else only
        the lock was removed."""
        same = self.spool.is_home()
        self.spool.lock()
        if watch := self.keepers.pop("watch", None):
            watch.kill()
        if same:
            return
        for mail in [mail for mail in self.queue.mails.values() if mail.state != FLYING]:
            (self.queue.drop if self.status.is_inside() else self.queue.lose)(mail)
        self.queue.dropped.clear()
        self.take_edit(is_last=True)
        self.queue.look_again(self.due_at)
        log(f"spool directory {self.spool.directory} was made again")

    def give_way(self, error):
        """Somebody removed the lock, and another daemon has the spool: two would send each mail twice."""
        log(f"{error}: nothing more is sent from here")
        self.stopping, self.exit_status = True, EX_ERROR
        self.status.freeze(save=False)  # the file is the other's

    def say(self, subject, text):
        """A complaint, once."""
        before, when = self.said.get(subject, ("", 0))
        if before != text or time.monotonic() - when > SAY_AGAIN_SECONDS:
            self.said[subject] = text, time.monotonic()
            log(text)


# -------------------------------------------------------------------- main


def set_up_streams():
    """Standard output and error may be closed, on a full disk, or a pipe whose reader is gone: that stops nothing."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr's: no letter is unknown to every terminal
    atexit.register(empty_streams)


def empty_streams():
    """What cannot be written must not change the exit status (the library reference's note on SIGPIPE)."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def raise_descriptor_limit():
    """Returns how many files may be open; infinity where that is not to be known."""
    with contextlib.suppress(ImportError):
        import resource  # not on Windows

        with contextlib.suppress(OSError, ValueError):  # a core dump has the password in it
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(OSError, ValueError):  # not allowed: what we have must do
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return math.inf if soft == resource.RLIM_INFINITY else soft
    return math.inf


def affordable(concurrency, descriptors):
    """How many mails may be in flight: each needs a connection and its file, and we some more."""
    most = max(1, (descriptors - SPARE_DESCRIPTORS) / 2)
    if concurrency <= most:
        return concurrency
    log(f"-concurrency is lowered to {int(most)}: no more than {descriptors} files may be open")
    return int(most)


def set_up_signals(spooler):
    """The handlers ask; the loop acts. A system without a signal does without what it asks for."""
    asks = {"SIGURG": "flush", "SIGHUP": "reload", "SIGTSTP": "suspend"}
    for name, what in asks.items():
        if hasattr(signal, name):
            gevent.signal_handler(getattr(signal, name), spooler.ask, what)
    for name in ("SIGIO", "SIGUSR1", "SIGUSR2"):  # a writer that comes during a lease; scripts that rotate logs
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    for name in ("SIGTERM", "SIGINT", "SIGBREAK"):  # Windows has the last one, for services too
        if hasattr(signal, name):
            gevent.signal_handler(getattr(signal, name), spooler.ask_to_stop)


def check_status_path(path):
    """Raises UsageError for a path that no status file can have, OSError."""
    try:
        os.stat(os.path.join(os.path.dirname(path), ""))
    except (FileNotFoundError, NotADirectoryError):
        raise bad_value("json", path, "its directory does not exist") from None
    if look(path) and not ((status := look(os.path.realpath(path))) and stat.S_ISREG(status.st_mode)):
        raise bad_value("json", path, "not a regular file")


def serve(options):
    """Run the daemon on a spool directory. Returns the exit status. Raises UsageError, OSError, Locked."""
    descriptors = raise_descriptor_limit()
    visitors = int(max(10, min(VISITORS, descriptors / 4))) if options.http else 0
    options = options._replace(concurrency=affordable(options.concurrency, descriptors - visitors))
    spool, queue = Spool(options.directory, options.json), Queue()
    status = Status(queue, spool)
    turnstile = Turnstile(options.rate, spool.path(".spoolgore.rate"), steady_clock())
    spooler = Spooler(options, spool, queue, status, turnstile)
    spooler.relay = make_relay(options, os.environ, sys.stdout.buffer, spooler.relay_has_news)
    spooler.manager = ServiceManager(os.environ)
    spooler.facts.go_on_counting(spool.lock())
    if options.http:
        spooler.page.open(options.http, visitors)
    set_up_signals(spooler)
    catch_unexpected(spooler)
    log(f"--- starting Spoolgore (pid: {os.getpid()}) on directory {options.directory} ---")
    log(f"spoolgore.py {VERSION}, Python {sys.version.split()[0]}, gevent {gevent.__version__}")
    spooler.facts.publish()
    load_status(status, is_named=bool(options.json))
    turnstile.load()
    gc.freeze()  # what is there now stays: the collector need not look at it again
    if options.once and sys.stderr.isatty():
        show_progress(spooler)
    exit_status = spooler.run()
    if log.progress is not None:
        log.show("")
    return exit_status


def catch_unexpected(spooler):
    """An error outside of everything of ours is one line; gevent, and Python in a thread, would print a traceback."""

    def tell(subject, error):
        spooler.say(subject, f"unexpected: {describe(error)}")

    gevent.get_hub().print_exception = lambda _context, _kind, error, _trace: tell("gevent", error)
    sys.unraisablehook = lambda fault: tell("python", fault.exc_value)


def load_status(status, is_named):
    """Read the status file. A corrupt one is set aside, but one that -json names may be somebody else's file. Raises
    CorruptStatus, OSError."""
    try:
        status.load()
        entries = [mail.entry for mail in status.queue.mails.values()] if is_named else []
        if entries and not any(b'"From":' in entry for entry in entries):
            raise CorruptStatus("no entry is a mail's")
    except CorruptStatus as error:
        if is_named:
            raise
        status.set_aside(time.time(), error)


def show_progress(spooler):
    """As a line of the terminal that is redrawn, not as lines of the log."""
    log.show("")
    spooler.progress = Progress(0.5, log.show)


def main(argv):
    """Returns the exit status."""
    warnings.filterwarnings("ignore", "libuv only supports millisecond timer")  # gevent's on Windows: enough for us
    gevent.config.track_greenlet_tree = False  # nobody asks who started a greenlet
    set_up_streams()
    log.stream = sys.stderr
    try:
        options = parse_options(argv)
        if options.json:
            check_status_path(absolute(options.json))
        if options.flush:
            return ask_to_flush(options, sys.stdout)
        if options.check:
            return check(options, os.environ, print)
        return report(options, sys.stdout, time.time()) if options.status else serve(options)
    except UsageError as error:
        print(f"{error}\nsee spoolgore.py -h", file=sys.stderr)  # the whole usage would scroll the error away
        return EX_USAGE
    except Locked as error:
        return complain(str(error))
    except CorruptStatus as error:
        return complain(f"corrupt status file {Spool(options.directory, options.json).status_path}, {error}")
    except OSError as error:
        return complain(describe(error))
    except MemoryError:
        return complain("no memory")


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # until the daemon has its own: no traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
