"""RankMonitor: end all ranks of a run within seconds if one of them dies."""

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable

import lightning as L

from tq_lightning.errors import Interrupted

GRACE_SECONDS = 2.0  # time for a rank to exit; the monitor of Lightning waits 5 s
CONNECT_SECONDS = 30.0
_BYE = b"bye"


class RankMonitor(L.Callback):
    """Keep a TCP connection from every rank to the first, which the kernel closes if a rank dies.

    After the loss of a peer, the next reduction fails under gloo. Under NCCL it blocks until the
    time limit of the process group (30 minutes), which nothing in the process can interrupt.
    The process is therefore ended `GRACE_SECONDS` after the loss. There are no heartbeats, so a
    rank that is busy for a long time is not considered dead.

    Args:
        on_lost: called with the message before the process is ended; it marks the record as failed.
        hint: returns how to resume the run; added to the message.
    """

    def __init__(
        self,
        on_lost: Callable[[str], None] = lambda message: None,
        hint: Callable[[], str] = lambda: "",
    ) -> None:
        self.on_lost, self.hint = on_lost, hint
        self.message: str | None = None  # set once a peer is lost
        self._lost = threading.Event()
        self._ended = threading.Event()
        self._sockets: dict[socket.socket, int] = {}  # connection -> rank at its other end
        self._rank, self._size = 0, 1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Connect the ranks, after Lightning has created the process group."""
        self._rank, self._size = trainer.global_rank, trainer.world_size
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if self._size == 1 or environment is None or self._sockets:
            return
        server = None
        if self._rank == 0:
            server = socket.create_server(("", 0), backlog=self._size)
        place = (server.getsockname()[1], secrets.token_bytes(16)) if server else None
        agreed = trainer.strategy.broadcast(place)
        assert agreed is not None  # the first rank has made it
        port, token = agreed
        with contextlib.suppress(OSError):  # hosts that cannot connect are not monitored
            if server is not None:
                self._accept(server, token)
            else:
                self._connect(environment.main_address, port, token)
        if self._sockets:
            threading.Thread(target=self._watch, name="rank monitor", daemon=True).start()

    def _accept(self, server: socket.socket, token: bytes) -> None:
        until = time.monotonic() + CONNECT_SECONDS
        with server:
            while len(self._sockets) < self._size - 1:
                server.settimeout(max(0.01, until - time.monotonic()))
                peer, _ = server.accept()
                peer.settimeout(5.0)
                hello = peer.recv(len(token) + 4, socket.MSG_WAITALL)
                if hello[:-4] == token:
                    self._keep(peer, int.from_bytes(hello[-4:], "big"))

    def _connect(self, host: str, port: int, token: bytes) -> None:
        peer = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
        peer.sendall(token + self._rank.to_bytes(4, "big"))
        self._keep(peer, 0)

    def _keep(self, peer: socket.socket, rank: int) -> None:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):  # a host without power does not close its connections
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._sockets[peer] = rank

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._sockets:
                selector.register(peer, selectors.EVENT_READ)
            while selector.get_map() and not self._ended.is_set():
                for key, _ in selector.select(timeout=1.0):
                    received = b""
                    with contextlib.suppress(OSError):
                        received = key.fileobj.recv(16)  # type: ignore[union-attr]
                    if self._ended.is_set():
                        return
                    if received.startswith(_BYE):
                        selector.unregister(key.fileobj)
                        continue
                    lost = self._sockets[key.fileobj]  # type: ignore[index]
                    self._end(int(received) if received.isdigit() else lost)
                    return

    def _end(self, rank: int) -> None:
        """Notify the other ranks, wait for the main thread to fail, and end the process."""
        hint = self.hint()
        self.message = (
            f"rank {rank} of {self._size} ended before the others; see its own output for the "
            f"reason{'; ' if hint else ''}{hint}"
        )
        self._lost.set()
        self._send(str(rank).encode())
        if self._ended.wait(GRACE_SECONDS):
            return
        self.on_lost(self.message)
        if self.reports(rank):
            print(f"error: {self.message}", file=sys.stderr, flush=True)
        os._exit(1)

    def reports(self, lost: int | None = None) -> bool:
        """Return True on the rank that prints the message: the first remaining one."""
        if lost is None:
            lost = 0 if self.message is not None and self.message.startswith("rank 0 ") else -1
        return self._rank == (1 if lost == 0 else 0)

    def _send(self, message: bytes) -> None:
        for peer in self._sockets:
            with contextlib.suppress(OSError):
                peer.sendall(message)

    def _leave(self) -> None:
        self._ended.set()
        self._send(_BYE)
        for peer in self._sockets:
            peer.close()
        self._sockets.clear()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Announce the end of this rank, so that it does not count as a loss."""
        self._leave()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Name the lost peer in the error that its loss caused on this rank.

        All ranks raise `Interrupted`, so it counts as a normal end.
        """
        if self._size == 1:
            return
        if isinstance(exception, Interrupted):
            self._leave()
        elif isinstance(exception, RuntimeError) and self._lost.wait(1.0):
            self._ended.set()
            exception.args = (self.message,)
