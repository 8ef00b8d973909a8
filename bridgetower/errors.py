"""Errors that a user can act on: each message says what is wrong (with the value), why, and what to do."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
"""Wrong usage or wrong input."""
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: stopped by request with a checkpoint saved; run the same command again."""
EXIT_INTERRUPTED = 130
"""Stopped with Ctrl-C: 128 plus SIGINT, as in shells."""


class BridgeTowerError(Exception):
    """Base of every error that a user of BridgeTower can act on."""

    exit_code = EXIT_USAGE
    rank: int | None = None
    """Rank that raised the error, set once ranks run apart; None before that, when every rank raises the same error."""


class ConfigError(BridgeTowerError):
    """A setting, flag, preset or settings file is unknown, has the wrong type, or contradicts another one."""


class DataError(BridgeTowerError):
    """A shard, manifest, index, image or caption is missing or does not match its manifest."""


class CheckpointError(BridgeTowerError):
    """A checkpoint is missing, incomplete, damaged or belongs to another run."""


class TrainingError(BridgeTowerError):
    """Training cannot continue: the loss is not finite, or a process that it needs has died."""

    exit_code = EXIT_FAILED
