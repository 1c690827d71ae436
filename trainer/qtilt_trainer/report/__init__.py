"""The report of finished runs: one self-contained HTML page, and its plots as PNG files.

Read `page.py` first; `run_data.py` says what a run directory must hold.
"""

from qtilt_trainer.report.page import write_report

__all__ = ["write_report"]
