"""uvicorn, with the stop that a service behind a load balancer needs.

Comes in: a service and a bound socket. It runs in this process's main thread until SIGTERM or SIGINT.
"""

import socket

import uvicorn

from serving.gate import Gate
from serving.service import Service


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT new searches are refused with 503, those inside are answered, and the process ends as after
    any work that was done (uvicorn itself would end by the signal). A second signal ends at once."""

    def __init__(self, config: uvicorn.Config, gate: Gate):
        super().__init__(config)
        self.gate = gate

    def handle_exit(self, sig: int, frame) -> None:
        """A signal came."""
        if self.gate.stopping:
            self.should_exit = self.force_exit = True
        self.gate.stopping = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self.gate.stopping and not self.gate.inside:
            self.should_exit = True
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"ready on http://{host}:{port} (POST /search, GET /health, /metrics, /docs)", flush=True)


def serve(service: Service, own: socket.socket) -> None:
    """Answer until told to stop."""
    config = uvicorn.Config(
        service.gate,
        log_config=None,
        access_log=False,  # the gate logs, without addresses and contents
        loop="asyncio",
        http="httptools",
        ws="none",
        lifespan="on",
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=max(1, round(service.limits.timeout)),
    )
    Server(config, service.gate).run([own])
