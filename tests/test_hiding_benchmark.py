"""The table of docs/deidentify.md is that of the record, and the script counts right."""

import pytest

from faceadv import records
from faceadv.store.paths import PROJECT


@pytest.fixture(scope="module")
def hiding(script):
    return script("hiding")


def test_the_page_shows_the_record(hiding):
    shown = f"<!-- hiding -->\n{hiding.table(records.read(hiding.RECORD))}<!-- /hiding -->\n"
    assert shown in (PROJECT / "docs" / "deidentify.md").read_text(encoding="utf-8")


def test_a_face_is_hidden_from_both_only_if_it_is_from_each(hiding):
    rows = [
        {"name": name, "ssim": 0.9, "dlib": a, "mobilefacenet": b, "mobilenet-vggface2": c}
        for name, a, b, c in (("anna", 1.2, 1.0, 0.5), ("ben", 1.2, 0.9, 1.5), ("cleo", 0.2, 0.3, 0.4))
    ]
    found = {entry["name"]: entry["value"] for entry in hiding.measured({0.9: rows})}
    assert found[f"SSIM 0.9: hidden from {hiding.BOTH}"] == pytest.approx(100 / 3, abs=1e-3)
    assert found["SSIM 0.9: hidden from mobilenet-vggface2"] == pytest.approx(100 / 3, abs=1e-3)
    assert found["SSIM 0.9: dlib"] == pytest.approx(2.6 / 3, abs=1e-3)
