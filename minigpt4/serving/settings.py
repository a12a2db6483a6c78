"""What a server is told when it starts: who may ask, and how much of everything it accepts."""

from dataclasses import dataclass, field

from minigpt4.processing.pictures import DEFAULT_LIMITS, ImageLimits


@dataclass(frozen=True)
class Limits:
    """How much a request may bring and how long it may take.

    Args:
        max_body_bytes: Length of a body. 32 MiB: one picture of 20 MiB in base64, or many small ones.
        max_held_bytes: All bodies that are being read or prepared, together.
        max_json_depth: Lists and objects inside each other; a request needs 6.
        max_json_values: Values and names in a body, all levels together.
        max_messages: Turns of a conversation.
        max_text: Characters of all messages together.
        max_pictures: Pictures of a request.
        max_total_pixels: Pixels of all pictures of a request together.
        max_new_tokens: Longest answer that may be asked for.
        max_beams: Answers followed at once.
        max_connections: Open connections; the one that has waited longest without a request gives way.
        max_header_bytes: Request line and headers.
        header_seconds: From the first byte, or the connection, to the end of the headers.
        body_seconds: To the end of the body.
        write_seconds: How long a client may leave what it was sent unread.
        answer_seconds: From the request to the end of its answer, waiting included.
        ping_seconds: Between signs of life in a stream that has nothing to say.
        drain_seconds: From the order to stop until answers in progress are given up.
        image: One picture.
    """

    max_body_bytes: int = 32 * 2**20
    max_held_bytes: int = 256 * 2**20
    max_json_depth: int = 16
    max_json_values: int = 20_000
    max_messages: int = 256
    max_text: int = 131_072
    max_pictures: int = 16
    max_total_pixels: int = 100_000_000
    max_new_tokens: int = 4096
    max_beams: int = 10
    max_connections: int = 512
    max_header_bytes: int = 16 * 1024
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    answer_seconds: float = 600.0
    ping_seconds: float = 2.0
    drain_seconds: float = 8.0
    image: ImageLimits = DEFAULT_LIMITS


@dataclass(frozen=True)
class Settings:
    """What a server is told when it starts.

    Args:
        model_id: What clients call the model; never a path.
        api_key: What every request but the one for `/health` must bring; None for no key.
        hosts: Names and addresses that a Host header may say, without ports, in lower case; None for any.
        image_hosts: Hosts, as `name` or `name:port`, that pictures may be fetched from.
        limits: How much a request may bring and how long it may take.
        decoders: Child processes that decode pictures.
    """

    model_id: str
    api_key: str | None = field(default=None, repr=False)
    hosts: frozenset[str] | None = frozenset({"localhost", "127.0.0.1", "[::1]"})
    image_hosts: frozenset[str] = frozenset()
    limits: Limits = Limits()
    decoders: int = 2
