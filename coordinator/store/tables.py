"""The tables: a document as text in each, never changed, and beside it the few columns that lists and filters need.

The migrations make them; a test holds the two together. It must not know any dialect.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Double, ForeignKey, Index, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
ID = String(30)
DIGEST = String(71)  # "sha256:" and 64 digits
NAME = String(100)
TIME = String(40)  # RFC 3339, UTC
WORD = String(40)  # of an enum


class Table(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)


class FactRow(Table):
    """What the store knows of itself."""

    __tablename__ = "facts"

    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class RunRow(Table):
    """A stored run."""

    __tablename__ = "runs"
    __table_args__ = (Index(None, "identity", "run_id"), Index(None, "target", "run_id"))

    run_id: Mapped[str] = mapped_column(ID, primary_key=True)
    created: Mapped[str] = mapped_column(TIME)
    mode: Mapped[str] = mapped_column(WORD)
    target: Mapped[str] = mapped_column(Text)
    model_id: Mapped[str] = mapped_column(Text)
    framework: Mapped[str] = mapped_column(Text)
    question_kind: Mapped[str] = mapped_column(WORD)
    identity: Mapped[str] = mapped_column(DIGEST)
    complete: Mapped[bool]
    synthetic: Mapped[bool]
    raw_request_ref: Mapped[str | None] = mapped_column(DIGEST)
    raw_response_ref: Mapped[str | None] = mapped_column(DIGEST)
    document: Mapped[str] = mapped_column(Text)  # last: a list reads the columns before it and stops there


class ComparisonRow(Table):
    """A stored comparison."""

    __tablename__ = "comparisons"
    __table_args__ = (Index(None, "case_name", "comparison_id"), Index(None, "verdict", "comparison_id"))

    comparison_id: Mapped[str] = mapped_column(ID, primary_key=True)
    created: Mapped[str] = mapped_column(TIME)
    left_run_id: Mapped[str | None] = mapped_column(ForeignKey("runs.run_id"))
    right_run_id: Mapped[str | None] = mapped_column(ForeignKey("runs.run_id"))
    left_target: Mapped[str] = mapped_column(Text)
    right_target: Mapped[str] = mapped_column(Text)
    question_kind: Mapped[str] = mapped_column(WORD)
    verdict: Mapped[str] = mapped_column(WORD)
    case_name: Mapped[str] = mapped_column(NAME)  # no foreign key: it outlives the case
    first_divergence_index: Mapped[int | None]
    max_token_abs_diff: Mapped[float | None] = mapped_column(Double)
    document: Mapped[str] = mapped_column(Text)


class CaseRow(Table):
    """A saved case, as it is now."""

    __tablename__ = "cases"

    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    revision: Mapped[int] = mapped_column(BigInteger)
    document: Mapped[str] = mapped_column(Text)


class RetiredCaseRow(Table):
    """The last revision that a name had when its case was deleted: one created again goes on from there."""

    __tablename__ = "retired_cases"

    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    revision: Mapped[int] = mapped_column(BigInteger)


class CaseTagRow(Table):
    """One tag of a case."""

    __tablename__ = "case_tags"

    tag: Mapped[str] = mapped_column(NAME, primary_key=True)  # first: lists are filtered by it
    case_name: Mapped[str] = mapped_column(ForeignKey("cases.name", ondelete="CASCADE"), primary_key=True, index=True)


class JobRow(Table):
    """A job, as it is now."""

    __tablename__ = "jobs"

    job_id: Mapped[str] = mapped_column(ID, primary_key=True)
    request_id: Mapped[str] = mapped_column(NAME, unique=True)
    created: Mapped[str] = mapped_column(TIME)
    state: Mapped[str] = mapped_column(WORD, index=True)
    last_sequence: Mapped[int] = mapped_column(BigInteger)
    run_id: Mapped[str | None] = mapped_column(ForeignKey("runs.run_id"))
    comparison_id: Mapped[str | None] = mapped_column(ForeignKey("comparisons.comparison_id"))
    problem: Mapped[str | None] = mapped_column(Text)  # a StoredProblem as JSON
    work: Mapped[str] = mapped_column(Text)


class JobEventRow(Table):
    """One step of a job, with the job as it stood then."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    state: Mapped[str] = mapped_column(WORD)
    run_id: Mapped[str | None] = mapped_column(ID)
    comparison_id: Mapped[str | None] = mapped_column(ID)
    problem: Mapped[str | None] = mapped_column(Text)
    message: Mapped[str] = mapped_column(Text)
    done: Mapped[int] = mapped_column(BigInteger)
    total: Mapped[int] = mapped_column(BigInteger)
    unit: Mapped[str] = mapped_column(NAME)
