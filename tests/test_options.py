"""Option files: what they accept, what they refuse and how they say so."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml

from models.baryir import BaryIR
from utils import options
from utils.errors import InputError
from utils.options import dump, load_options

REPOSITORY = Path(__file__).parent.parent
MINIMAL = {"name": "x", "steps": 10, "sources": [{"type": "denoise", "levels": [25]}]}


def load(tmp_path: Path, content: dict, *overrides: str) -> options.TrainOptions:
    path = tmp_path / "some.yml"
    path.write_text(yaml.safe_dump(content))
    return load_options(options.TrainOptions, str(path), list(overrides))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "options").glob("*.yml")), ids=lambda path: path.name)
def test_every_option_file_is_valid_and_opens_with_its_command(path):
    kind = options.TrainOptions if path.name.startswith("train") else options.TestOptions
    load_options(kind, str(path))
    text = path.read_text()
    script = "train.py" if kind is options.TrainOptions else "test.py"
    assert f"{script} --opt options/{path.name}" in text.splitlines()[0]
    assert "# Cost" in text or "Cost:" in text
    assert len(text.splitlines()) <= 60


def test_a_file_over_its_base(tmp_path):
    (tmp_path / "base.yml").write_text(yaml.safe_dump({**MINIMAL, "objective": {"gamma": 0, "tau": 1}}))
    loaded = load(tmp_path, {"base": "base.yml", "name": "y", "objective": {"tau": 2}}, "batch=7")
    assert (loaded.name, loaded.steps, loaded.batch) == ("y", 10, 7)
    assert (loaded.objective.gamma, loaded.objective.tau) == (0, 2)
    for base, message in (("some.yml", "some.yml: base: 'some.yml', expected the name of another file"),
                          ("none.yml", "some.yml: .*none.yml: no such file")):
        with pytest.raises(InputError, match=message):
            load(tmp_path, {"base": base})
    (tmp_path / "base.yml").write_text("base: some.yml")
    with pytest.raises(InputError, match="base.yml: base: 'some.yml', expected the name of another file"):
        load(tmp_path, {"base": "base.yml"})                    # a circle


def test_the_networks_options_are_its_arguments():
    arguments = {name: argument.default for name, argument in inspect.signature(BaryIR).parameters.items()}
    network = dataclasses.asdict(options.Network())
    as_given = {name: tuple(value) if isinstance(value, list) else value for name, value in network.items()}
    assert as_given == arguments


def test_options_that_a_scheme_does_not_use_are_named(tmp_path):
    for scheme, changes, unread in (
        ("joint", ["objective.gamma=0", "transport_learning_rate=1"], ["transport_learning_rate"]),
        ("separate", ["objective.gamma=0", "objective.w_rec=1", "map_steps=2"], ["w_rec"]),
        ("reconstruction", ["objective.gamma=0", "potentials.width=8", "map_steps=2", "clip=1"],
         ["map_steps", "gamma", "width"]),
    ):
        loaded = load(tmp_path, MINIMAL, f"scheme={scheme}", *changes)
        assert loaded.unread() == unread
        assert not load(tmp_path, MINIMAL, f"scheme={scheme}").unread()
        known = {**vars(loaded), **vars(loaded.objective), **vars(loaded.potentials)}
        assert options.UNREAD[scheme] <= known.keys()


def test_defaults_are_the_papers_values(tmp_path):
    loaded = load(tmp_path, MINIMAL)
    assert (loaded.objective.w_rec, loaded.objective.gamma, loaded.objective.tau) == (1e4, 0.05, 0.07)
    assert (loaded.optimizer, loaded.learning_rate, loaded.patch, loaded.batch) == ("rmsprop", 1e-4, 128, 3)
    assert loaded.network.width == 48 and loaded.potentials.congruence == "exact"


@pytest.mark.parametrize("change, message", [
    ({"learning_rte": 1}, "learning_rte: unknown option, did you mean learning_rate?"),
    ({"network": {"widht": 8}}, "network.widht: unknown option, did you mean width?"),
    ({"network": {"barycenter": False}},
     "scheme: joint with network.barycenter: false, expected reconstruction"),
    ({"batch": "three"}, "batch: 'three', expected a whole number"),
    ({"batch": 2.5}, "batch: 2.5, expected a whole number"),
    ({"batch": True}, "batch: True, expected a whole number"),
    ({"cache": 1}, "cache: 1, expected true or false"),
    ({"batch": 0}, "batch: 0, expected a number above 0"),
    ({"network": {"transport_blocks": 0}}, "transport_blocks: 0, expected a number above 0"),
    ({"optimizer": "adamx"}, "optimizer: 'adamx', expected one of rmsprop, adam, adamw, did you mean adam"),
    ({"sources": {"type": "denoise"}}, "sources: {'type': 'denoise'}, expected a list"),
    ({"sources": [{"type": "denoise", "levels": [25]}, {"type": "haze"}]},
     "sources[1].type: 'haze', expected one of denoise, derain"),
    ({"sources": [{"type": "denoise"}]}, "sources[0].levels: none given for degradation noise"),
    ({"sources": []}, "sources: empty"),
    ({"epochs": 3}, "steps: 10 with epochs: 3, expected exactly one"),
    ({"objective": {"lambdas": [1, "x"]}}, "objective.lambdas[1]: 'x', expected a number"),
    ({"progressive": [[10, 4, 64]]}, "all its stages to begin below steps"),
    ({"clip": -5.0}, "clip: -5.0, expected 0 or more"),
    ({"steps": -5}, "steps: -5, expected 0 or more"),
    ({"seed": -1}, "seed: -1, expected 0 or more"),
    ({"learning_rate": float("inf")}, "learning_rate: inf, expected a finite number"),
    ({"network": {"width": -2}}, "network.width: -2, expected a number above 0"),
    ({"network": {"heads": [0, 1, 1, 1]}}, "network.heads: [0, 1, 1, 1], expected numbers from 1 on"),
    ({"name": "../x"}, "name: '../x', expected a name that can be a folder"),
    ({"sources": [{"type": "denoise", "levels": [0]}]}, "sources[0].levels: [0.0], expected numbers above 0"),
    ({"sources": [{"type": "derain", "degraded": "rainy"}]},
     "sources[0].clean: none given beside the folder degraded"),
    ({"sources": [{"bundled": ["coffee.png"], "degradation": "noise", "levels": [25]}]},
     "sources: names [''], expected a different name for each"),
    ({"validation": {"sets": 2 * [{"name": "a", "degraded": "b", "clean": "c"}]}},
     "validation.sets: names ['a', 'a'], expected a different name"),
    ({"progressive": [[10, 4]]}, "progressive[0]: [10, 4], expected [from step, batch, patch]"),
])
def test_what_is_refused(tmp_path, change, message):
    with pytest.raises(InputError) as error:
        load(tmp_path, {**MINIMAL, **change})
    assert message in str(error.value) and str(error.value).startswith(str(tmp_path / "some.yml"))
    assert "\n" not in str(error.value)


def test_missing_keys_files_and_broken_yaml(tmp_path):
    with pytest.raises(InputError, match="some.yml: name: missing"):
        load(tmp_path, {"steps": 10, "sources": []})
    with pytest.raises(InputError, match="nowhere.yml: no such file"):
        load_options(options.TrainOptions, "nowhere.yml")
    (tmp_path / "broken.yml").write_text("a: [1,\nb: }")
    with pytest.raises(InputError, match="broken.yml: not valid YAML"):
        load_options(options.TrainOptions, str(tmp_path / "broken.yml"))


def test_numbers_that_yaml_reads_as_text(tmp_path):
    path = tmp_path / "some.yml"
    path.write_text("name: x\nsteps: 10\nlearning_rate: 2e-4\nclip: 1\n"
                    "sources: [{type: denoise, levels: [25]}]\n")
    loaded = load_options(options.TrainOptions, str(path))
    assert loaded.learning_rate == 2e-4 and loaded.clip == 1.0 and isinstance(loaded.clip, float)


def test_overrides(tmp_path):
    loaded = load(tmp_path, MINIMAL, "learning_rate=1e-3", "network.width=16", "sources.0.repeat=4",
                  "sources[0].clean=a/b", "root=/data")
    assert (loaded.learning_rate, loaded.network.width, loaded.sources[0].repeat) == (1e-3, 16, 4)
    assert (loaded.sources[0].clean, loaded.root) == ("a/b", "/data")
    for wrong, message in (("width", "expected key=value"),
                           ("netwrok.width=3", "netwrok: unknown option, did you mean network"),
                           ("sources.3.repeat=1", "no entry 3"), ("name.x=1", "has no options of its own")):
        with pytest.raises(InputError, match=message):
            load(tmp_path, MINIMAL, wrong)


def test_a_key_that_is_given_twice(tmp_path):
    for text in ("name: a\nsteps: 1\nname: b\nsources: []",
                 "name: a\nsteps: 1\nsources: [{type: derain, type: dehaze}]"):
        (tmp_path / "twice.yml").write_text(text)
        with pytest.raises(InputError, match="twice.yml: not valid YAML: (name|type) is given twice"):
            load_options(options.TrainOptions, str(tmp_path / "twice.yml"))


def test_dumped_options_load_to_the_same(tmp_path):
    loaded = load(tmp_path, MINIMAL)
    (tmp_path / "some.yml").write_text(dump(loaded))
    assert load_options(options.TrainOptions, str(tmp_path / "some.yml")) == loaded


def test_shipped_weights_are_found_from_any_folder(tmp_path, monkeypatch):
    """REVIEW 9."""
    monkeypatch.chdir(tmp_path)
    loaded = load_options(options.TestOptions, str(REPOSITORY / "options/test_real.yml"))
    assert Path(loaded.checkpoint).is_file()
