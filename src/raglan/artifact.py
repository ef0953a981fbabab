"""Directories that are either whole or not there.

Every artefact (knowledge base, checkpoint, evaluation) is a directory whose `manifest.json` is written last; a directory
without one does not count. Publishing is an atomic rename, a pointer is a one-line file replaced with `os.replace`. So a
kill at any moment leaves the last good version readable and the half-made one recognisable.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import raglan
from raglan.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not on Windows: there one folder must not be written by two processes at a time
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "MANIFEST",
    "alone",
    "directory_fingerprint",
    "file_fingerprint",
    "fingerprint",
    "locked",
    "point",
    "pointed",
    "publish",
    "read_manifest",
    "streamed_fingerprint",
    "write_json",
    "write_manifest",
]

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
TRIES = 100  # to make a folder that another process removes


def locked(file: int, *, wait: bool = False) -> bool:
    """Whether the lock of an open file is this process's now. The system lets go of that of one that was killed."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def alone(lock: Path, done: Callable[[], bool]) -> Iterator[bool]:
    """Whether there is still something to make, which meanwhile no other process makes. Waits for one that does.

    Args:
        lock: a file of this name is there while the work lasts, and is removed. Where all is done already, there is none.
        done: looked up before the lock is taken, and under it.
    """
    if done():
        yield False
        return
    file = _taken(lock)
    try:
        yield not done()
    finally:
        if fcntl is not None:
            lock.unlink(missing_ok=True)
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may hold the file open
        os.close(file)


def _taken(path: Path) -> int:
    """The open lock file at `path`, locked; not one that was waited for and removed."""
    tries = 0
    while True:
        with suppress(FileExistsError):  # a file in its place is refused below, by its name
            path.parent.mkdir(parents=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the folder was removed in between; or is a link to nowhere
            tries += 1
            if tries == TRIES:
                raise
            continue
        try:
            if not locked(file):
                log.warning("another process is at work, %s: waiting for it", path)
                locked(file, wait=True)
        except OSError as fault:
            log.warning("%s: nothing can be locked here (%s); let no other process make the same", path, fault.strerror)
            return file
        with suppress(FileNotFoundError):
            if fcntl is None or os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)


def fingerprint(value: Any) -> str:
    """16 hex digits that name a JSON value: equal values, in any key order, have equal names."""
    return hashlib.sha256(_canonical(value)).hexdigest()[:16]


def streamed_fingerprint(before: Sequence[Any], items: Iterable[Any], after: Callable[[], Sequence[Any]]) -> str:
    """`fingerprint([*before, list(items), *after()])` of items that are never all held; `after` is asked behind the last."""
    digest = hashlib.sha256(b"[" + b"".join(_canonical(value) + b", " for value in before) + b"[")
    for number, item in enumerate(items):
        digest.update((b", " if number else b"") + _canonical(item))
    digest.update(b"]" + b"".join(b", " + _canonical(value) for value in after()) + b"]")
    return digest.hexdigest()[:16]


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()


def file_fingerprint(path: Path) -> str:
    """16 hex digits of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def directory_fingerprint(folder: Path, patterns: tuple[str, ...] = ("*",)) -> str:
    """16 hex digits of the names and contents of a folder's files."""
    files = sorted({path for pattern in patterns for path in Path(folder).rglob(pattern) if path.is_file()})
    return fingerprint([[str(path.relative_to(folder)), file_fingerprint(path)] for path in files])


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of either."""
    path = Path(path)
    half = _half(path)
    half.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    _sync(half)
    os.replace(half, path)


def write_manifest(folder: Path, kind: str, content: Mapping[str, Any], *, beside: Path | None = None) -> None:
    """Declare `folder` complete. Call it last: sizes of all files are recorded, and from here on the artefact exists.

    Args:
        beside: a folder in it that is none of it, and may go on changing.
    """
    folder = Path(folder)
    apart = None if beside is None or beside.resolve() in (folder.resolve(), *folder.resolve().parents) else beside.resolve()
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST and not path.name.endswith(".part")
        if apart is None or not path.resolve().is_relative_to(apart)
    }
    write_json(folder / MANIFEST, {"kind": kind, "raglan": raglan.__version__, **content, "files": files})


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a complete artefact of this kind.

    Raises:
        CheckpointError: no manifest, one of another kind, or a file that has gone or changed its size.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no finished {kind}: there is no {MANIFEST}",
            hint="the command that makes it was interrupted or never run; run it again and it goes on where it stopped",
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:  # bytes that are no text, too
        raise CheckpointError(
            f"{path} is not JSON: {fault}", hint="the folder is damaged: remove it and make it again"
        ) from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path} holds no JSON object", hint="the folder is damaged: remove it and make it again")
    if manifest.get("kind") != kind:
        raise CheckpointError(f"{folder} holds a {manifest.get('kind')!r}, not a {kind!r}", hint=f"give the folder of a {kind}")
    for name, size in manifest.get("files", {}).items():
        file = Path(folder) / name
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(f"{file} is missing or damaged: {MANIFEST} says {size} bytes", hint="make it again")
    return manifest


def publish(working: Path, final: Path) -> Path:
    """Rename a finished working directory to its final name. If that name is taken by a finished one, keep the latter."""
    if (final / MANIFEST).is_file():
        shutil.rmtree(working)
        return final
    if final.exists():
        shutil.rmtree(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    os.rename(working, final)
    return final


def point(pointer: Path, name: str) -> None:
    """Make a one-line pointer file name something else, atomically."""
    half = _half(pointer)
    half.write_text(name + "\n", encoding="utf-8")
    _sync(half)
    os.replace(half, pointer)


def pointed(pointer: Path) -> str | None:
    """What a pointer file names, or None where there is none."""
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def _half(path: Path) -> Path:
    """Where this thread writes a file before it takes its place."""
    return path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
