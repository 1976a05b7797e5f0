"""A program of its own: run a command where it sees an interpreter, an empty /tmp, no network and no other process.

`python -I -S confine.py '{"command": […], "visible": […], "root": …, "life": fd, …}'`, standard library only. It makes
new namespaces, builds a file system of read-only mounts, gives up every privilege, runs the command and ends with it.
When the pipe `life` closes, because whoever asked has ended, everything in there is killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import select
import signal
import stat
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

CANNOT = 113  # exit code: it could not be confined; why is on standard output
NOBODY = 65534
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
READ_ONLY = 1 | 2 | 4  # MOUNT_ATTR_RDONLY, _NOSUID, _NODEV
AT_FDCWD, AT_RECURSIVE, MNT_DETACH = -100, 0x8000, 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CAPABILITY_VERSION = 0x20080522
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR = 442
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache")
libc = ctypes.CDLL(None, use_errno=True)


class Cannot(Exception):
    """This machine does not let us do a step."""


def call(name: str, *args: Any) -> None:
    """A function of the C library. Raises Cannot with the system's reason."""
    if getattr(libc, name)(*args) == -1:
        raise Cannot(f"{name}: {os.strerror(ctypes.get_errno())}")


def syscall(name: str, number: int, *args: Any) -> None:
    if libc.syscall(ctypes.c_long(number), *args) == -1:
        raise Cannot(f"{name}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    call("mount", source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), data.encode() or None)


def make_read_only(path: str, flags: int) -> None:
    """A mount, and with AT_RECURSIVE those below it."""
    wanted = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    syscall("mount_setattr", MOUNT_SETATTR, AT_FDCWD, path.encode(), ctypes.c_uint(flags), ctypes.byref(wanted), size)


def new_namespaces() -> None:
    """As root without a user namespace: then we can become nobody, whose processes are counted."""
    flags = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    if os.geteuid() == 0 and libc.unshare(flags) == 0:
        return
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", flags | NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)


def build_root(root: str, visible: Iterable[str], scratch: int) -> None:
    """Mount a new file system at `root` and make it ours. scratch: bytes that may be written, all in /tmp."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir(f"{root}/tmp")
    mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={scratch},nr_inodes=10000,mode=1777")
    for path in (*SYSTEM, *DEVICES, *visible):
        show(path, root)
    make_read_only(root, 0)
    os.chdir(root)
    syscall("pivot_root", PIVOT_ROOT[platform.machine()], b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/tmp")


def show(path: str, root: str) -> None:
    """Make a file or folder of this machine visible under `root`, read-only, unless something shows it already."""
    target = root + path
    if not os.path.exists(path) or os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    mount(os.path.realpath(path), target, flags=MS_BIND | MS_REC)
    if not stat.S_ISCHR(os.stat(path).st_mode):
        make_read_only(target, AT_RECURSIVE)


def give_up_privileges() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    call("capset", ctypes.byref(header), ctypes.byref(none))


def die_with_parent() -> None:
    """Also: no program that we run can get privileges by its file's mode."""
    call("prctl", PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    call("prctl", PR_SET_PDEATHSIG, *map(ctypes.c_ulong, (signal.SIGKILL, 0, 0, 0)))


def fork(then: Callable[[], None]) -> int:
    """Run `then` in a child; it never returns. What it cannot do is said on standard output."""
    pid = os.fork()
    if pid:
        return pid
    try:
        then()
    except (Cannot, OSError, KeyError) as e:
        tell(e)
    finally:
        os._exit(CANNOT)


def tell(error: Exception) -> NoReturn:
    os.write(1, json.dumps({"cannot": str(error)}).encode() + b"\n")
    os._exit(CANNOT)


def inside(config: dict[str, Any]) -> None:
    """The first process of the new world: sets it up, runs the command, ends with it."""
    build_root(config["root"], config["visible"], config["scratch"])
    give_up_privileges()
    die_with_parent()
    pid = fork(lambda: run(config))
    while True:
        ended, status = os.wait()
        if ended == pid:
            os._exit(exit_code(status))


def run(config: dict[str, Any]) -> None:
    die_with_parent()
    command = config["command"]
    os.execve(command[0], command, config["env"])


def exit_code(status: int) -> int:
    """A shell's way to say it: 128 and the signal."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def main() -> None:
    config = json.loads(sys.argv[1])
    life = config["life"]
    try:
        if config["confined"]:
            new_namespaces()
    except (Cannot, OSError, AttributeError) as e:  # other systems have no such functions
        tell(e)
    os.set_inheritable(life, False)
    pid = fork(lambda: inside(config) if config["confined"] else run(config))
    for fd in (0, 1):
        os.close(fd)
    select.select([os.pidfd_open(pid), life], [], [])
    os.kill(pid, signal.SIGKILL)  # it has ended already, or is no longer wanted
    os._exit(exit_code(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    main()
