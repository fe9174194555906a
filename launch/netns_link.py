"""A network link in user space: frames between two interfaces, late and sometimes lost.

``netns_link.py INTERFACE INTERFACE DELAY_MS LOSS_PERCENT SEED`` carries frames both ways until it
is ended; launch/netns.sh uses it where the kernel has no netem. Once frames travel it prints "up".
"""

import contextlib
import random
import selectors
import socket
import sys
import time
from collections import deque

_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
_PACKET_IGNORE_OUTGOING = 23
_ETH_P_ALL = 3
#: Above the largest segment that the kernel hands over at once, with its header.
_FRAME_BYTES = 1 << 17
#: Frames under way in one direction; more are lost, as in the queue of a switch.
_QUEUE_FRAMES = 1000


def open_interface(name: str) -> socket.socket:
    """A socket that gets every frame arriving at an interface.

    TCP leaves segmentation and checksums to the interface. The header that PACKET_VNET_HDR puts
    before each frame says what is left to do, so that the other interface can do it.
    """
    interface = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    interface.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    interface.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    interface.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 23)
    interface.bind((name, _ETH_P_ALL))
    interface.setblocking(False)
    return interface


class Direction:
    """The frames on their way from one interface to the other."""

    def __init__(
        self, source: socket.socket, target: socket.socket, delay: float, loss: float, seed: str
    ) -> None:
        self.source, self.target = source, target
        self._delay, self._loss = delay, loss
        self._random = random.Random(seed)
        self._under_way: deque[tuple[float, bytes]] = deque()

    def take(self) -> None:
        """Take in a frame, unless it is to be lost."""
        try:
            frame = self.source.recv(_FRAME_BYTES)
        except OSError:
            return  # the interface went down meanwhile
        if self._random.random() >= self._loss and len(self._under_way) < _QUEUE_FRAMES:
            self._under_way.append((time.monotonic() + self._delay, frame))

    def deliver(self) -> float:
        """Send what is due; return the seconds until the next frame is."""
        while self._under_way:
            left = self._under_way[0][0] - time.monotonic()
            if left > 0:
                return left
            # If its queue is full or it is down, the frame is lost, as on a real link.
            with contextlib.suppress(OSError):
                self.target.send(self._under_way.popleft()[1])
        return 60.0


def main(first: str, second: str, delay_ms: str, loss_percent: str, seed: str) -> None:
    delay, loss = float(delay_ms) / 1e3, float(loss_percent) / 1e2
    one, other = open_interface(first), open_interface(second)
    directions = [
        Direction(one, other, delay, loss, f"{seed} there"),
        Direction(other, one, delay, loss, f"{seed} back"),
    ]
    selector = selectors.DefaultSelector()
    for direction in directions:
        selector.register(direction.source, selectors.EVENT_READ, direction)
    print("up", flush=True)
    while True:
        for key, _ in selector.select(min(direction.deliver() for direction in directions)):
            key.data.take()


if __name__ == "__main__":
    main(*sys.argv[1:])
