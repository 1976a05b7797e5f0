"""First schema: files, jobs, events, tails, keys, sign-in tokens."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

STATUSES = (
    "'validating_files', 'queued', 'running', 'pausing', 'paused', 'cancelling', 'cancelled', 'succeeded', 'failed'"
)


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("n", sa.Integer, primary_key=True),
        sa.Column("id", sa.String, nullable=False, unique=True),
        sa.Column("bytes", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Integer, nullable=False),
        sa.Column("expires_at", sa.Integer),
        sa.Column("filename", sa.String, nullable=False),
        sa.Column("purpose", sa.String, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("status_details", sa.String),
        sa.Column("sha256", sa.String, nullable=False),
    )
    op.create_index("ix_files_sha256", "files", ["sha256"])
    op.create_table(
        "jobs",
        sa.Column("n", sa.Integer, primary_key=True),
        sa.Column("id", sa.String, nullable=False, unique=True),
        sa.Column("created_at", sa.Integer, nullable=False),
        sa.Column("finished_at", sa.Integer),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("intent", sa.String),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("base", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False, unique=True),
        sa.Column("training_file", sa.String, nullable=False),
        sa.Column("validation_file", sa.String),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("method", sa.JSON),
        sa.Column("hyperparameters", sa.JSON, nullable=False),
        sa.Column("resolved", sa.JSON),
        sa.Column("seed", sa.Integer, nullable=False),
        sa.Column("suffix", sa.String),
        sa.Column("metadata", sa.JSON),
        sa.Column("integrations", sa.JSON),
        sa.Column("tunewright", sa.JSON),
        sa.Column("error", sa.JSON),
        sa.Column("trained_tokens", sa.Integer),
        sa.Column("estimated_finish", sa.Integer),
        sa.Column("result_files", sa.JSON, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("retry", sa.JSON),
        sa.Column("started_by", sa.String, nullable=False),
        sa.CheckConstraint(f"status IN ({STATUSES})", name="job_status"),
    )
    op.create_index("ix_jobs_status", "jobs", ["status"])
    op.create_table(
        "events",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("job_id", sa.String, sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("type", sa.String, nullable=False),
        sa.Column("level", sa.String, nullable=False),
        sa.Column("message", sa.String, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.Column("step", sa.Integer),
        sa.Column("shown", sa.Boolean, nullable=False),
        sa.Column("superseded", sa.Boolean, nullable=False),
    )
    op.create_index("events_line", "events", ["job_id", "attempt", "seq"], unique=True)
    op.create_index("events_order", "events", ["job_id", "time", "attempt", "seq"])
    op.create_index("events_type", "events", ["job_id", "type", "step"])
    op.create_table(
        "tails",
        sa.Column("job_id", sa.String, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("attempt", sa.Integer, primary_key=True),
        sa.Column("offset", sa.Integer, nullable=False),
    )
    op.create_table(
        "keys",
        sa.Column("n", sa.Integer, primary_key=True),
        sa.Column("id", sa.String, nullable=False, unique=True),
        sa.Column("hash", sa.String, nullable=False, unique=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("hint", sa.String, nullable=False),
        sa.Column("created_at", sa.Integer, nullable=False),
        sa.Column("last_used", sa.Integer),
        sa.Column("expires_at", sa.Integer),
        sa.Column("revoked_at", sa.Integer),
    )
    op.create_table(
        "signin_tokens",
        sa.Column("hash", sa.String, primary_key=True),
        sa.Column("expires_at", sa.Integer, nullable=False),
    )
