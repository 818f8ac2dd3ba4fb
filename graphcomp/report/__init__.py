"""What compression did, as text, plain data and plots."""

from graphcomp.report.report import Change, LayerReport, Report

__all__ = ["Change", "LayerReport", "Report"]
