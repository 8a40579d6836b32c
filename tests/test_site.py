"""The site builds from what is committed, without a network, a warning or a broken link (docs/build.py checks them)."""

import os
import re
import subprocess
import sys

from faceadv.store.paths import PROJECT


def test_the_site_builds_and_every_notebook_can_be_opened_elsewhere(tmp_path):
    built = subprocess.run(
        [sys.executable, str(PROJECT / "docs" / "build.py"), str(tmp_path)],
        env=os.environ | {"FACEADV_REPOSITORY": "https://github.com/somebody/faceadv"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    site = tmp_path / "site"
    for path in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        page = (site / "notebooks" / f"{path.stem}.html").read_text()
        assert f"https://colab.research.google.com/github/somebody/faceadv/blob/main/notebooks/{path.name}" in page
        assert f"https://mybinder.org/v2/gh/somebody/faceadv/main?urlpath=lab/tree/notebooks/{path.name}" in page
        assert f"jupyter lab notebooks/{path.name}" in re.sub("<[^>]+>", "", page)
    for path in site.rglob("*.html"):  # nothing is loaded from the network
        assert not re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=.https?://[^>]+>", path.read_text()), path.name
    assert "RECORDS = [{" in (site / "_static" / "records.js").read_text()
