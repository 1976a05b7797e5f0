"""Alembic's entry: migrate the connection that jobs/db.py hands over. There is no command-line use."""

from alembic import context

from tunewright.jobs.rows import schema

context.configure(connection=context.config.attributes["connection"], target_metadata=schema, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
