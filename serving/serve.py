"""`altmoe serve`: the search service as a process.

Comes in: a model, stores, limits. Goes out: a process that answers until SIGTERM or Ctrl-C, which it obeys by answering what
is inside, refusing what is new (503), and ending with exit code 0.
"""

import argparse
import gc
import logging
import socket

from serving.limits import Limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--model", required=True, help="trained or published model: folder or Hub name")
    parser.add_argument(
        "--store",
        action="append",
        required=True,
        metavar="MODALITY=STORE",
        help="what can be found: a LatentStore or a database's address (may be repeated)",
    )
    parser.add_argument(
        "--index", default="auto", help="auto, exact, a FAISS factory string, milvus://... or postgresql://..."
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000; 0: any)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    parser.add_argument("--threads", type=int, help="threads of one encoder or connector call (default: torch's own)")
    parser.add_argument("--quiet", action="store_true", help="log no line for each request")
    Limits.add_arguments(parser)


def read_stores(given: list[str]) -> dict[str, str]:
    """`MODALITY=STORE` -> `{modality: store}`.

    Raises:
        ValueError: of another form, or a modality twice.
    """
    stores = {}
    for text in given:
        modality, equals, name = text.partition("=")
        if not (modality and equals and name):
            raise ValueError(f"--store {text}: expected MODALITY=STORE, e.g. image=build/stores/stamps/image.")
        if modality in stores:
            raise ValueError(f"--store {text}: there is a store of '{modality}' already.")
        stores[modality] = name
    return stores


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the port, but does not listen yet: who connects before the model is loaded is refused.

    Raises:
        OSError: the port is taken or may not be used, or the host is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        own = socket.socket(family, kind, protocol)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(address)
    except (OSError, OverflowError) as error:
        raise OSError(f"Cannot listen on {host}, port {port} ({error}): choose another --port or --host.") from error
    return own


def main(arguments: argparse.Namespace) -> None:
    """Serve until told to stop.

    Raises:
        ValueError: bad arguments, or a store of another protocol.
        OSError: the port is taken, or something is not there.
        RuntimeError: a package is not installed.
    """
    limits, stores = Limits.of(arguments), read_stores(arguments.store)
    own = bind(arguments.host, arguments.port)  # before the model is loaded, which takes long
    try:
        import torch

        from model_cards.endpoint import handler
        from serving.engine import Engine
        from serving.server import serve
        from serving.service import Service

        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        handler.MAX_PIXELS, handler.MAX_SECONDS = limits.max_pixels, limits.max_seconds
        engine = Engine(arguments.model, stores, arguments.index, arguments.device)
    except ImportError as error:
        raise RuntimeError(f"{error}: pip install -c constraints.txt -e '.[serve]'") from error
    engine.warm_up()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("altmoe.serve").setLevel(logging.WARNING if arguments.quiet else logging.INFO)
    for direction, index in engine.indexes.items():
        print(f"{direction}: {index.describe()}", flush=True)
    service = Service(engine, limits)
    gc.collect()
    gc.freeze()  # what is loaded stays: collecting through all of it stalled every request for up to a second
    serve(service, own)
