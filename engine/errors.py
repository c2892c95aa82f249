"""Errors a user can act on: one clear line saying what is wrong, where, and what would be right."""


class FolioError(Exception):
    """Base of every error that is the input's fault, not the engine's. Programs print it and exit with 2."""


class ConfigError(FolioError, ValueError):
    """A setting that cannot work: names the field, the value and what would be right."""


class WeightsError(FolioError):
    """A checkpoint that cannot be read: names the file and the tensor."""


class RequestError(FolioError, ValueError):
    """A request that can never be served, refused at arrival with the reason."""


class WorkloadError(FolioError, ValueError):
    """A workload that cannot be read: names the file and the line."""


class OutputError(FolioError):
    """Something that cannot be written: names the file and the reason, such as a full disk."""


class PolicyError(FolioError):
    """A policy that breaks its protocol: names the policy and what it did."""


class OutOfPages(Exception):
    """The device tier cannot give the pages asked for; nothing was allocated. Policies test `fits` first."""
