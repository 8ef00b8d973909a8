"""A real S3 server on loopback: moto's, with an empty account, for as long as a `with` lasts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fsspec import get_filesystem_class
from moto.server import ThreadedMotoServer


@contextmanager
def object_store() -> Iterator[str]:
    """Start a server and give its address; the environment leads there, and to nowhere once it has stopped.

    s3fs keeps one file system per set of arguments for the life of a process, and the address is not among them but
    in the environment: a file system of an earlier server would ask a port at which nobody listens.
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
