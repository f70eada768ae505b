"""A TCP relay before the emulator, that fails as networks and their machines do."""
from __future__ import annotations

import contextlib
import socket
import struct
import threading

from tds_process import free_port

RESET = struct.pack("ii", 1, 0)  # SO_LINGER of a socket whose close() sends a RST


class Door:
    """Open at first. Each way applies to connections that come from then on; what is connected stays so, but close() and
    the other ways than open end all of them.

        open         everything passes
        refuse       nobody listens
        full         somebody listens, and takes nobody: a connect gets no answer
        reset        taken, and reset at once
        black_hole   taken, and then nothing, ever
    """

    def __init__(self, port: int) -> None:
        self.behind = port
        self.lock = threading.Lock()
        self.sockets: set[socket.socket] = set()
        self.taken = 0  # connections since it was made
        self.way = "open"
        self.address = ("127.0.0.1", free_port())  # still its own when it has been shut for a while
        self.listener = self._listen(self.address, 1024)
        self.url = "http://{}:{}".format(*self.address)
        self._serve()

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @staticmethod
    def _listen(address: tuple[str, int], backlog: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(backlog)
        return listener

    def _serve(self) -> None:
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def _stop(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self.listener.close()
        with self.lock:
            for one in self.sockets:
                with contextlib.suppress(OSError):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
            self.sockets.clear()

    def turn(self, way: str) -> None:
        """From now on."""
        self._stop()
        self.way = way
        if way == "refuse":
            return
        self.listener = self._listen(self.address, 0 if way == "full" else 1024)
        if way != "full":
            self._serve()
            return
        for _ in range(4):  # the backlog, and what the kernel adds to it
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(self.address)
            self.sockets.add(one)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                one, _ = listener.accept()
            except OSError:
                return
            with self.lock:
                self.taken += 1
                if self.way == "reset":
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    one.close()
                    continue
                self.sockets.add(one)
                if self.way == "black_hole":
                    continue
                other = socket.create_connection(("127.0.0.1", self.behind))
                self.sockets.add(other)
            for a, b in ((one, other), (other, one)):
                threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            for one in (source, sink):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
