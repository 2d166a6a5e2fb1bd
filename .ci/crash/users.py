"""Those who use a spool, by lot: the applications that write mails, and whoever renames, holds and releases them."""

import os
from pathlib import Path

NAMES, PEOPLE = ("a", "b", "c"), ("p@x.example", "q@x.example", "r@x.example")
MAIL = "From: f@x.example\nTo: {}\nMessage-ID: {}\nDate: x\n\n{}\n"
USES = {"new": 2, "rename": 1, "hold": 1, "release": 1, "take_back": 2, "carry_out": 1, "bring_in": 1, "touch": 1,
        "swap": 1, "link": 1, "unlink": 1}  # fmt: skip


def drawn(chance, weights):
    """One of the keys of a dict from things to how often they are drawn."""
    return chance.choices(list(weights), list(weights.values()))[0]


class Users:
    """See the head of this module. turmoil: what they do goes into its story, and what its daemon knows of a file is
    asked there, so that they leave out what fuzz.py says."""

    def __init__(self, turmoil, spool):
        self.turmoil, self.story, self.chance = turmoil, turmoil.story, turmoil.chance
        self.spool, self.outside = Path(spool), Path(spool).parent / "outside"
        self.outside.mkdir()
        self.mails = {}  # Message-ID -> recipients
        self.count = self.uses = 0

    def use(self):
        self.uses += 1
        getattr(self, drawn(self.chance, USES))()

    def files(self):
        return sorted(path for path in self.spool.iterdir() if not path.name.startswith("."))

    def held(self):
        return sorted(path for path in self.spool.iterdir() if path.name[1:] in NAMES)

    def failed(self):
        return sorted(self.spool.glob(".failed/*"))

    def left(self):
        return [path.name for path in (*self.files(), *self.held(), *self.failed(), *self.outside.iterdir())]

    def one_of(self, paths):
        return self.chance.choice(paths) if paths else None

    def free(self):
        return self.one_of([path for name in NAMES if not (path := self.spool / name).exists()])

    def owner(self, path):
        """The mail that the daemon has for this file; None if it knows none."""
        return self.turmoil.queue.known.get(self.turmoil.program.identity(os.stat(path))[:2])

    def is_seen(self, path):
        """Whether the daemon knows this file by this name, with or without a dot, or does not know it at all."""
        owner = self.owner(path)
        is_here = owner and owner.state != self.turmoil.program.LEFT
        return owner is None or (is_here and os.path.basename(owner.path) == path.name.lstrip("."))

    def is_touched(self, path):
        owner = self.owner(path)
        return owner is not None and owner.identity != self.turmoil.program.identity(os.stat(path))

    def may_have(self, path, name):
        """Whether this file may have this name; see what is left out."""
        mail, program = self.turmoil.queue.mails.get(str(name)), self.turmoil.program
        is_partly = mail and mail.state not in (program.FLYING, program.ASIDE)
        is_partly = is_partly and program.is_partly_delivered(mail.envelope())
        is_renamed = name.name != path.name[1:]  # else it is released
        return not (is_renamed and self.is_touched(path)) and not (is_partly and self.owner(path) is None)

    def move(self, path, name):
        """If there is such a file, and it may have that name."""
        if path and name and path.stat().st_nlink == 1 and not name.exists() and self.may_have(path, name):
            self.move_now(path, name)

    def move_now(self, path, name):
        self.story.append(f"  mv {path.relative_to(self.spool.parent)} {name.relative_to(self.spool.parent)}")
        path.rename(name)

    def new(self):
        self.count += 1
        draft, name = self.spool.parent / "draft", f"<{self.count}@x.example>"
        to = self.chance.sample(PEOPLE, self.chance.randint(1, 3))
        draft.write_text(MAIL.format(", ".join(to), name, "h" * self.chance.randint(0, 3)))
        self.move(draft, self.free())
        if not draft.exists():
            self.mails[name] = to
            self.story.append(f"  that is {name} to {' '.join(to)}")

    def rename(self):
        self.move(self.one_of(self.files()), self.free())

    def hold(self):
        if path := self.one_of([path for path in self.files() if path.name in NAMES]):
            self.move(path, path.with_name(f".{path.name}"))

    def release(self):
        if path := self.one_of(self.held()):
            own = self.spool / path.name[1:]
            self.move(path, own if self.chance.random() < 0.7 else self.free())

    def take_back(self):
        if path := self.one_of(self.failed()):
            own = self.spool / path.name
            self.move(path, own if self.chance.random() < 0.5 else self.free())

    def carry_out(self):
        self.move(self.one_of(self.files()), self.outside / str(self.count))

    def bring_in(self):
        self.move(self.one_of(sorted(self.outside.iterdir())), self.free())

    def touch(self):
        path = self.one_of(self.files())
        if path and path.stat().st_nlink == 1 and self.is_seen(path):
            self.story.append(f"  touch {path.name}")
            when = path.stat().st_mtime + self.chance.choice([-5, 5])
            os.utime(path, (when, when))

    def swap(self):
        """The names of two files."""
        if len(self.files()) > 1:
            one, other = self.chance.sample(self.files(), 2)
            if self.may_have(one, other) and self.may_have(other, one):
                for old, new in ((one, self.spool / "t"), (other, one), (self.spool / "t", other)):
                    self.move_now(old, new)

    def link(self):
        path, name = self.one_of(self.files()), self.free()
        if path and name and path.stat().st_nlink == 1 and self.may_have(path, name):
            self.story.append(f"  ln {path.name} {name.name}")
            os.link(path, name)

    def unlink(self):
        if path := self.one_of([path for path in self.files() if path.stat().st_nlink > 1]):
            self.story.append(f"  rm {path.name}, which has one more name")
            path.unlink()

    def bring_all_back(self):
        for path in self.held():
            self.move(path, self.spool / path.name[1:])
        for path in self.failed():
            self.move(path, self.spool / path.name)
        for path in sorted(self.outside.iterdir()):
            self.move(path, self.free())
