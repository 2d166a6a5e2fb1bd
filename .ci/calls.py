"""calls.py --port PORT SPOOL [--by-function]: how many Python functions spoolgore.py calls a mail, of a full spool."""

import gevent.monkey

gevent.monkey.patch_all()

import collections  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import spoolgore  # noqa: E402


def main(spool, port, *flags):
    mails = sum(not name.startswith(".") for name in os.listdir(spool))
    calls = collections.Counter()

    def note(frame, event, _argument):
        if event == "call":
            calls[frame.f_code] += 1

    sys.setprofile(note)
    status = spoolgore.main(["-once", "-smtpaddr", f"127.0.0.1:{port}", "-tls", "off", "-helo", "bench.example", spool])
    sys.setprofile(None)
    print(f"{sum(calls.values()) / mails:.1f}")
    for code, count in calls.most_common() if flags else ():
        print(f"{count / mails:8.2f} {os.path.basename(code.co_filename)}:{code.co_firstlineno} {code.co_name}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[3], sys.argv[2], *sys.argv[4:]))
