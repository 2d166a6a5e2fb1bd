"""Another process's system calls: it stops at those that matter, is killed there, or told that they failed.

A seccomp filter (seccomp(2), SECCOMP_RET_TRACE) stops the process at the calls of a list and lets all others go at
full speed; ptrace(2) then tells which call it is. All threads are followed, and their calls are counted together in the
order in which they stop. A thread that stops has not made its call yet, so a process that is killed there has done
exactly what it had done before.

x86-64 Linux only: a call is made to fail by way of its registers.
"""

import contextlib
import ctypes
import os
import platform
import signal
import struct
import sys
import threading
import time

NUMBERS = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "mmap": 9, "brk": 12, "ioctl": 16,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "dup": 32, "sendfile": 40,
    "socket": 41, "connect": 42, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48,
    "getsockname": 51, "setsockopt": 54, "getsockopt": 55, "clone": 56, "fork": 57, "vfork": 58, "execve": 59,
    "fcntl": 72, "flock": 73, "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83,
    "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "readlink": 89, "chmod": 90, "fchmod": 91,
    "chown": 92, "fchown": 93, "sync": 162, "getdents64": 217, "epoll_wait": 232, "epoll_ctl": 233,
    "inotify_add_watch": 254, "openat": 257, "mkdirat": 258, "newfstatat": 262, "unlinkat": 263, "renameat": 264,
    "linkat": 265, "symlinkat": 266, "readlinkat": 267, "fchmodat": 268, "faccessat": 269, "utimensat": 280,
    "epoll_pwait": 281, "fallocate": 285, "eventfd2": 290, "epoll_create1": 291, "pipe2": 293, "inotify_init1": 294,
    "prlimit64": 302, "syncfs": 306, "renameat2": 316, "copy_file_range": 326, "statx": 332, "clone3": 435,
    "openat2": 437, "faccessat2": 439,
}  # fmt: skip
NAMES = {number: name for name, number in NUMBERS.items()}

SEIZE, CONT, SYSCALL, GETREGS, SETREGS, LISTEN, GET_SYSCALL_INFO = 0x4206, 7, 24, 12, 13, 0x4208, 0x420E
TRACESYSGOOD, TRACEFORK, TRACEVFORK, TRACECLONE, TRACEEXEC, TRACESECCOMP, EXITKILL = 1, 2, 4, 8, 16, 128, 1 << 20
OPTIONS = TRACESYSGOOD | TRACEFORK | TRACEVFORK | TRACECLONE | TRACEEXEC | TRACESECCOMP | EXITKILL
EVENT_SECCOMP, EVENT_STOP = 7, 128
WALL, WNOTHREAD = 0x40000000, 0x20000000
ORIG_RAX, RAX = 15 * 8, 10 * 8  # in struct user_regs_struct
GROUP_STOPS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


def missing():
    """What this machine lacks for it, and how to get it; empty when nothing is lacking."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"needs Linux on x86-64, this is {platform.system()} on {platform.machine()}: use a virtual machine"
    child = os.fork()
    if not child:
        signal.pause()
    try:
        request(SEIZE, child, 0, OPTIONS)
    except OSError as error:
        return (
            f"needs ptrace, which says {error.strerror}: sysctl kernel.yama.ptrace_scope=1, or in a container "
            "--cap-add SYS_PTRACE"
        )
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, WALL)
    return ""


def seccomp_filter(names, but_not_to=()):
    """The BPF program that stops at the named calls: octets for PR_SET_SECCOMP.

    but_not_to: descriptors; a write to one of these does not stop.
    """
    allow, trace = 0x7FFF0000, 0x7FF00000
    load, equal, end = 0x20, 0x15, 0x06
    numbers = [NUMBERS[name] for name in names if name != "write" or not but_not_to]
    program = [(load, 0, 0, 4), (equal, 1, 0, 0xC000003E), (end, 0, 0, allow), (load, 0, 0, 0)]
    for number in numbers:
        program += [(equal, 0, 1, number), (end, 0, 0, trace)]
    if "write" in names and but_not_to:
        program += [(equal, 1, 0, NUMBERS["write"]), (end, 0, 0, allow), (load, 0, 0, 16)]
        for descriptor in but_not_to:
            program += [(equal, 0, 1, descriptor), (end, 0, 0, allow)]
        program += [(end, 0, 0, trace)]
    program += [(end, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def request(what, pid, address=0, data=0):
    """One ptrace request. Raises OSError; ProcessLookupError means that the thread was killed meanwhile."""
    if libc.ptrace(what, pid, address, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Call:
    """A system call at which a thread has stopped, before it is made."""

    def __init__(self, process, thread, name, arguments):
        self.process, self.thread, self.name, self.arguments = process, thread, name, arguments

    def text(self, number):
        """The path that this argument points to."""
        return os.fsdecode(self.memory(self.arguments[number], 4096).partition(b"\0")[0])

    def memory(self, address, octets):
        """What stands in the process's memory; less where the memory ends."""
        with open(f"/proc/{self.thread}/mem", "rb", buffering=0) as memory:
            try:
                return os.pread(memory.fileno(), octets, address)
            except OSError:
                return b""

    def descriptor(self, number=0):
        """What this argument, a descriptor, leads to: a path, "socket:[1]", "anon_inode:[eventfd]"."""
        try:
            return os.readlink(f"/proc/{self.process}/fd/{ctypes.c_int(self.arguments[number]).value}")
        except OSError:
            return ""

    def path(self, number):
        """The absolute path that this argument is, be it relative to a descriptor or to the working directory."""
        text, start = self.text(number), f"/proc/{self.process}/cwd"
        if self.name in AT_CALLS and ctypes.c_int(self.arguments[number - 1]).value != AT_FDCWD:
            start = f"/proc/{self.process}/fd/{self.arguments[number - 1]}"
        if text.startswith("/"):
            return text
        try:
            return os.path.join(os.readlink(start), text) if text else os.readlink(start)
        except OSError:
            return text

    def paths(self):
        """Every path that the call names."""
        return [self.path(number) for number in PATHS.get(self.name, ())]

    def __str__(self):
        short = [os.path.basename(path.rstrip("/")) or path for path in self.paths()]
        short = short or ([os.path.basename(self.descriptor())] if self.name in ON_DESCRIPTORS else [])
        return f"{self.name}({' -> '.join(short)})"


PATHS = {
    "open": (0,), "creat": (0,), "stat": (0,), "lstat": (0,), "access": (0,), "rename": (0, 1), "mkdir": (0,),
    "rmdir": (0,), "link": (0, 1), "unlink": (0,), "symlink": (1,), "readlink": (0,), "chmod": (0,), "chown": (0,),
    "truncate": (0,), "inotify_add_watch": (1,), "openat": (1,), "openat2": (1,), "mkdirat": (1,), "newfstatat": (1,),
    "unlinkat": (1,), "renameat": (1, 3), "renameat2": (1, 3), "linkat": (1, 3), "symlinkat": (2,), "readlinkat": (1,),
    "fchmodat": (1,), "faccessat": (1,), "faccessat2": (1,), "utimensat": (1,), "statx": (1,), "execve": (0,),
}  # fmt: skip
AT_CALLS = {name for name in PATHS if name.endswith(("at", "at2", "statx"))} - {"stat", "lstat", "creat"}
AT_FDCWD = -100
ON_DESCRIPTORS = {
    "read", "write", "pread64", "pwrite64", "readv", "writev", "fstat", "close", "fcntl", "flock", "fsync", "fdatasync",
    "ftruncate", "getdents64", "sendto", "recvfrom", "sendmsg", "recvmsg", "connect", "setsockopt", "getsockopt",
    "getsockname", "shutdown", "fchmod", "fchown", "fallocate", "ioctl",
}  # fmt: skip


class Kill(Exception):
    """Raised by a decision: the process is to die here, before the call."""


class Tracer:
    """Follows a process in a thread of its own until it has ended.

    decide(call): returns None to let it go on, an errno to make the call fail with it, or a function that is given the
    call's result (-errno for an error) when it has been made; raises Kill. It runs in the tracer's thread.
    """

    def __init__(self, pid, decide, release):
        """release: lets the process go on, which waits for that since it was forked."""
        self.pid, self.decide, self.release = pid, decide, release
        self.killed_at = None  # monotonic; when and where it was killed by a decision
        self.status = None  # as subprocess has it: the exit status, or less a signal
        self.trouble = None  # what went wrong in here
        self.results = {}  # thread -> function for the result of the call that it is in
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def wait(self, timeout=None):
        """The exit status, when the process has ended; None if it has not in time."""
        self.ended.wait(timeout)
        if self.trouble:
            raise self.trouble
        return self.status

    def _run(self):
        try:
            request(SEIZE, self.pid, 0, OPTIONS)
            self.release()
            self._follow()
        except BaseException as error:  # noqa: BLE001 -- said by wait()
            self.trouble = error
            kill(self.pid)
        finally:
            self.ended.set()

    def _follow(self):
        while True:
            try:
                thread, status = os.waitpid(-1, WALL | WNOTHREAD)
            except ChildProcessError:
                return
            if os.WIFSTOPPED(status):
                self._stopped(thread, status >> 16, os.WSTOPSIG(status))
            elif thread == self.pid:
                self.status = os.waitstatus_to_exitcode(status)
                self.ended.set()  # what it has started may go on

    def _stopped(self, thread, event, number):
        try:
            if event == EVENT_SECCOMP:
                self._at_call(thread)
            elif event == EVENT_STOP and number in GROUP_STOPS:
                request(LISTEN, thread)
            elif event:
                request(CONT, thread)
            elif number == signal.SIGTRAP | 0x80:
                self._after_call(thread)
            else:
                request(CONT, thread, 0, number)
        except ProcessLookupError:
            pass  # killed meanwhile

    def _at_call(self, thread):
        info = ctypes.create_string_buffer(88)
        request(GET_SYSCALL_INFO, thread, len(info), ctypes.addressof(info))
        number, *arguments = struct.unpack_from("7Q", info, 24)
        answer = None
        if self.killed_at is None and os.path.exists(f"/proc/{self.pid}/task/{thread}"):  # not of a process it started
            try:
                answer = self.decide(Call(self.pid, thread, NAMES[number], arguments))
            except Kill:
                self.killed_at = time.monotonic()
                return kill(self.pid)
        if callable(answer):
            self.results[thread] = answer
            return request(SYSCALL, thread)
        if answer:
            fail(thread, answer)
        return request(CONT, thread)

    def _after_call(self, thread):
        if found := self.results.pop(thread, None):
            found(struct.unpack_from("q", registers(thread), RAX)[0])
        request(CONT, thread)


def registers(thread):
    buffer = ctypes.create_string_buffer(27 * 8)
    request(GETREGS, thread, 0, ctypes.addressof(buffer))
    return buffer


def fail(thread, code):
    """The call at which the thread has stopped is not made, and returns this error."""
    buffer = registers(thread)
    struct.pack_into("q", buffer, ORIG_RAX, -1)
    struct.pack_into("q", buffer, RAX, -code)
    request(SETREGS, thread, 0, ctypes.addressof(buffer))


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
