"""Errors a user can cause. Each carries one line: what is wrong, which value or file, what to do."""


class PrhsError(Exception):
    """Base of every error that is reported as one line instead of a traceback."""


class UsageError(PrhsError):
    """An option or argument that cannot be meant (exit code 2)."""


class InputError(PrhsError):
    """A model, bundle, prompt or corpus that cannot be used (exit code 3)."""


class UnsupportedModelError(InputError):
    """A model whose attention is not the one the selectors were derived for."""


class ResourceError(PrhsError):
    """Not enough memory or disk, or no suitable device (exit code 4)."""
