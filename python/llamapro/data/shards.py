"""Token files while they are written, in shards, by a process that may be killed."""

import logging
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from llamapro.data.tokens import PARTS, hash_of
from llamapro.storage import clear, read_json, write_json

log = logging.getLogger("llamapro")


class Shards:
    """The token files of a directory, and a journal of how far they are, which is never ahead."""

    def __init__(self, directory: Path, identity: str, dtype: np.dtype, is_chat: bool):
        self.directory, self.identity, self.dtype = directory, identity, dtype
        self.journal = directory / "journal.json"
        kinds = (".bin", ".bin.index", *([".bin.loss"] if is_chat else []))
        state = read_json(self.journal) if self.journal.exists() else {}
        sizes = state.get("sizes", {})
        whole = all(os.path.getsize(directory / name) >= size for name, size in sizes.items())
        if whole and state.get("identity") == identity:
            log.info("going on after %d documents", state["done"])
        else:
            if state:
                log.info("starting anew: other settings or sources than those of the stopped one")
            clear(directory)
            state, sizes = {}, {}
        self.done, self.max_token = state.get("done", 0), state.get("max_token", 0)
        self.dropped = state.get("dropped", 0)  # by the caller, of what it had
        self.files = {}
        with ExitStack() as stack:
            for name in (f"{part}{kind}" for part in PARTS for kind in kinds):
                file = stack.enter_context(open(directory / name, "ab"))
                file.truncate(sizes.get(name, 0))
                file.seek(0, os.SEEK_END)
                self.files[name] = file
            self.stack = stack.pop_all()

    def append(self, part: str, documents: list[tuple[np.ndarray, np.ndarray]]) -> None:
        if not documents:
            return
        file = self.files[f"{part}.bin"]
        lengths = [len(ids) for ids, _ in documents]
        ends = file.tell() // self.dtype.itemsize + np.cumsum(lengths)
        ids = np.concatenate([ids for ids, _ in documents])
        self.max_token = max(self.max_token, int(ids.max(initial=0)))
        file.write(ids.data)
        self.files[f"{part}.bin.index"].write(ends.astype("<u8").data)
        if loss := self.files.get(f"{part}.bin.loss"):
            loss.write(np.concatenate([mask for _, mask in documents]).data)

    def finish(self, done: int) -> None:
        """All that was appended is on disk, before the journal says so."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self.files.items()}
        state = {"identity": self.identity, "done": done, "max_token": self.max_token}
        write_json(self.journal, {**state, "dropped": self.dropped, "sizes": sizes})

    def count(self, part: str) -> int:
        """The tokens of a part so far."""
        return self.files[f"{part}.bin"].tell() // self.dtype.itemsize

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def summary(self) -> dict:
        """What meta.json says of the tokens; the files are complete, and the journal goes."""
        self.journal.unlink(missing_ok=True)
        files = [self.directory / f"{part}.bin" for part in PARTS]
        tokens = [file.stat().st_size // self.dtype.itemsize for file in files]
        return {
            "dtype": self.dtype.name,
            "tokens": dict(zip(PARTS, tokens, strict=True)),
            "max_token": self.max_token,
            "digest": hash_of(files),
        }
