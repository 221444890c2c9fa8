"""How much of everything the service takes: one dataclass, from which the command's flags are made."""

import argparse
from dataclasses import dataclass, field, fields


def _limit(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Limits:
    """See each field's help."""

    max_bytes: int = _limit(10_000_000, "bytes of one request; refused while it comes in")
    max_pixels: int = _limit(25_000_000, "pixels of one picture")
    max_seconds: float = _limit(60.0, "seconds of one sound")
    max_characters: int = _limit(2_000, "characters of one text")
    max_k: int = _limit(100, "results of one search")
    max_queue: int = _limit(512, "searches at once; more are answered with 503")
    timeout: float = _limit(60.0, "seconds for one search, its upload included")
    max_batch: int = _limit(32, "queries answered together; on a CPU a picture or sound counts as eight")
    max_wait: float = _limit(0.002, "seconds that a query waits for company when nothing else is to be done")
    readers: int = _limit(2, "threads that decode uploads")

    def __post_init__(self):
        for about in fields(self):
            value = getattr(self, about.name)
            if value < 0 or (value == 0 and about.name != "max_wait"):
                raise ValueError(f"--{about.name} {value}: expected a positive number.")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """A flag for each limit."""
        for about in fields(cls):
            text = f"{about.metadata['help']} (default: {about.default:,})"
            parser.add_argument(f"--{about.name}", type=type(about.default), default=about.default, help=text)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Limits":
        """The limits among a command's arguments.

        Raises:
            ValueError: one is not positive.
        """
        return cls(**{about.name: getattr(arguments, about.name) for about in fields(cls)})
