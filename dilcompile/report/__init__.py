"""What happened to every attention of a model: the record, what it costs, and its text, JSON and HTML."""

from __future__ import annotations

from dilcompile.report.record import GraphReport, Verdict
from dilcompile.report.report import Report

__all__ = ["GraphReport", "Report", "Verdict"]
