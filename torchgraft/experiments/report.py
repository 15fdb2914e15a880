"""One self-contained HTML page of a finished run: table, claims, figures, notes; nothing is fetched."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from torchgraft.catalog.measured import interval, show, tables

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ record.slug }}: {{ record.scale }} run of {{ record.date }}</title>
<style>
:root { color-scheme: light dark; --line: #8885; --soft: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; }
.wide { overflow-x: auto; }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.verdict { font-weight: 600; white-space: nowrap; }
.soft { color: var(--soft); font-size: .9em; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; background: #fff; }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .7rem; white-space: pre-wrap; }
</style></head><body>
<h1>{{ title }}</h1>
<p class="soft">{{ record.scale }} scale · {{ record.date }} · torchgraft {{ record.version }} ·
{{ record.seconds }} s of measuring · data: {{ record.data }}</p>
<h2>Claims</h2>
{% if record.claims %}<div class="wide"><table>
<tr><th>claim</th><th class="number">effect</th><th class="number">95 % interval</th>
<th>verdict</th><th>the paper</th></tr>
{% for claim in record.claims %}<tr>
<td>{{ claim.text }}<br><span class="soft">{{ claim.metric }}: {{ claim.arm }} against {{ claim.against }}; matters from
{{ claim.smallest_effect }} {{ claim.unit }}; {{ claim.method }}, n = {{ claim.n }} {{ claim.paired_over }}</span></td>
<td class="number">{{ number(claim.estimate) }} {{ claim.unit }}</td>
<td class="number">{{ interval(claim.interval) }}</td>
<td class="verdict">{{ marks[claim.verdict] }} {{ claim.verdict }}</td><td>{{ claim.paper }}</td></tr>
{% endfor %}</table></div>{% else %}<p>No claim of the recipe applies to this configuration.</p>{% endif %}
<h2>Arms</h2>
{% for metrics, rows in tables %}<div class="wide"><table>
<tr><th>arm</th>{% for metric in metrics %}<th class="number">{{ metric }}</th>{% endfor %}</tr>
{% for arm, cells in rows %}<tr><td>{{ arm }}</td>
{% for cell in cells %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endfor %}
<p class="soft">Mean ± sample standard deviation over seeds.</p>
<h2>Figures</h2>
{% for name, source in figures %}<figure><img src="data:image/svg+xml;base64,{{ source }}" alt="{{ name }}">
<figcaption class="soft">{{ name }}</figcaption></figure>
{% endfor %}
<h2>Notes</h2><p>{{ record.notes }}</p>
<h2>How it was made</h2><pre>{{ record.command }}</pre>
<pre>{{ details }}</pre>
</body></html>
"""


def render(folder: Path, title: str | None = None) -> str:
    """The page of the finished run in ``folder``.

    Raises:
        FileNotFoundError: when the folder holds no finished run.
    """
    import jinja2

    source = folder / "result.json"
    if not source.exists():
        raise FileNotFoundError(f"{folder} holds no finished run (no result.json); give a folder below runs/")
    record = json.loads(source.read_text(encoding="utf-8"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    drawn = [(name, base64.b64encode((folder / name).read_bytes()).decode()) for name in record["figures"]]
    shown = {key: record[key] for key in ("config", "tuned", "environment")}
    return environment.from_string(_PAGE).render(
        record=record,
        title=title or record["slug"],
        tables=tables(record),
        figures=drawn,
        number=show,
        interval=interval,
        marks={"supported": "✓", "not supported": "✗", "inconclusive": "?"},
        details=json.dumps(shown, indent=1),
    )
