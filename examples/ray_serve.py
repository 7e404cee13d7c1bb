"""`expe-edge serve` in several processes or on several machines, by Ray Serve.

    python examples/ray_serve.py PACKAGE REPLICAS PORT

Every replica opens the package for itself and runs a batch of its own; Ray's proxy hands requests on to whichever has
the least to do. Answers are those of one server, whichever replica gives them. `pip install 'expe-edge[serve]'
'ray[serve]'` brings what is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import serve

from expe_edge.runtime import Generator
from expe_edge.serve.app import make_app
from expe_edge.serve.run import make_service
from expe_edge.serve.settings import ServerSettings

#: Threads of a replica, and requests that it takes on at once: those that run and those that wait.
THREADS, AT_ONCE = 1, 64


def app_of(package: Path) -> Callable[[], Any]:
    """Return what makes a replica's ASGI application; it is called in the replica."""

    def build() -> Any:
        # It is Ray's proxy that listens, and its address that counts: any name of it is answered to.
        settings = ServerSettings("0.0.0.0", rows=8, context=1024, queue=AT_ONCE, model_name=package.name)  # noqa: S104
        return make_app(make_service(Generator.load(package, threads=THREADS), settings))

    return build


def deployed(package: Path, replicas: int) -> Any:
    """Return the application that Ray Serve runs."""
    deployment = serve.deployment(
        serve.ingress(app_of(package.resolve()))(),
        name="expe-edge",
        num_replicas=replicas,
        max_ongoing_requests=AT_ONCE,
        ray_actor_options={"num_cpus": THREADS},
    )
    return deployment.bind()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    package, replicas, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(deployed(package, replicas), blocking=True)
