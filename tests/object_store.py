"""A real S3 server on loopback for tests: moto's, with an empty account."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fsspec import get_filesystem_class
from moto.server import ThreadedMotoServer


@contextmanager
def object_store() -> Iterator[str]:
    """Run a server inside a ``with`` block, and point the environment to it. Yields: its address.

    s3fs caches file systems by their arguments for the life of a process. The address is not an argument but in the
    environment, so the cache is cleared: a cached file system would use the port of an earlier server.
    """
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    names = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    get_filesystem_class("s3").clear_instance_cache()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in names.items():
                patch.setenv(name, value)
            yield address
    finally:
        server.stop()
        get_filesystem_class("s3").clear_instance_cache()
