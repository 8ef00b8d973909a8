"""Errors that are meant for people: each message says what is wrong (with the value), why, and what to do."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
"""Wrong usage or wrong input."""
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: stopped by request with a checkpoint saved; run the same command again."""
EXIT_INTERRUPTED = 130
"""Stopped with Ctrl-C, as shells number it."""


class BridgeTowerError(Exception):
    """Base of every error that a user of BridgeTower can act on."""

    exit_code = EXIT_USAGE
    rank: int | None = None
    """Set once the ranks have begun to work apart: only this one may have met the error."""


class ConfigError(BridgeTowerError):
    """A setting, flag, preset or file of settings is unknown, of the wrong type or in contradiction to another."""


class DataError(BridgeTowerError):
    """A shard, manifest, index, image or caption is missing or is not what its manifest says."""


class CheckpointError(BridgeTowerError):
    """A checkpoint is missing, incomplete, damaged or belongs to another run."""


class TrainingError(BridgeTowerError):
    """Training cannot go on: the loss is not a number any more, or a process that it needs died."""

    exit_code = EXIT_FAILED
