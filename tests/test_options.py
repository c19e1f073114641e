"""Option files: what they accept, what they refuse and how they say so."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml

from conftest import REPOSITORY
from models.baryir import BaryIR
from utils import options
from utils.errors import InputError
from utils.options import dump, load_options, read_file

NOISE = {"name": "noise", "clean": "clean", "degradation": "noise", "levels": [25]}
MINIMAL = {"name": "x", "steps": 10, "sources": [NOISE]}


def load(tmp_path: Path, content: dict | str | bytes, *overrides: str) -> options.TrainOptions:
    path = tmp_path / "some.yml"
    text = yaml.safe_dump(content) if isinstance(content, dict) else content
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_options(options.TrainOptions, str(path), list(overrides))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "options").rglob("*.yml")), ids=lambda path: path.name)
def test_every_option_file_is_valid_and_opens_with_its_command(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    kind = options.TrainOptions if "sources" in read_file(str(path)) else options.TestOptions
    assert load_options(kind, str(path)).file == str(path)
    text, script = path.read_text(), "train.py" if kind is options.TrainOptions else "test.py"
    if path.name == "test_real.yml":
        assert Path(load_options(kind, str(path)).checkpoint).is_file()         # wherever one stands
    if path.parent.name == "options":
        assert f"{script} --opt options/{path.name}" in text.splitlines()[0] and "Cost:" in text
    assert len(text.splitlines()) <= 70


def test_defaults_are_the_papers_and_the_networks_arguments(tmp_path):
    kinds = [kind for kind in vars(options).values() if dataclasses.is_dataclass(kind)]
    assert len(kinds) == 9 and sum(len(inspect.get_annotations(kind)) for kind in kinds) <= 80
    loaded = load(tmp_path, MINIMAL)
    assert (loaded.objective.w_rec, loaded.objective.gamma, loaded.network.width) == (1e4, 0.05, 48)
    assert (loaded.optimizer, loaded.learning_rate, loaded.patch, loaded.batch) == ("rmsprop", 1e-4, 128, 3)
    arguments = inspect.signature(BaryIR).parameters
    for name, value in dataclasses.asdict(loaded.network).items():
        assert arguments[name].default == (tuple(value) if isinstance(value, list) else value)


def test_a_file_over_its_base(tmp_path):
    (tmp_path / "other").mkdir()
    for base in (tmp_path / "base.yml", tmp_path / "other/some.yml"):           # one of the file's own name
        base.write_text(yaml.safe_dump({**MINIMAL, "objective": {"gamma": 0, "w_rec": 1}}), "utf-16")
        for name in (str(base), str(base.relative_to(tmp_path))):
            loaded = load(tmp_path, {"base": name, "name": "y", "objective": {"w_rec": 2}}, "batch=7")
            assert (loaded.name, loaded.steps, loaded.batch) == ("y", 10, 7)
            assert (loaded.objective.gamma, loaded.objective.w_rec) == (0, 2)
    (tmp_path / "circle.yml").write_text("base: other/../some.yml")
    for base, message in (("./some.yml", "some.yml: base: ./some.yml, expected the name of another file"),
                          ("circle.yml", "circle.yml: base: other/../some.yml, expected the name of an"),
                          ("none.yml", "some.yml: .*none.yml: no such file")):
        with pytest.raises(InputError, match=message):
            load(tmp_path, {"base": base})


def test_numbers_and_text_are_told_apart_by_the_option(tmp_path):
    text = yaml.safe_dump(MINIMAL) + "root: 2024-11-29\nlearning_rate: 2e-4\nclip: 1\nema: .5\noutput: no"
    loaded = load(tmp_path, text)
    assert (loaded.learning_rate, loaded.ema, loaded.root, loaded.output) == (2e-4, 0.5, "2024-11-29", "no")
    assert loaded.clip == 1 and isinstance(loaded.clip, float)
    loaded = load(tmp_path, MINIMAL, "learning_rate=1e-3", "network.width=16", "sources.0.repeat=4",
                  "sources[0].levels=[15, 25]", "cache=true", "schedule=constant", "precision=")
    assert (loaded.learning_rate, loaded.network.width, loaded.sources[0].repeat) == (1e-3, 16, 4)
    assert (loaded.sources[0].levels, loaded.cache) == ([15, 25], True)
    assert (loaded.schedule, loaded.precision) == ("constant", "")
    for text in ("/data/set #2", "no", "010", "2024-11-29", "a: b", "'a'", "~", " a "):             # as it is
        loaded = load(tmp_path, MINIMAL, f"sources.0.degraded={text}", "name=1e3")
        assert loaded.sources[0].degraded == text and load(tmp_path, dump(loaded)) == loaded


def source(**changes) -> dict:
    return {"sources": [{**NOISE, **changes}]}


def validation(**entry) -> dict:
    return {"validation": {"sets": [{"name": "a", **entry}]}}


@pytest.mark.parametrize("content, message", [
    # What YAML reads otherwise than people do.
    ("a: [1,\nb: }", "not valid YAML"), ("- 1", "['1'], expected keys and values"),
    ("steps: 10\nsources: []", "name: missing"), ("name: [a]\nsources: []", "name: ['a'], expected text"),
    ("name: a\nsources: [{name: a, name: b}]", "not valid YAML: a key is given twice"),
    ("name: a\nepochs: 1:30.5\nsources: []", "epochs: '1:30.5', expected a number"),
    ("name: Gr\u00fc\u00df".encode("cp1252"), "not valid YAML in UTF-8 or UTF-16: "),
    # Overrides.
    (["width"], "--set width: expected key=value"), (["sources.3.repeat=1"], "no such entry"),
    (["netwrok.width=3"], "netwrok: unknown option, did you mean network"), (["name.x=1"], "no such entry"),
    (["seed=08"], "seed: '08', expected a whole number"),
    # Names, types and ranges.
    ({"network": {"widht": 8}}, "network.widht: unknown option, did you mean width?"),
    ({"batch": True}, "batch: 'true', expected a whole number"), ({"batch": 0}, "batch: '0', expected a n"),
    ({"cache": 1}, "cache: '1', expected true or fal"), ({"name": "../x"}, "name: '../x', expected a name"),
    ({"learning_rate": float("inf")}, "learning_rate: '.inf', expected a number"),
    ({"network": {"heads": [0, 1, 1, 1]}}, "network.heads[0]: '0', expected a number above 0"),
    ({"schedule": "cosin"}, "schedule: 'cosin', expected one of cosine, constant, did you mean cosine?"),
    ({"objective": {"lambdas": [1, "x"]}}, "objective.lambdas[1]: 'x', expected a number"),
    ({"progressive": [[10, 4]]}, "progressive[0]: ['10', '4'], expected [from step, batch, patch]"),
    # What does not go together.
    ({"sources": NOISE}, ", expected a list"), ({"epochs": 3}, "steps: 10 with epochs: 3, expected"),
    ({"progressive": [[10, 4, 64]]}, "all its stages to begin below steps"),
    ({"balanced": True, "sources": [NOISE, {**NOISE, "name": "b"}]}, "balanced: batches of [3], exp"),
    ({"map_steps": 2}, "map_steps: 2 with scheme j"), ({"network": {"barycenter": False}}, "joint with netw"),
    ({"validation": {"sets": 2 * [{"name": "a", "degraded": "b"}]}}, ", expected a different name for"),
    (source(levels=[]), "[0].levels: none given for degradation"), (source(offset=[1, 1]), ".offset: unkn"),
    (source(levels=[], range=[50, 5]), "sources[0].range: ['50', '5'], expected [low, high], from 0"),
    (source(range=[5, 50]), ".range: given beside levels"), (source(degradation=""), ".degradation: none"),
    (source(degradation="camera", degraded="in"), "sources[0].degradation: camera on top"),
    (source(layers="rain"), "layers: given without degradation rain"),
    (source(airlight=[0, 1]), "airlight: given without degradation haze"),
    (source(degradation="haze", airlight=[]), "sources[0].airlight: [], expected [low, high], from 0 to 1"),
    (source(degradation="jpeg", levels=[0.5]), "levels: [0.5], expected qualities of JPEG from 1 to 100"),
    (source(bundled=["a.png"]), "bundled: given beside"),
    (source(clean="", degraded="in"), "sources[0].clean: expected the folders degraded and clean, or"),
    (validation(clean="gt"), "validation.sets[0].degraded: expected a folder degraded, a"),
    (validation(degraded="in", degradation="noise", levels=[15, 25]), "sets[0].levels: 2 levels, expected"),
])
def test_what_is_refused(tmp_path, content, message):
    with pytest.raises(InputError) as error:
        if isinstance(content, list):
            load(tmp_path, MINIMAL, *content)
        else:
            load(tmp_path, {**MINIMAL, **content} if isinstance(content, dict) else content)
    assert message in str(error.value) and str(error.value).startswith(str(tmp_path / "some.yml"))
    assert "\n" not in str(error.value)
