"""What axe finds on the page in Chromium: empty, and with a text, light and dark, wide and narrow.

python -m benchmarks.web_accessible package/float32
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import click

from expe_edge.web.site import write_site
from tests import node
from tests.web.conftest import serving

#: How much a finding hinders people, by axe's words.
IMPACTS = ("critical", "serious", "moderate", "minor")


@click.command()
@click.argument("package", type=click.Path(exists=True, path_type=Path))
def main(package: Path) -> None:
    """Count what is found on a page of PACKAGE; exit with 1 where something is serious."""
    with tempfile.TemporaryDirectory() as directory:
        site = Path(directory, "site")
        write_site([package], [package.name], site, title="A page")
        order = {"scenario": "accessible", "browser": node.browser(), "package": package.name}
        with serving(site) as url:
            settings = {**order, "url": url, "prompt": "import os", "maxNewTokens": 32}
            found = node.run_script("browser.mjs", settings)["found"]
    counts = Counter(one["impact"] for one in found)
    click.echo(", ".join(f"{counts[impact]} {impact}" for impact in IMPACTS))
    for one in found:
        click.echo(f"{one['where']}: {one['id']} ({one['impact']}): {one['html']}")
    if counts["critical"] or counts["serious"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
