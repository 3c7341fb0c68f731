"""Databases of a test's own in the PostgreSQL that all tests share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql
from sqlalchemy import make_url

from local.stack.stack import Stack


@contextmanager
def empty_database(servers: Stack) -> Iterator[str]:
    """SQLAlchemy URL of an empty PostgreSQL database, which is dropped in the end."""
    url = servers.endpoints.database_url
    assert url is not None
    admin = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        yield make_url(url).set(database=name).render_as_string(hide_password=False)
    finally:
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
