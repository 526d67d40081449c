"""The first schema: runs, comparisons, cases, jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

ID = sa.String(30)
DIGEST = sa.String(71)
NAME = sa.String(100)
WORD = sa.String(40)
TIME = sa.String(40)


def upgrade() -> None:
    op.create_table("facts", sa.Column("name", NAME, nullable=False), text("value"), key("facts", "name"))
    create_runs()
    create_comparisons()
    create_cases()
    create_jobs()


def text(name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=nullable)


def key(table: str, *columns: str) -> sa.PrimaryKeyConstraint:
    return sa.PrimaryKeyConstraint(*columns, name=f"pk_{table}")


def link(table: str, column: str, target: str, *, ondelete: str | None = None) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [target], name=f"fk_{table}_{column}", ondelete=ondelete)


def create_runs() -> None:
    op.create_table(
        "runs",
        sa.Column("run_id", ID, nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("mode", WORD, nullable=False),
        text("target"),
        text("model_id"),
        text("framework"),
        sa.Column("question_kind", WORD, nullable=False),
        sa.Column("identity", DIGEST, nullable=False),
        sa.Column("complete", sa.Boolean(), nullable=False),
        sa.Column("synthetic", sa.Boolean(), nullable=False),
        sa.Column("raw_request_ref", DIGEST, nullable=True),
        sa.Column("raw_response_ref", DIGEST, nullable=True),
        text("document"),
        key("runs", "run_id"),
    )
    op.create_index("ix_runs_identity_run_id", "runs", ["identity", "run_id"])
    op.create_index("ix_runs_target_run_id", "runs", ["target", "run_id"])


def create_comparisons() -> None:
    op.create_table(
        "comparisons",
        sa.Column("comparison_id", ID, nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("left_run_id", ID, nullable=True),
        sa.Column("right_run_id", ID, nullable=True),
        text("left_target"),
        text("right_target"),
        sa.Column("question_kind", WORD, nullable=False),
        sa.Column("verdict", WORD, nullable=False),
        sa.Column("case_name", NAME, nullable=False),
        sa.Column("first_divergence_index", sa.Integer(), nullable=True),
        sa.Column("max_token_abs_diff", sa.Double(), nullable=True),
        text("document"),
        key("comparisons", "comparison_id"),
        link("comparisons", "left_run_id", "runs.run_id"),
        link("comparisons", "right_run_id", "runs.run_id"),
    )
    op.create_index("ix_comparisons_case_name_comparison_id", "comparisons", ["case_name", "comparison_id"])
    op.create_index("ix_comparisons_verdict_comparison_id", "comparisons", ["verdict", "comparison_id"])


def create_cases() -> None:
    op.create_table(
        "cases",
        sa.Column("name", NAME, nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        text("document"),
        key("cases", "name"),
    )
    op.create_table(
        "case_tags",
        sa.Column("tag", NAME, nullable=False),
        sa.Column("case_name", NAME, nullable=False),
        key("case_tags", "tag", "case_name"),
        link("case_tags", "case_name", "cases.name", ondelete="CASCADE"),
    )
    op.create_index("ix_case_tags_case_name", "case_tags", ["case_name"])


def create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("request_id", NAME, nullable=False),
        sa.Column("created", TIME, nullable=False),
        sa.Column("state", WORD, nullable=False),
        sa.Column("last_sequence", sa.BigInteger(), nullable=False),
        sa.Column("run_id", ID, nullable=True),
        sa.Column("comparison_id", ID, nullable=True),
        text("problem", nullable=True),
        text("work"),
        key("jobs", "job_id"),
        sa.UniqueConstraint("request_id", name="uq_jobs_request_id"),
        link("jobs", "run_id", "runs.run_id"),
        link("jobs", "comparison_id", "comparisons.comparison_id"),
    )
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.create_table(
        "job_events",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("state", WORD, nullable=False),
        sa.Column("run_id", ID, nullable=True),
        sa.Column("comparison_id", ID, nullable=True),
        text("problem", nullable=True),
        text("message"),
        sa.Column("done", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("unit", NAME, nullable=False),
        key("job_events", "job_id", "sequence"),
        link("job_events", "job_id", "jobs.job_id"),
    )
