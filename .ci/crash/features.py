"""What a later version of the program can do and an earlier one cannot: asked of the script itself."""

import contextlib
import os

from relay import Relay
from workshop import Daemon, Hand, make_mail

RECEIVER = "fine.receiver@x.example"


def features_of(workshop):
    """The names of those that it has: "failcommand", "envelope"."""
    found = []
    if "-failcommand" in usage(workshop):
        found.append("failcommand")
    if knows_envelope_lines(workshop):
        found.append("envelope")
    return found


def usage(workshop):
    """What -h prints."""
    output = workshop.directory / "usage"
    Daemon(workshop, workshop.new("spool"), ["-h"], output=str(output)).wait()
    return output.read_text()


def knows_envelope_lines(workshop):
    """Whether a mail with an X-Receiver line goes to whom that names."""
    spool = workshop.new("spool")
    with contextlib.closing(Relay()) as relay:
        Hand().put(spool, make_mail("probe", ["fine.header@x.example"], receivers=[RECEIVER]))
        Daemon(workshop, spool, ["-once", "-smtpaddr", relay.address, "-tls", "off", "-helo", "app.example"]).wait()
        assert not os.path.exists(spool / "probe"), "the simplest mail is not sent"
        return relay.has_taken("probe", RECEIVER)
