"""The relay that judges: a real SMTP server that knows who got which mail, how often, and when."""

import collections
import contextlib
import socket
import threading
import time

DIALECTS = {"plain": (), "pipelining": ("PIPELINING",), "chunking": ("PIPELINING", "CHUNKING")}
REPLY_LATER = b"451 4.7.1 try later\r\n"
REPLY_NEVER = b"550 5.1.1 no such user\r\n"
REPLY_TAKEN = b"250 2.0.0 taken\r\n"


class Transaction:
    """One mail on one connection, from MAIL on. Times are monotonic."""

    def __init__(self, mail):
        self.mail, self.began = mail, time.monotonic()
        self.asked = {}  # address -> whether its RCPT was accepted
        self.content = b""
        self.accepted = None  # when it was decided that the mail is taken, just before that is said
        self.replied = None  # when the reply to the content was sent

    @property
    def recipients(self):
        return [address for address, accepted in self.asked.items() if accepted]


class Relay:
    """Takes mails. A recipient's local part says how it is met: "fine" is accepted; "later" is deferred the first time
    that his mail asks for him, "once" refused; "never" is refused always."""

    def __init__(self, offers=()):
        self.offers = offers
        self.transactions, self.of_mail = [], collections.defaultdict(list)
        self.changed = threading.Condition()
        self.conversations = set()
        self.turned_away = collections.Counter()  # (mail, address) -> how often
        self.held = {}  # mail -> an Event that the reply to its content waits for
        self.holding = set()  # mails that wait for it
        self.listen(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"

    def listen(self, where):
        self.listener = socket.create_server(where, backlog=500)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock = self.listener.accept()[0]
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                conversation = self.conversation(sock)
                with self.changed:
                    self.conversations.add(conversation)
                threading.Thread(target=conversation.run, daemon=True).start()

    def conversation(self, sock):
        return Conversation(self, sock)

    def stop_listening(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self.listener.close()

    def close(self):
        self.stop_listening()
        for conversation in list(self.conversations):
            conversation.close()

    def wait(self, condition, seconds):
        """Until condition() is true, or the time is over; asked again whenever something happens here."""
        with self.changed:
            return self.changed.wait_for(condition, seconds)

    def wait_for_silence(self, seconds=5):
        """Until every connection has ended: what a killed client had sent is dealt with then."""
        return self.wait(lambda: not self.conversations, seconds)

    def reply_to_recipient(self, mail, address):
        kind, key = address.partition(".")[0].partition("@")[0], (mail, address)
        if kind == "never" or (kind in ("later", "once") and not self.turned_away[key]):
            self.turned_away[key] += 1
            return REPLY_LATER if kind == "later" else REPLY_NEVER
        return b"250 2.1.5 fine\r\n"

    def begin(self, transaction):
        with self.changed:
            self.transactions.append(transaction)
            self.of_mail[transaction.mail].append(transaction)
            self.changed.notify_all()

    def forget(self):
        """Every transaction."""
        self.transactions.clear()
        self.of_mail.clear()

    def hold(self, mail):
        """The reply to this mail's content waits for release()."""
        self.held[mail] = threading.Event()

    def release(self, mail):
        if mail in self.held:
            self.held[mail].set()

    def is_held(self, mail):
        """Whether the content of this mail is there, and waits for its reply."""
        return mail in self.holding

    def is_busy(self):
        """Whether a transaction is under way."""
        return any(conversation.transaction for conversation in list(self.conversations))

    def times(self, mail, address):
        """The transactions in which the mail was taken for this recipient, the first one first."""
        some = [each for each in self.of_mail[mail] if each.accepted is not None and each.asked.get(address)]
        return sorted(some, key=lambda each: each.accepted)

    def has_taken(self, mail, address):
        return any(each.accepted and each.asked.get(address) for each in self.of_mail[mail])


class Conversation:
    """One connection. Commands are answered together, when all that came is read, as a pipelining server does."""

    def __init__(self, relay, sock):
        self.relay, self.sock = relay, sock
        self.unread, self.replies = bytearray(), b""
        self.transaction = None

    def run(self):
        try:
            with contextlib.suppress(OSError, EOFError):
                self.greet()
                while self.command(self.line()):
                    pass
                self.answer()
        finally:
            self.close()
            with self.relay.changed:
                self.relay.conversations.discard(self)
                self.relay.changed.notify_all()

    def close(self):
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    # -- the protocol

    def greet(self):
        self.say(b"220 relay.example ESMTP\r\n")

    def command(self, line):
        verb = line[:4].upper()
        getattr(self, f"on_{verb.decode('ascii', 'replace')}", self.on_other)(line)
        return verb != b"QUIT"

    def on_other(self, line):
        self.say(b"250 2.0.0 fine\r\n")

    def on_EHLO(self, line):
        lines = [b"relay.example", b"8BITMIME", b"SIZE 0", *(offer.encode() for offer in self.relay.offers)]
        self.say(b"".join(b"250-%s\r\n" % text for text in lines[:-1]) + b"250 %s\r\n" % lines[-1])

    def on_MAIL(self, line):
        self.transaction = Transaction(local_part(line))
        self.relay.begin(self.transaction)
        self.say(b"250 2.1.0 fine\r\n")

    def on_RCPT(self, line):
        address, transaction = address_of(line), self.transaction
        with self.relay.changed:
            reply = self.relay.reply_to_recipient(transaction.mail, address)
            transaction.asked[address] = reply.startswith(b"2")
            self.relay.changed.notify_all()
        self.say(reply)

    def on_DATA(self, line):
        if not self.transaction.recipients:
            return self.say(b"554 5.5.1 no valid recipients\r\n")
        self.say(b"354 go on\r\n")
        stuffed = self.until(b"\r\n.\r\n", before=b"\r\n")
        return self.take(stuffed.replace(b"\r\n..", b"\r\n.")[2:] + b"\r\n")

    def on_BDAT(self, line):
        content = self.read(int(line.split()[1]))
        if not self.transaction or not self.transaction.recipients:
            return self.say(b"554 5.5.1 no valid recipients\r\n")
        return self.take(content)

    def on_RSET(self, line):
        self.transaction = None
        self.say(b"250 2.0.0 fine\r\n")

    def take(self, content):
        transaction = self.transaction
        if held := self.relay.held.get(transaction.mail):
            self.relay.holding.add(transaction.mail)
            self.answer()
            held.wait(10)
        with self.relay.changed:
            transaction.content, transaction.accepted = content, time.monotonic()
            self.relay.changed.notify_all()
        self.say(REPLY_TAKEN)
        self.answer()
        with self.relay.changed:
            transaction.replied, self.transaction = time.monotonic(), None
            self.relay.changed.notify_all()

    # -- bytes

    def say(self, reply):
        self.replies += reply

    def answer(self):
        if self.replies:
            replies, self.replies = self.replies, b""
            self.sock.sendall(replies)

    def receive(self):
        self.answer()
        data = self.sock.recv(65536)
        if not data:
            raise EOFError
        self.unread += data

    def line(self):
        return self.until(b"\r\n")

    def until(self, end, before=b""):
        """What comes before this end; before: what to put in front of it first."""
        self.unread[:0] = before
        searched = 0
        while (found := self.unread.find(end, searched)) < 0:
            searched = max(0, len(self.unread) - len(end))
            self.receive()
        data = bytes(self.unread[:found])
        del self.unread[: found + len(end)]
        return data

    def read(self, octets):
        while len(self.unread) < octets:
            self.receive()
        data = bytes(self.unread[:octets])
        del self.unread[:octets]
        return data


def address_of(line):
    """The address in MAIL FROM:<...> or RCPT TO:<...>."""
    return line.partition(b"<")[2].partition(b">")[0].decode("utf-8", "replace")


def local_part(line):
    return address_of(line).partition("@")[0]
