"""Curves of a run: each scheme has its panels, a run in progress is drawn."""

import pytest
from PIL import Image

from benchmarks.plot_training import draw, panels
from utils.errors import InputError
from utils.runs import TERMS, VALIDATION

SOURCES = ("noise", "rain")
ALTERNATING = ["Restoration loss", "Validation", "Dual", "Map's side", "Potentials' side",
               "Cost of each source", "Potential of each source"]


def write_run(folder, scheme, validated):
    """Tables as train.py fills them in each scheme; the last line is half written."""
    folder.mkdir()
    of_sources = [f"{kind}_{name}" for name in SOURCES
                  for kind in ("cost", "potential_mean", "potential_spread")]
    columns = ["step", "seconds", "learning_rate", *TERMS, *of_sources, "skipped"]
    missing = {"joint": {"transport_gradient_norm"}, "separate": {"map_loss"},
               "reconstruction": {*columns[4:-1]} - {"reconstruction", "gradient_norm"}}[scheme]
    lines = [["nan" if column in missing else str(step) for column in columns]
             for step in range(50, 250, 50)]
    text = "\n".join(map(",".join, [columns, *lines])) + "\n" + ",".join(lines[-1][:4])
    (folder / "losses.csv").write_text(text)
    rows = [["100", name, "2", "20.5", "0.5", "22.0", "0.6"] for name in ("bsd", "average")] * validated
    (folder / "validation.csv").write_text("".join(",".join(row) + "\n" for row in [VALIDATION, *rows]))
    return folder


@pytest.mark.parametrize("scheme, validated, expected", [
    ("joint", True, ALTERNATING),
    ("separate", False, [title for title in ALTERNATING if title != "Validation"]),
    ("reconstruction", True, ["Restoration loss", "Validation"])])
def test_panels_of_a_scheme(tmp_path, scheme, validated, expected):
    shown = panels(write_run(tmp_path / "run", scheme, validated))
    assert [panel[0] for panel in shown] == expected
    assert shown[0][3] == {"": ([50, 100, 150, 200], [50, 100, 150, 200])}
    if validated:
        assert shown[1][3] == {"bsd": ([100], [1.5]), "average": ([100], [1.5])}
    pytest.importorskip("matplotlib")
    draw(shown, tmp_path / "new/curves.png")
    with Image.open(tmp_path / "new/curves.png") as picture:
        assert min(picture.size) > 300


def test_a_folder_without_steps(tmp_path):
    with pytest.raises(InputError, match="losses.csv: no steps"):
        panels(tmp_path)
