"""The report page: names that hold HTML, what lies where, others' files."""

import json
import re
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from conftest import output_of
from test_evaluation import options
from utils.errors import InputError
from utils.report import Report

HOSTILE = "<img src=x onerror=alert(1)>.png"


def test_names_are_text_and_every_picture_is_there(tmp_path):
    page, generator = Report(tmp_path), np.random.default_rng(0)
    (tmp_path / "a:b").mkdir()
    for number, name in enumerate(("a.png", HOSTILE, "50% #1?.webp", "</script>{{data}}.png")):
        pictures = generator.random((3, 30, 40, 3), dtype=np.float32)
        path = tmp_path / "a:b" / name.replace("/", "")
        Image.fromarray((pictures[1] * 255).astype(np.uint8)).save(path)
        scores = {"psnr": 20.0}, {"psnr": float("inf") if number == 2 else 30.0 - number}
        page.add("a:b", name, path, pictures if number else (*pictures[:2], None), scores)
    text = page.write(HOSTILE, [[["set", "dB"], [HOSTILE, "9.5"]]], ["x < y & z"]).read_text("utf-8")
    assert HOSTILE not in text and text.count("<script") == text.count("</script>") == 2
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)        # no network
    entries = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
    assert [entry["name"] for entry in entries][1] == HOSTILE
    assert "clean" not in entries[0] and "clean" in entries[1] and entries[2]["scores"][1] == {"psnr": 999.0}
    for entry in entries:
        assert entry["size"] == [40, 30]
        for kind in {"restored", "input", "clean", "thumbnail"} & entry.keys():
            assert ":" not in entry[kind] and Image.open(tmp_path / unquote(entry[kind])).size == (40, 30)


@pytest.mark.parametrize("taken", ["index.html", "report/holiday.jpg"])
def test_files_of_the_user_stay(tmp_path, taken):
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("mine")
    with pytest.raises(InputError, match="^--report: .* is there"):
        Report(tmp_path, "--report")
    assert (tmp_path / taken).read_text() == "mine"


def test_test_sets(tmp_path, checkpoint):
    opt = options(tmp_path, checkpoint)
    for _ in range(2):                                      # the second over the first one's page
        assert "results/table/index.html" in output_of("test.py", "--opt", opt).splitlines()[-1]
    assert (tmp_path / "results/table/index.html").read_text("utf-8").count('"thumbnail"') == 3 + 2 + 3
