"""What a sandbox has to say to the test that it is around."""

from sessionscope import exc


class SandboxError(exc.SessionScopeError):
    """A test did what the one transaction of its sandbox cannot follow.

    It has ended that transaction, by COMMIT sent as text or by DDL on MySQL, so that its rows
    stay; or it uses the sandbox on another event loop, or after its end.
    """

    error_code = "sandbox"
