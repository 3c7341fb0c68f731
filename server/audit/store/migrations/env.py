"""Alembic runs this; the connection, with its transaction, comes from `server.audit.store.schema.migrate`."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
