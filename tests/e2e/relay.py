"""A way to a server that can be cut: its connections end, and nobody gets a new one until it is mended."""
from __future__ import annotations

import socket
import threading
from contextlib import suppress

from tds_process import free_port


class Relay:
    """Listens on localhost, at a port of its own, for one server."""

    def __init__(self, server: str) -> None:
        host, _, port = server.rpartition(":")
        self.server, self.port = (host, int(port)), free_port()
        self.lock = threading.Lock()  # guards what follows
        self.connections: set[socket.socket] = set()
        self.mend()

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def mend(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def cut(self) -> None:
        with self.lock:
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept()
            self.listener.close()
            for connection in self.connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(listener, client), daemon=True).start()

    def _serve(self, listener: socket.socket, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(self.server) as server:
            pair = {client, server}
            for connection in pair:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.lock:
                if listener.fileno() < 0:  # cut meanwhile
                    return
                self.connections |= pair
            back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
            back.start()
            self._pump(client, server)
            back.join()
            with self.lock:
                self.connections -= pair

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
