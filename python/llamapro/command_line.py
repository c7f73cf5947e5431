"""What every command's words go through, and what becomes of its errors."""

import logging
import sys
from contextlib import contextmanager
from typing import Annotated

try:
    import tyro
except ImportError:
    sys.exit(
        'llamapro\'s command line needs the "train" extra: pip install "llamapro-kernels[train]"'
    )

from llamapro.ranks import ERRORS, is_told
from llamapro.storage import one_line
from llamapro.train.config import options_in
from llamapro.train.stopping import Interrupted


def positional(kind, name: str):
    """An argument without a name, which help calls `name`."""
    return tyro.conf.Positional[Annotated[kind, tyro.conf.arg(metavar=name)]]


def with_config_file(args: list[str]) -> list[str]:
    """The words of `llamapro train` with the options of the file that --config names, but for those
    that stand on the command line."""
    at = next((i for i, word in enumerate(args) if word.split("=")[0] == "--config"), None)
    if args[:1] != ["train"] or at is None:
        return args
    _, inline, path = args[at].partition("=")
    rest = args[at + 1 :] if inline else args[at + 2 :]
    if not inline:
        path = "".join(args[at + 1 : at + 2])
    given = {word[2:].split("=")[0].replace("-", "_") for word in args if word[:2] == "--"}
    return ["train", *options_in(path, leave_out=given), *args[1:at], *rest]


@contextmanager
def said_in_one_line():
    """End the process with a message, and no traceback, for what a user can mend."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("llamapro").setLevel(logging.INFO)
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        if not is_told(stop):
            print(str(stop) or "stopped", file=sys.stderr)
        sys.exit(130)
    except ERRORS as error:
        what = "out of memory " if isinstance(error, MemoryError) else ""
        sys.exit(1 if is_told(error) else f"llamapro: {what}{one_line(error)}")
