"""Part 6: those who use the spool rename, hold, replace, swap and bring back its files at any moment, from a seed.

The daemon's parts are driven in one process without its loop, so that a seed is the same story each time: what comes
next (a file operation, its inotify events, a scan, deliveries, a signal, a step of the clock, a restart) is drawn by
lot, and so is what the relay says and what is done to the files in mid-transaction. Then there is peace: the relay
takes everything, and what was held, in .failed or outside comes back. Everybody must get his mail once, and nobody
another's; the queue's counts are right, and no file, entry or descriptor is left.

Left out is what the program is known not to do right, for want of anything that could tell:

- a file is touched and renamed, or carried out and back, in either order, before its mail is tried again;
- a partly delivered mail is moved away, and before the daemon sees that, a file that it never opened takes its name;
- a mail is renamed and then held before the daemon sees the first of these, and then the daemon is restarted;
- a partly delivered mail is outside, or looked for, while the daemon is restarted;
- a file without Message-ID replaces another one.

It needs the names of this version of the script, for it is the only part that looks inside.
"""

import json
import subprocess
from typing import NamedTuple

from workshop import HERE, CannotRun, Failure, add_seed_arguments, seeds_of

SEEDS, QUICK_SEEDS = 1000, 20

players = {}  # script -> the process that plays its seeds


class Case(NamedTuple):
    seed: int

    @property
    def command(self):
        return f"fuzz --seed {self.seed}"


def add_arguments(parser):
    add_seed_arguments(parser, SEEDS, first=0)


def missing():
    return ""


def remarks(notes):
    return [f"{sum(map(int, notes)):,} file operations"] if notes else []


def cases(workshop, options):
    return [Case(seed) for seed in seeds_of(options, first=0, quick=QUICK_SEEDS)]


def run(workshop, case, options):
    """Raises Failure. Returns how many file operations there were."""
    spool = workshop.new("spool")
    player = player_of(workshop.settings)
    player.stdin.write(json.dumps([case.seed, str(spool)]) + "\n")
    player.stdin.flush()
    result = json.loads(player.stdout.readline())
    workshop.drop(spool)
    if result["trouble"]:
        failure = Failure(result["trouble"])
        failure.log = result["story"]
        raise failure
    return result["uses"]


def player_of(settings):
    """It ends when we do, since its standard input does. Raises CannotRun."""
    if settings.script not in players:
        command = [settings.python, HERE / "turmoil.py", settings.script]
        player = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if player.stdout.readline() != "ready\n":
            raise CannotRun(f"{settings.python} cannot import {settings.script}, see above")
        players[settings.script] = player
    return players[settings.script]
