"""The record of calls: what was about to be sent, and what came back, each written before anything is done with it.

    crc32 {"kind": "intent",  "key", "attempt", "step", "model", "idem", "reserve"}     written before the request is sent
    crc32 {"kind": "outcome", "key", "attempt", "class", "finish", "usage", "cost", "settled", "took", "body" | "error"
           [, "for"] [, "misreported"]}                                                  written before it is used
    crc32 {"kind": "probe",   "host", "model", "mode"}                                  how the endpoint takes schemas
    crc32 {"kind": "given_up", "key", "error"}                                          a call that is never asked for again

Only `ok` outcomes answer a later look-up; failures stay for audit. `for` is the call whose reply this one repairs or completes:
it answers a look-up of that one too. A kill between a malformed reply and its repair goes on
with the repair. An intent without an outcome is *in doubt*: it is charged at its reserve for good.

Guarantees. A written line survives kill -9; the disk has it after at most 200 ms, so power loss may cost these. A torn last
line is dropped: one that lacks its newline, and that nothing stands behind. Any other damaged line is an error with its
offset. One process writes (lock). When a line cannot be written no other is, and so no request is sent. Held in memory are
sixteen bytes for each answered call, never a reply.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raglan.artifact import locked
from raglan.calls.asks import canonical
from raglan.calls.limits import Server
from raglan.calls.money import Ledger
from raglan.calls.places import Places
from raglan.errors import CallsStopped, CheckpointError

__all__ = ["Intent", "Journal", "read_ledger"]

log = logging.getLogger(__name__)
HEADER: dict[str, Any] = {"kind": "journal", "version": 1}
NAME = "journal.jsonl"
LOCK_SECONDS = 5.0
DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Intent:
    """A request about to be sent."""

    key: str
    attempt: int
    step: str
    model: str
    idem: str
    reserve: int


class Journal:
    """The journal in a folder, opened for writing; `ledger` is what its lines cost, counted from them alone.

    `servers` is what those who write it share of each server, by its host, for as long as it is open; nothing of it is written.
    """

    def __init__(self, folder: Path):
        """
        Raises:
            CheckpointError: a damaged line that is not torn at the end, or another process that writes.
        """
        self.path = Path(folder) / NAME
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger()
        self.modes: dict[tuple[str, str], str] = {}
        self.servers: dict[str, Server] = {}
        self.starters: dict[str, Callable[[], None]] = {}  # of servers that run only while they are asked
        self._answers = Places()  # of ok calls: where their outcomes are
        self._tries: dict[str, tuple[int, int]] = {}  # of a call without ok: intents, and how many of these the server settled
        self._failed: dict[str, int] = {}  # of a call without ok: requests, its repair's too, that failed for passing reasons
        self._given_up: dict[str, str] = {}  # call → why
        self._halves: dict[str, int] = {}  # malformed or cut off, and not yet repaired or completed → offset
        self._turn = threading.Lock()
        self._dirty, self._broken = False, ""
        self._lock = _alone(Path(folder))
        try:
            self._end = self._read()
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except BaseException:
            os.close(self._lock)
            raise
        os.ftruncate(self._file, self._end)
        os.lseek(self._file, self._end, os.SEEK_SET)
        if not self._end:
            self._append(HEADER)

    def close(self) -> None:
        """Bring everything to the disk and let another process write."""
        if self._file < 0:
            return
        try:
            self.sync()
        finally:
            os.close(self._file)
            os.close(self._lock)
            self._file = -1

    def intend(self, intent: Intent) -> None:
        """Write that a request is about to be sent.

        Raises:
            CallsStopped: the line cannot be written.
        """
        with self._turn:
            self._append({"kind": "intent", **{name: getattr(intent, name) for name in Intent.__slots__}})
            self._intended(intent.key)
            self.ledger.intend(intent)

    def settle(self, intent: Intent, outcome: dict[str, Any]) -> None:
        """Write what came of a request: {"class", "finish", "usage", "cost", "settled", "took", "body" | "error"[, "for"]}.

        Raises:
            CallsStopped: the line cannot be written; the intent stays in doubt.
        """
        line = {"kind": "outcome", "key": intent.key, "attempt": intent.attempt, **outcome}
        with self._turn:
            offset = self._append(line)
            self._settled(line, offset)

    def probed(self, host: str, model: str, mode: str) -> None:
        """Write how an endpoint takes schemas."""
        with self._turn:
            self._append({"kind": "probe", "host": host, "model": model, "mode": mode})
            self.modes[host, model] = mode

    def answer(self, key: str) -> dict[str, Any] | None:
        """The ok outcome of a call, or of its repair; None where there is none."""
        for offset in self._answers.of(key):
            line = self._at(offset)
            if key in (line["key"], line.get("for")):
                return line
        return None

    def half(self, key: str) -> dict[str, Any] | None:
        """A paid reply that was malformed or cut off, while what was to mend it has no outcome yet."""
        offset = self._halves.get(key)
        return None if offset is None else self._at(offset)

    def tries(self, key: str) -> tuple[int, int]:
        """Requests that an unanswered call has had, and how many of them the server has settled."""
        return self._tries.get(key, (0, 0))

    def failures(self, key: str) -> int:
        """Requests of an unanswered call, and of what was to mend its reply, that failed for passing reasons."""
        return self._failed.get(key, 0)

    def give_up(self, key: str, error: str) -> None:
        """Write that a call is never to be asked for again; whoever asks heeds that, not the journal."""
        with self._turn:
            self._append({"kind": "given_up", "key": key, "error": error})
            self._given_up[key] = error

    def given_up(self, key: str) -> str | None:
        """Why a call was given up; None where it was not."""
        return self._given_up.get(key)

    def sync(self) -> None:
        """Bring what is written to the disk."""
        if self._dirty:
            self._dirty = False
            try:
                os.fsync(self._file)
            except OSError as fault:
                self._broken = fault.strerror or str(fault)
                raise _unwritable(self.path, self._broken) from None

    def lines(self) -> Iterator[dict[str, Any]]:
        """All records from the beginning, the header left out."""
        return (record for record, start, _ in _records(self.path) if start)

    def _append(self, record: dict[str, Any]) -> int:
        """Write a line; its offset."""
        if self._broken:
            raise _unwritable(self.path, self._broken)
        line, start = _line(record), self._end
        try:
            done = 0
            while done < len(line):
                done += os.write(self._file, line[done:])
        except OSError as fault:
            self._broken = fault.strerror or str(fault)
            os.ftruncate(self._file, start)  # no half line before the end
            raise _unwritable(self.path, self._broken) from None
        self._end += len(line)
        self._dirty = True
        return start

    def _at(self, offset: int) -> dict[str, Any]:
        size, line = 1 << 13, b""
        while not line.endswith(b"\n"):
            part = os.pread(self._file, size, offset + len(line))
            line += part.partition(b"\n")[0] + (b"\n" if b"\n" in part else b"")
            if not part:
                break
            size *= 4
        record = _record(line)
        if record is None:
            raise _damaged(self.path, offset)
        return record

    def _read(self) -> int:
        """Take in what is there. Returns where the good lines end."""
        if not self.path.is_file():
            return 0
        end = 0
        for record, start, behind in _records(self.path):
            try:
                self._take(record, start)
            except (KeyError, TypeError, ValueError):  # whole, but not ours: an outcome of no intent
                raise _damaged(self.path, start) from None
            end = behind
        if end < self.path.stat().st_size:
            log.warning("%s: the last line, at offset %d, is torn and left out", self.path, end)
        self.ledger.close_doubts()
        return end

    def _take(self, record: dict[str, Any], offset: int) -> None:
        kind = record["kind"]
        if offset == 0 and record != HEADER:
            raise CheckpointError(f"{self.path} is no journal of calls: it begins with {record}", hint="give another folder")
        if kind == "intent":
            intent = _intent(record)
            self._intended(intent.key)
            self.ledger.intend(intent)
        elif kind == "outcome":
            self._settled(record, offset)
        elif kind == "probe":
            self.modes[record["host"], record["model"]] = record["mode"]
        elif kind == "given_up":
            self._given_up[record["key"]] = record["error"]

    def _intended(self, key: str) -> None:
        intents, settled = self._tries.get(key, (0, 0))
        self._tries[key] = (intents + 1, settled)

    def _settled(self, line: dict[str, Any], offset: int) -> None:
        key = line["key"]
        self.ledger.settle(line)
        intents, settled = self._tries.get(key, (1, 0))
        self._tries[key] = (intents, settled + bool(line["settled"]))
        mended = line.get("for")
        names = [key] if mended is None else [key, mended]
        if line["class"] == "transient":
            for name in names:
                self._failed[name] = self.failures(name) + 1
        if mended is not None and line["class"] not in ("transient", "fatal"):
            self._halves.pop(mended, None)
        elif line["class"] in ("malformed", "truncated"):
            self._halves[key] = offset
        if line["class"] != "ok":
            return
        for name in names:
            self._answers.put(name, offset)
            for unanswered in (self._tries, self._failed, self._halves):
                unanswered.pop(name, None)


def read_ledger(folder: Path) -> Ledger:
    """What a journal's calls cost, without writing it. Requests that another process has under way count as in doubt.

    Raises:
        CheckpointError: no journal there, or a damaged one.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no journal of calls: there is no {NAME}", hint="give the folder that holds it")
    ledger = Ledger()
    for record, _, _ in _records(path):
        if record["kind"] == "intent":
            ledger.intend(_intent(record))
        elif record["kind"] == "outcome":
            ledger.settle(record)
    ledger.close_doubts()
    return ledger


def _records(path: Path) -> Iterator[tuple[dict[str, Any], int, int]]:
    """(record, where its line begins, where it ends), the header too, as far as the file went when reading began.

    Raises:
        CheckpointError: a damaged line.
    """
    end = 0
    with open(path, "rb", buffering=1 << 20) as file:
        size = os.fstat(file.fileno()).st_size
        for line in file:
            record = _record(line)
            if record is None and (line.endswith(b"\n") or _holds_more(line)):
                raise _damaged(path, end)
            if record is None or end >= size:
                return
            yield record, end, end + len(line)
            end += len(line)


def _holds_more(line: bytes) -> bool:
    """Whether an unfinished line goes on behind a whole record: what was its newline is damaged, and it is not torn."""
    text = line[9:].decode("latin-1")  # a cut character is no fault here
    try:
        return DECODER.raw_decode(text)[1] < len(text)
    except (ValueError, RecursionError):
        return False


def _intent(record: dict[str, Any]) -> Intent:
    return Intent(**{name: record[name] for name in Intent.__slots__})


def _line(record: dict[str, Any]) -> bytes:
    content = canonical(record)
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _record(line: bytes) -> dict[str, Any] | None:
    """A line's record; None if it is torn or damaged."""
    if len(line) < 11 or line[8:9] != b" " or line[-1:] != b"\n":
        return None
    content = line[9:-1]
    if line[:8] != b"%08x" % zlib.crc32(content):
        return None
    record: dict[str, Any] = json.loads(content)
    return record


def _alone(folder: Path) -> int:
    """The lock of a folder's journal; the system lets go of that of a process that was killed."""
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    give_up = time.monotonic() + LOCK_SECONDS
    while not locked(file):
        pid = os.pread(file, 32, 0).decode(errors="replace").strip()
        if _alive(pid) or time.monotonic() > give_up:
            os.close(file)
            raise CheckpointError(
                f"process {pid or 'unknown'} is writing the journal in {folder}", hint="wait for it, or give another folder"
            )
        time.sleep(0.02)
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    return file


def _alive(pid: str) -> bool:
    """Whether a process runs. The system may let go of the lock of one that was killed a moment after it is gone."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _damaged(path: Path, offset: int) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged at offset {offset}",
        hint=f"bring it back from a copy; or keep what stands before, head -c {offset}, and pay for the rest again",
    )


def _unwritable(path: Path, why: str) -> CallsStopped:
    return CallsStopped(
        f"{path} cannot be written: {why}; no further request is sent", reason="journal", hint="make room and run it again"
    )
