"""One family of errors: each says what is wrong, where, and what to do about it."""


class MCARError(Exception):
    """Base of every error that mcar_lib raises on purpose."""


class ConfigError(MCARError, ValueError):
    """An option, a profile key or an argument has a value that cannot work."""


class NotInProfileError(ConfigError):
    """A profile has no values for what is asked for; others may."""


class DataError(MCARError):
    """A data set is missing, incomplete or not what its files claim."""


class WeightsError(MCARError):
    """Weights cannot be found, or do not fit the backbone they were asked for."""


class CheckpointError(MCARError):
    """A checkpoint cannot be read, or belongs to another architecture."""


class ResultsError(MCARError):
    """A results folder or a run record cannot be read or written."""


class TrainingError(MCARError):
    """Training cannot go on, for example because the loss is no longer a number."""
