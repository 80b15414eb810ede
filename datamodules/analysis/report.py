"""The page of an analysis: one file that needs no other."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.analysis.cleansing import REASONS
from datamodules.analysis.measure import MEASURES, SIZES
from datamodules.exclusion import Exclusion
from diffusion.evaluation.plots import number
from diffusion.files import atomic

LINES = 500  # of the list of findings that the page shows


def count(found: Sequence[Exclusion], reasons: Sequence[str], splits: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """By reason: how many images, in which splits, how many with a twin in another split, and whether it is listed.

    Args:
        found: the findings.
        reasons: that are listed.
        splits: of the images, by name.
    """
    counts = {}
    for reason in REASONS:
        of = [finding for finding in found if finding.reason == reason]
        counts[reason] = {
            "images": len(of),
            "by_split": dict(Counter(finding.split for finding in of if finding.split)),
            "across_splits": sum(bool(finding.kept) and splits[finding.kept] != finding.split for finding in of),
            "listed": reason in reasons,
        }
    return counts


def write_page(
    folder: Path, summary: Mapping[str, Any], found: Sequence[Exclusion], captions: Mapping[str, str], command: str
) -> Path:
    """Writes `report.html` with the pictures inside.

    Args:
        folder: of the analysis, with `plots/`.
        summary: the content of `analysis.json`.
        found: the findings.
        captions: of the pictures, by name.
        command: that trains without the images on the list.
    """
    from jinja2 import Environment, StrictUndefined

    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["number"] = number
    pictures = [
        (what, base64.b64encode((folder / "plots" / f"{name}.png").read_bytes()).decode())
        for name, what in captions.items()
    ]
    text = page.from_string(PAGE).render(
        summary=summary,
        sizes=SIZES,
        measures=MEASURES,
        reasons=REASONS,
        found=found[:LINES],
        total=len(found),
        pictures=pictures,
        command=command,
    )
    path = folder / "report.html"
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8")
    return path


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Analysis of {{ summary.data }}</title>
<style>
  :root { --ink: #1d2733; --soft: #5d6b7a; --line: #dfe4ea; --back: #f5f7f9; --blue: #33658a; }
  * { box-sizing: border-box; }
  body { margin: 0 auto; max-width: 1240px; padding: 24px; color: var(--ink); background: white;
    font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
  h1 { margin: 0; font-size: 28px; } h2 { margin: 40px 0 12px; font-size: 20px; }
  p { margin: 4px 0; } .soft { color: var(--soft); } a { color: var(--blue); }
  nav a { margin-right: 16px; }
  code { background: var(--back); border: 1px solid var(--line); border-radius: 4px; padding: 1px 5px; font-size: 13px;
    overflow-wrap: anywhere; }
  .plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 24px; align-items: start; }
  .plots img { width: 100%; border: 1px solid var(--line); border-radius: 8px; } figure { margin: 0; }
  table { border-collapse: collapse; font-size: 14px; margin-bottom: 16px; }
  td, th { border-bottom: 1px solid var(--line); padding: 4px 16px 4px 0; text-align: left; vertical-align: top;
    overflow-wrap: anywhere; }
  .n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
</style>

<h1>Analysis of {{ summary.data }}</h1>
<p class="soft">{{ summary.describe }}</p>
<p class="soft">{{ summary.protocol.originals }}; made {{ summary.made }}</p>
<nav><a href="#sizes">Numbers</a><a href="#found">What to clean</a><a href="#pictures">Pictures</a>
<a href="#list">The list</a></nav>

<h2 id="sizes">Numbers</h2>
<table>
<tr><th></th><th class="n">mean</th><th class="n">deviation</th><th class="n">min</th><th class="n">median</th>
<th class="n">max</th><th></th></tr>
{% for names, values in ((sizes, summary.sizes), (measures, summary.measures)) %}
{% for column, (title, unit) in names.items() %}
<tr><td>{{ title }}</td>{% for key in ("mean", "std", "min", "median", "max") %}
<td class="n">{{ values[column][key] | number }}</td>{% endfor %}<td class="soft">{{ unit }}</td></tr>
{% endfor %}
{% endfor %}
{% for name, values in summary.channels.items() %}
<tr><td>{{ name }}</td><td class="n">{{ values.mean | number }}</td><td class="n">{{ values.std | number }}</td>
<td></td><td></td><td></td><td class="soft">pixel values from 0 to 1</td></tr>
{% endfor %}
</table>

<h2 id="found">What to clean</h2>
<table>
<tr><th>finding</th><th class="n">images</th><th class="n">twin in another split</th><th>in exclude.csv</th>
<th></th></tr>
{% for reason, counts in summary.findings.items() %}
<tr><td>{{ reason | replace("_", " ") }}</td><td class="n">{{ counts.images }}</td>
<td class="n">{{ counts.across_splits or "" }}</td>
<td>{{ "yes" if counts.listed and counts.images else "" }}</td><td class="soft">{{ reasons[reason] }}</td></tr>
{% endfor %}
</table>
{% if summary.empty_classes %}
<p>Classes without an image that can be decoded: {{ summary.empty_classes | join(", ") }}. Training needs one of each:
fill their folders, or leave them out of <code>data.classes</code>.</p>
{% endif %}
<p>Nothing was deleted. Read and edit <code>exclude.csv</code>; then <code>{{ command }}</code> leaves its
{{ summary.excluded }} images out.</p>

<h2 id="pictures">Pictures</h2>
<div class="plots">
{% for what, data in pictures %}
<figure><img src="data:image/png;base64,{{ data }}" alt="{{ what }}">
<figcaption class="soft">{{ what }}</figcaption></figure>
{% endfor %}
</div>

<h2 id="list">The list</h2>
<p class="soft">{{ "All %d findings." | format(total) if found | length == total else
"The first %d of %d findings; all are in findings.csv." | format(found | length, total) }}</p>
<table>
<tr><th>image</th><th>split</th><th>finding</th><th>details</th><th>stays</th></tr>
{% for finding in found %}
<tr><td>{{ finding.name }}</td><td>{{ finding.split }}</td><td>{{ finding.reason | replace("_", " ") }}</td>
<td>{{ finding.details }}</td><td>{{ finding.kept }}</td></tr>
{% endfor %}
</table>
</html>
"""
