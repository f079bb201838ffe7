"""Counters of the server in Prometheus' text format."""

from collections import Counter

BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
"""Upper bounds of the request times, in seconds."""


class Metrics:
    """What the server did since it started. Used in one thread."""

    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()
        self.times: Counter[float] = Counter()
        self.seconds = 0.0
        self.tokens: Counter[str] = Counter()
        self.in_flight = 0

    def count(self, status: int, seconds: float) -> None:
        """Count a finished request.

        Args:
            status: Its HTTP status.
            seconds: Its time.
        """
        self.requests[status] += 1
        self.seconds += seconds
        for bound in BUCKETS:
            self.times[bound] += seconds <= bound

    def text(self) -> str:
        """The metrics, version 0.0.4 of the format."""
        total = sum(self.requests.values())
        lines = ["# HELP sdllava_requests_total Finished chat requests.", "# TYPE sdllava_requests_total counter"]
        lines += [f'sdllava_requests_total{{status="{s}"}} {n}' for s, n in sorted(self.requests.items())]
        lines += ["# HELP sdllava_requests_in_flight Requests that are read, prepared or answered."]
        lines += ["# TYPE sdllava_requests_in_flight gauge", f"sdllava_requests_in_flight {self.in_flight}"]
        lines += ["# HELP sdllava_tokens_total Tokens of prompts and answers.", "# TYPE sdllava_tokens_total counter"]
        lines += [f'sdllava_tokens_total{{kind="{kind}"}} {self.tokens[kind]}' for kind in ("prompt", "answer")]
        lines += ["# HELP sdllava_request_seconds Time of a request.", "# TYPE sdllava_request_seconds histogram"]
        lines += [f'sdllava_request_seconds_bucket{{le="{bound}"}} {self.times[bound]}' for bound in BUCKETS]
        lines += [f'sdllava_request_seconds_bucket{{le="+Inf"}} {total}']
        lines += [f"sdllava_request_seconds_sum {self.seconds:.3f}", f"sdllava_request_seconds_count {total}"]
        return "\n".join(lines) + "\n"
