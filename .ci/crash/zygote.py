"""Starts a script again and again, in a hundredth of the time that its interpreter takes to start.

    python zygote.py SCRIPT [MODULE...]

Imports what the script imports, and the modules, compiles it, and then forks for each line of JSON on standard input a
process that runs it as __main__. What such a process does from its first own statement on is what `python SCRIPT ...`
does. Its pid is printed; the process is no child of this one but of the one that started this (PR_SET_CHILD_SUBREAPER),
which waits for it. If that one ends, so does the process.

A request: {"argv": [...], "cwd": ..., "log": standard error, "output": standard output, "environ": {...},
"clock": a file with a double that is added to time.time(), "gate": a FIFO that is opened for reading before anything
else, "filter": a seccomp program in hexadecimal, "limits": [[resource, soft, hard]...], "user": [uid, gid],
"powerless": whether it has no capabilities, so that also root is bound by the modes of files}.
"""

import ast
import contextlib
import ctypes
import importlib
import json
import mmap
import os
import resource
import signal
import struct
import sys
import time
import types
import warnings
from os import fork, waitpid  # as they are before gevent has its way with them: these start no event loop
from time import sleep

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38


def main(script, *modules):
    warnings.simplefilter("ignore")
    text = open(script, "rb").read()
    tree = ast.parse(text, script)
    if "gevent" in imported(tree):
        from gevent import monkey

        monkey.patch_all()  # before anything that it patches is imported, as in the script
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), script, "exec"), {})
    for module in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    code = compile(tree, script, "exec")
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        start(script, code, json.loads(line))


def imported(tree):
    return {name.name.partition(".")[0] for node in tree.body if isinstance(node, ast.Import) for name in node.names}


def start(script, code, request):
    """Fork twice, so that the process is handed on to the one that started us."""
    middle = fork()
    if middle:
        waitpid(middle, 0)
        return
    if fork():
        os._exit(0)
    parent = int(os.environ.pop("HARNESS"))
    while os.getppid() != parent:
        sleep(0.0005)
    os.write(1, b"%d\n" % os.getpid())
    prepare(request)
    run(script, code, request["argv"])


def prepare(request):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.setsid()
    os.chdir(request["cwd"])
    for path, descriptor in ((os.devnull, 0), (request["output"], 1), (request["log"], 2)):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(handle, descriptor)
        os.close(handle)
    os.closerange(3, 64)
    os.environ.update(request.get("environ", {}))
    if request.get("clock"):
        shift_clock(request["clock"])
    for kind, soft, hard in request.get("limits", ()):
        resource.setrlimit(kind, (soft, hard))
    if os.geteuid() == 0 and request.get("user"):
        become(*request["user"])
    if request.get("powerless"):
        libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    if request.get("gate"):
        os.close(os.open(request["gate"], os.O_RDONLY))
    if request.get("filter"):
        set_filter(libc, bytes.fromhex(request["filter"]))


def become(user, group):
    os.setgroups([])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)


def shift_clock(path):
    """time.time() is as much ahead as the file says, at any moment."""
    with open(path, "rb") as file:
        shift = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    unshifted, unpack = time.time, struct.Struct("d").unpack_from
    time.time = lambda: unshifted() + unpack(shift)[0]


def set_filter(libc, program):
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(Program(len(program) // 8, program)), 0, 0):
        os._exit(os.EX_UNAVAILABLE)


def run(script, code, argv):
    module = types.ModuleType("__main__")
    module.__file__ = script
    sys.modules["__main__"] = module
    sys.argv = [script, *argv]
    sys.path[0] = os.path.dirname(script)
    sys.stdout.flush()
    exec(code, module.__dict__)
    sys.exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
