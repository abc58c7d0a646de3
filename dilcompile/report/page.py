"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

from html import escape

from dilcompile.report.record import Report


def page(report: Report) -> str:
    """See ``Report.to_html``."""
    return f"<!doctype html><pre>{escape(str(report))}</pre>"
