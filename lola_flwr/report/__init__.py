"""A run's report: one HTML file that needs no network and no program beside a browser.

::

    from lola_flwr.report import Report, Run

    Report([Run.read("runs/demo"), Run.read("runs/demo-crunch")]).save("report.html")
"""

from lola_flwr.report.page import Report
from lola_flwr.report.runs import Run

__all__ = ["Report", "Run"]
