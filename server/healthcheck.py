"""An image's health check: does the server in this container answer /live? Asks nothing of the engine; needs no curl.

    python -P -m server.healthcheck     exit code 0: it does; 1: it does not

The port is OUTRIDER_PORT's, or 8000: a flag --port cannot be seen from here.
"""

from __future__ import annotations

import http.client
import os
import sys

SECONDS = 3.0  # to connect, and to wait for each part of the answer


def live(port: int) -> str | None:
    """None when it is; else why it is not."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", "/live")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"no answer on port {port}: {error}"
    finally:
        connection.close()
    return None if status == http.client.OK else f"/live says {status}"


def main() -> int:
    why = live(int(os.environ.get("OUTRIDER_PORT") or 8000))
    if why is not None:
        sys.stderr.write(f"{why}\n")
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main())
