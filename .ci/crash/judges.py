"""Part 7: the judges are judged: broken copies of the program must be found by the parts above, for the right reason.

Each copy has some lines before its last statement that break one promise. They use the names of the program; when one
is not there any more the copy ends at once, which is not what its judge is to find, and the lines want adapting.
"""

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import ptrace
from workshop import HERE, Failure


class Case(NamedTuple):
    number: int  # of the flaw

    @property
    def command(self):
        return f"judges --flaw {self.number}"


class Flaw(NamedTuple):
    """words: what is broken; code: lines of Python that do so; part: who is to find it, with its flags; finding: a
    regular expression for what that one says."""

    words: str
    code: str
    part: str
    finding: str


def instead(function, code):
    """A flaw's code: this function is replaced by one that may call the real one. code: its body, of given, named."""
    body = textwrap.indent(textwrap.dedent(code).strip(), "    ")
    return f"def broken(*given, real={function}, **named):\n{body}\n{function} = broken\n"


KILLS, POWER = "kill --dialect pipelining --every 7", "power --every 5 --mode"
FLAWS = [
    Flaw(
        "the status is written in place",
        instead(
            "os.replace",
            """
            text = open(given[0], "rb").read()
            with open(given[1], "wb", buffering=0) as file:
                file.write(text[:200])
                file.write(text[200:])
            os.unlink(given[0])
            """,
        ),
        KILLS,
        "does not parse|corrupt|is lost|it got|exit status",
    ),
    Flaw(
        "a mail is put aside before the status knows why",
        "Status.commit = lambda status, mail: True",
        KILLS,
        "is lost|was given up for|the status file knew|before the kill|begun already",
    ),
    Flaw(
        "a mail is removed before the relay has taken it",
        instead("Delivery.send", "os.unlink(given[0].path); return real(*given)"),
        KILLS,
        "is lost",
    ),
    Flaw(
        "everybody gets it again after a restart",
        "Status.load = lambda status: None",
        KILLS,
        "the status file knew of it|was done .* before the kill|begun already",
    ),
    Flaw(
        "the status is not synced",
        instead(
            "os.fsync", 'return None if os.readlink(f"/proc/self/fd/{given[0]}").endswith(".new") else real(*given)'
        ),
        POWER + " home",
        "does not parse|corrupt|is lost|before the cut",
    ),
    Flaw(
        "the status's directory is not synced",
        instead("sync_directory", "return None"),
        POWER + " home",
        "is lost|before the cut|got it although",
    ),
    Flaw(
        "the status on another disk forgets mails whose removal is not on the disk",
        instead("write_status", "return real(*given[:2], None)"),
        POWER + " elsewhere",
        "before the cut",
    ),
    Flaw(
        "a removal that fails is taken for done",
        instead("os.unlink", "with contextlib.suppress(OSError): real(*given, **named)"),
        "errors --dialect pipelining --call unlink",
        "does not heal|left in the spool|got it",
    ),
    Flaw(
        "a doubt is taken for a delivery",
        instead(
            "Delivery.conclude",
            """
            verdict = Verdict.DELIVERED if given[2] is Verdict.DEFERRED else given[2]
            return real(*given[:2], verdict, *given[3:])
            """,
        ),
        "relay --seeds 10",
        "times sent, it says|settled although|is lost",
    ),
    Flaw(
        "a descriptor is lost with each mail",
        instead("os.unlink", "os.dup(0); return real(*given)"),
        "resources --case '20 descriptors'",
        "does not heal|it ended|Too many",
    ),
    Flaw(
        "a file that was renamed is taken for another mail",
        instead("Queue.identify", "given[1].identity = given[2]; return given[1]"),
        "fuzz --seeds 1000",
        "twice|not his|is lost",
    ),
]


def add_arguments(parser):
    parser.add_argument("--flaw", type=int, choices=range(1, len(FLAWS) + 1), help="only this one")


def missing():
    return ptrace.missing()


def remarks(notes):
    return ["survived: the flaw was found"]


def cases(workshop, options):
    if options.quick:
        return []
    numbers = [options.flaw] if options.flaw else range(1, len(FLAWS) + 1)
    return [Case(number) for number in numbers] * options.times


def run(workshop, case, options):
    """Raises Failure if the flaw is not found."""
    flaw, script = FLAWS[case.number - 1], workshop.new("broken") / "spoolgore.py"
    break_copy(Path(options.script), script, flaw.code)
    command = [
        sys.executable,
        HERE,
        *shlex.split(flaw.part),
        "--script",
        script,
        "--jobs",
        "3",
        "--python",
        options.python,
    ]
    said = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            for line in process.stdout:
                said.append(line.strip())
                if is_finding(line, flaw):
                    break
        finally:
            process.terminate()
    workshop.drop(script.parent)
    if not (said and is_finding(said[-1], flaw)):
        failure = Failure(f"not found: {flaw.words}; {' / '.join(said[-12:])[:1000]}")
        failure.where = flaw.part
        raise failure
    return "found"


def is_finding(line, flaw):
    return line.startswith(flaw.part.partition(" ")[0] + " ") and re.search(flaw.finding, line)


def break_copy(script, copy, code):
    text, mark, end = script.read_text(encoding="utf-8").rpartition('if __name__ == "__main__":')
    copy.write_text(f"{text}{code}\n\n{mark}{end}", encoding="utf-8")
