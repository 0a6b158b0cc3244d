"""What Ray starts in place of Python where workers are forked: it has the worker made, and stands for it until its end.

Run by its path, with nothing but the standard library, since there is one for every worker:
``python -I -S fork_client.py SOCKET SCRIPT [ARGUMENT...]``. Where nobody answers at the socket it becomes Python
itself.
"""

import json
import os
import select
import socket
import sys

HELLO = b"\n"
"""What the other side says once it has imported what it is to import."""
HELLO_SECONDS = 60.0
LOOK_SECONDS = 1.0
"""Between two looks whether who started this process is still there."""


def main(place: str, arguments: list[str]) -> int:
    """The exit status of the worker, or 1 if who started it is gone."""
    parent = os.getppid()
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(HELLO_SECONDS)
    wanted = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    request = json.dumps(wanted).encode() + b"\n"
    try:
        line.connect(place)
        if line.recv(len(HELLO)) != HELLO:
            raise ConnectionError("it is gone")
        sent = socket.send_fds(line, [request], [0, 1, 2])
        line.sendall(request[sent:])
    except OSError:
        line.close()
        os.execv(sys.executable, [sys.executable, *arguments])
    while not select.select([line], [], [], LOOK_SECONDS)[0]:
        if os.getppid() != parent:
            return 1
    try:
        return int(line.recv(16) or 1)
    except OSError:
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
