"""The registry's three doors, and what becomes of packages that are broken."""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import ValidationError

from postlude.manifest import component
from postlude.manifest.catalogue import catalogue
from postlude.manifest.component import BrokenExtension, Component, Config, Named, lookup, names, register
from postlude.manifest.load import load, restore
from postlude.manifest.problem import ManifestError


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages: write modules and ``*.dist-info`` into it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(component, "_registered", dict(component._registered))
    known = set(sys.modules)

    def found(kind: str):
        points = metadata.entry_points(group=f"postlude.{kind}")
        mine = [point for point in points if ((point.dist and point.dist.name) or "").startswith("probe-")]
        return component._by_name(mine)

    monkeypatch.setattr(component, "_entry_points", found)
    yield tmp_path
    for module in set(sys.modules) - known:
        if module.startswith("probe_"):
            del sys.modules[module]


def install(site: Path, package: str, points: str, **modules: str) -> None:
    for module, text in modules.items():
        (site / f"{module}.py").write_text(text)
    info = site / (package.replace("-", "_") + "-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    importlib.invalidate_caches()


SHOUT = """
from postlude.manifest.component import Component

class Shout(Component):
    '''Drops what is not loud. More follows.'''
    volume: int = 3
    '''How loud.'''
"""


@pytest.mark.capability("A user's own package brings components through entry points, checked as strictly as ours")
def test_an_entry_point_of_an_installed_package_brings_a_component(site, example):
    install(site, "probe-one", "[postlude.filters]\nshout = probe_one:Shout\n", probe_one=SHOUT)
    assert "shout" in names("filters")
    text = example.replace("{name: length, most: 30}", "{name: shout, volume: 7}")
    (_, loud) = load(text, "x.yaml").tree["data"]["chats"]["filters"]
    assert loud == {"name": "shout", "volume": 7}
    with pytest.raises(ManifestError, match=r"volum: unknown key\. Did you mean 'volume'\?"):
        load(text.replace("volume", "volum"), "x.yaml")


@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("Shout = 1 / 0", "ZeroDivisionError: division by zero (.*probe_one.py:1)"),
        ("Other = 1", "AttributeError"),
        ("class Shout: pass", "not a class derived from"),
        ("Shout = (", "SyntaxError"),
    ],
)
def test_a_broken_package_is_named_where_the_manifest_uses_it(site, example, module, what):
    install(site, "probe-one", "[postlude.filters]\nshout = probe_one:Shout\n", probe_one=module)
    text = example.replace("name: length, most: 30", "name: shout").replace("seed: 17", "sede: 17")
    with pytest.raises(ManifestError) as refused:
        load(text, "x.yaml")
    unknown, broken = map(str, refused.value.problems)
    assert "sede" in unknown
    assert "data.chats.filters.1.name: 'shout' of the filters cannot be loaded" in broken
    assert "the package 'probe-one' (entry point 'probe_one:Shout')" in broken
    with pytest.raises(BrokenExtension, match=what):
        lookup("filters", "shout")


def test_a_broken_package_that_is_not_used_does_no_harm(site, example):
    install(site, "probe-one", "[postlude.filters]\nshout = probe_one:Shout\n", probe_one="import no_such_library")
    load(example, "x.yaml")


def test_two_packages_with_one_name_are_both_named(site):
    install(site, "probe-one", "[postlude.filters]\nshout = probe_one:Shout\n", probe_one=SHOUT)
    install(site, "probe-two", "[postlude.filters]\nshout = probe_two:Shout\n", probe_two=SHOUT)
    with pytest.raises(BrokenExtension, match=r"'probe-(one|two)'.*'probe-(one|two)'"):
        lookup("filters", "shout")


PLUGIN = """
from postlude.manifest.component import Component, register

@register("filters", "whisper")
class Whisper(Component):
    volume: int = 1
"""


@pytest.mark.capability("A module named in plugins: registers components of the user's own")
def test_a_plugin_registers_before_the_manifest_is_checked(site, example):
    (site / "probe_plugin.py").write_text(PLUGIN)
    text = example.replace("name: length, most: 30", "name: whisper")
    with pytest.raises(ManifestError, match="'whisper' is not among the filters"):
        load(text, "x.yaml")
    resolved = load("plugins: [probe_plugin]\n" + text, "x.yaml")
    assert resolved.tree["data"]["chats"]["filters"][1] == {"name": "whisper", "volume": 1}
    assert load(text, "x.yaml", ["plugins=[probe_plugin]"]).tree == resolved.tree


def test_another_process_restores_a_manifest_with_its_plugins(site, example, monkeypatch):
    (site / "probe_plugin.py").write_text(PLUGIN)
    text = "plugins: [probe_plugin]\n" + example.replace("name: length, most: 30", "name: whisper")
    resolved = load(text, "x.yaml")
    before = {key: value for key, value in component._registered.items() if key[1] != "whisper"}
    monkeypatch.setattr(component, "_registered", before)
    del sys.modules["probe_plugin"]
    restored = restore(resolved.tree)
    assert restored.model_dump() == resolved.manifest.model_dump()


@pytest.mark.parametrize("module", ["1 / 0", "import no_such_library", "def f(:"])
def test_a_plugin_that_cannot_be_imported_is_told_with_its_place(site, example, module):
    (site / "probe_broken.py").write_text(module)
    with pytest.raises(ManifestError) as refused:
        load(example + "plugins:\n  - probe_broken\n", "x.yaml")
    (problem,) = refused.value.problems
    assert problem.key == "plugins.0"
    assert example.count("\n") + 2 == problem.origin.line
    assert "'probe_broken' cannot be imported" in problem.what


def test_a_name_is_registered_once():
    class One(Component):
        pass

    class Two(Component):
        pass

    register("filters", "once")(One)
    register("filters", "once")(One)
    with pytest.raises(ValueError, match="Two filters have the name 'once'"):
        register("filters", "once")(Two)
    with pytest.raises(ValueError, match="is registered as 'once' and as 'twice'"):
        register("filters", "twice")(One)
    with pytest.raises(ValueError, match="no kind of component 'filter'"):
        register("filter", "three")(Two)


def test_a_plugin_cannot_take_the_name_of_an_entry_point(site):
    install(site, "probe-one", "[postlude.filters]\nshout = probe_one:Shout\n", probe_one=SHOUT)

    class Shout(Component):
        pass

    with pytest.raises(ValueError, match="Two filters have the name 'shout'"):
        register("filters", "shout")(Shout)


def test_lookup_offers_the_nearest_name():
    with pytest.raises(KeyError, match=r"Did you mean 'length'\?"):
        lookup("filters", "lenght")


class Holder(Config):
    one: Annotated[Component, Named("filters")]
    other: Annotated[Component, Named("optimizers", default="adamw")] = None  # type: ignore[assignment]


def test_a_component_is_named_bare_or_in_a_mapping_and_written_back():
    holder = Holder.model_validate({"one": {"name": "length", "most": 3}, "other": {"lr": 2}})
    assert holder.model_dump() == {
        "one": {"name": "length", "most": 3},
        "other": {"name": "adamw", "lr": 2.0, "weight_decay": 0.0, "betas": [0.9, 0.999]},
    }
    assert Holder.model_validate(holder.model_dump()) == holder
    assert Holder.model_validate({"one": holder.one}).one is holder.one


@pytest.mark.parametrize("value", [None, 3, [], {"name": 3}, {"name": None}, {"most": 3}, "lenght", {"name": "length"}])
def test_what_names_no_component_is_refused(value):
    with pytest.raises(ValidationError):
        Holder.model_validate({"one": value})


def test_the_catalogue_lists_every_component_with_its_first_sentence(site):
    install(site, "probe-one", "[postlude.filters]\nshout = probe_one:Shout\n", probe_one=SHOUT)
    entries = {(entry.kind, entry.name): entry for entry in catalogue()}
    assert entries["filters", "shout"].summary == "Drops what is not loud"
    assert entries["filters", "shout"].package == "probe_one"
    assert entries["recipes", "pair"].summary == "Trains beside a reference"


def test_a_component_of_another_kind_is_told_what_to_derive_from():
    class Filtering(Component):
        """The base of a kind."""

    class Loud(Component):
        """Has the methods, perhaps, but not the base."""

    with pytest.raises(BrokenExtension, match=r"Loud cannot be used as a .*Filtering: derive it from .*Filtering\."):
        Filtering.of(Loud())
