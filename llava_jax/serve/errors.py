"""What a client is told when its request is not answered."""


class Refused(Exception):
    """A request that is not answered: the reason, the parameter it is about, HTTP's status and OpenAI's code."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    @property
    def content(self) -> dict[str, object]:
        """Return the body of the reply, in OpenAI's form."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
