"""The figures of a server, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from llava_jax.infer.engine import Engine


class Metrics:
    """What /metrics tells; a registry a server, so that two in one process do not share figures."""

    def __init__(self, engine: Engine):
        self.registry = own = CollectorRegistry()
        self.requests = Counter("llava_requests", "Replies by path and status.", ["path", "status"], registry=own)
        self.tokens = Counter("llava_tokens", "Tokens of answered requests.", ["kind"], registry=own)
        self.first = Histogram("llava_first_token_seconds", "From request to first token.", registry=own)
        self.whole = Histogram("llava_answer_seconds", "From request to last token.", registry=own)
        Gauge("llava_running", "Answers being decoded.", registry=own).set_function(lambda: engine.running)
        Gauge("llava_queued", "Answers waiting for a slot.", registry=own).set_function(lambda: engine.queued)
