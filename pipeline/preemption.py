"""Being told to stop: a signal becomes a checkpoint of the current step and an exit code.

SIGTERM is what clusters send before they take a machine away; SIGINT is ctrl-C.
"""

import signal
import threading

EXIT_CODE = 75
"""A checkpoint holds every step made; the same command goes on (EX_TEMPFAIL of sysexits.h)."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_asked = threading.Event()


def listen() -> None:
    """From now on the signals that ask this process to stop are only noted; see `asked`.

    Repeated ones, too: launchers pass on what the terminal has sent to their ranks already.
    """
    for number in SIGNALS:
        signal.signal(number, lambda *_: _asked.set())


def ignore() -> None:
    """For helper processes of a rank, which it ends itself: clusters signal every process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def ask() -> None:
    """What the signals do."""
    _asked.set()


def asked() -> bool:
    """Whether this process was told to stop; `dist.any_rank` makes it known to all."""
    return _asked.is_set()
