"""What one request may cost, and the error for a request that costs more or is malformed."""

from dataclasses import dataclass

MAX_BATCH = 8
"""Requests that are answered together; also their images."""
BATCH_SECONDS = 0.01
"""How long a request waits for others."""


@dataclass(frozen=True)
class Limits:
    """What a server or the demo page accepts.

    Args:
        max_body_bytes: Bytes of a request's body (HTTP 413).
        max_images: Images of a request (HTTP 400).
        max_image_bytes: Bytes of an encoded image (HTTP 413).
        max_image_pixels: Pixels of a decoded image (HTTP 400).
        max_new_tokens: Tokens of an answer (HTTP 400).
        max_beams: Beams of a beam search (HTTP 400).
        max_question_chars: Characters of the text of a request (HTTP 400).
        max_queue: Requests that are read, prepared and answered at a time (HTTP 429).
        request_seconds: Time of a request, from its first byte to the end of its answer (HTTP 504).
    """

    max_body_bytes: int = 32 * 2**20
    max_images: int = 8
    max_image_bytes: int = 16 * 2**20
    max_image_pixels: int = 25_000_000
    max_new_tokens: int = 1024
    max_beams: int = 5
    max_question_chars: int = 20_000
    max_queue: int = 64
    request_seconds: float = 120.0


PAGE_LIMITS = Limits(
    max_images=4, max_image_bytes=10 * 2**20, max_new_tokens=128, max_beams=1, max_question_chars=1000, max_queue=256
)
"""Limits of the demo page. Its visitors wait in a queue, whose time does not count."""


class RequestError(Exception):
    """A request that is answered by an HTTP error.

    Args:
        message: For the client. It does not name paths of this machine.
        status: The HTTP status, in 400..599.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.message, self.status = message, status
