"""Small and failing file systems for a state directory.

They are mounted in a mount namespace that the test's process enters at its start and that ends with it, so that nothing is
left whatever happens. Where mounting is not allowed (a container), a limit of the file size does: the write fails all
the same, with another errno.
"""
from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18

libc = ctypes.CDLL(None, use_errno=True)
_may_mount = False


def own_mounts() -> None:
    """Enters a mount namespace of its own, where that is allowed."""
    global _may_mount
    _may_mount = libc.unshare(CLONE_NEWNS) == 0 and libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0


def may_mount() -> bool:
    return _may_mount


def may_loop() -> bool:
    """File systems in files, too?"""
    return _may_mount and all(Path(path).exists() for path in ("/dev/loop-control", "/sys/fs/ext4", "/sbin/mkfs.ext4"))


def small(directory: Path, size: str) -> None:
    """Mounts an empty file system of that size there."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], check=True)


def fill(directory: Path) -> Path:
    """Takes all the room there is; remove the file to give it back."""
    path = directory / "filling"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    return path


class FailingDisk:
    """A file system in a file, that the kernel makes read-only when it finds an error: the way in which disks end."""

    def __init__(self, image: Path, directory: Path) -> None:
        self.image, self.directory = image, directory
        with image.open("wb") as file:
            file.truncate(32 << 20)
        subprocess.run(["/sbin/mkfs.ext4", "-q", str(image)], check=True)
        directory.mkdir()
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop,errors=remount-ro", str(self.image), str(self.directory)], check=True)

    def fail(self) -> None:
        device = next(line.split()[0] for line in Path("/proc/mounts").read_text().splitlines()
                      if line.split()[1] == str(self.directory))
        Path(f"/sys/fs/ext4/{os.path.basename(device)}/trigger_fs_error").write_text("1")

    def repair(self) -> None:
        """As an administrator does; nobody may use it."""
        subprocess.run(["umount", str(self.directory)], check=True)
        subprocess.run(["/sbin/e2fsck", "-fy", str(self.image)], capture_output=True, check=False)
        self.mount()
