"""One HTML page about a prepared data set, without outside parts: `sft-dist data stats R.yaml --html FILE`.

Goes in: the preparation's report and the survey, as JSON values. Comes out: the page. Texts of the data are escaped by
the template engine, all of them, always.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from sft_dist.observe.charts import draw_histogram
from sft_dist.observe.data_charts import draw_survey
from sft_dist.observe.report import percent

TEMPLATE = Path(__file__).with_name("data_page.html")
MAX_LISTED = 20


def render(name: str, report: dict[str, Any], survey: dict[str, Any]) -> str:
    """The page's HTML. `report`: `PrepareReport.as_dict()`, `survey`: `Survey.as_dict()`."""
    histogram = report["splits"]["train"]["histogram"]
    pictures = {"train": draw_histogram(histogram["edges"], histogram["counts"])} | draw_survey(survey)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "count": "{:,}".format}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name,
        report=report,
        survey=survey,
        pictures={key: base64.b64encode(picture).decode() for key, picture in pictures.items()},
        max_listed=MAX_LISTED,
    )
