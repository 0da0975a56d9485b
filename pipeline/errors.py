"""The ways in which something can be wrong that is not a bug of ours."""

import errno

DISK_FULL = 74
"""Exit code where nobody can go on before there is room (sysexits' EX_IOERR)."""


class UserError(Exception):
    """A user's mistake or a broken input: the command ends with this text and exit code 2.

    The message says what is wrong, where (file, key), why, and what to do.
    """


class ConfigError(UserError):
    """The configuration asks for something impossible."""


class DataError(UserError):
    """A file or shard set is missing, altered or not what it claims to be."""


class StoreError(UserError):
    """An object store kept failing; the same command can be run again once it works (exit code 3).

    Not a DataError: nothing is known about the data, so nobody may go on without it.
    """


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite; raised on every rank before any weight is changed."""


class PoisonItemError(UserError):
    """Items that killed their worker every time; all others are done."""


class MachinesLostError(Exception):
    """Items whose machines were taken away too often; all others are done, and the same command can
    be run again."""


class RankFailedError(Exception):
    """A rank ended abnormally; the command can be run again and goes on from its checkpoint."""


class PreemptedError(Exception):
    """The run stopped as it was told to, after committing a checkpoint; run again, it goes on."""


class BadSample(Exception):
    """One sample that can't be used; whoever reads it counts it, notes it and goes on."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str]]:
        return BadSample, (self.reason, self.detail)


def require(condition: bool, key: str, rule: str, value: object) -> None:
    """Raise ConfigError, saying by which rule the setting `key` can't be `value`."""
    if not condition:
        raise ConfigError(f"{key} must be {rule}, not {value!r}")


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
