"""Functions of a package replaced and given back: exactly, once, from any number of threads."""

import importlib.metadata
import subprocess
import sys
import threading
import types

import pytest

from shampoo_kernels.integrations._patching import (
    Integration,
    Replacement,
    UnsupportedPeer,
    parameters_of,
)


def double(x, factor=2):
    """Doc."""
    return factor * x


class Parent:
    def inherited(self, x):
        return x

    @staticmethod
    def static(x):
        return x

    @classmethod
    def of_class(cls, x):
        return cls, x


class Child(Parent):
    pass


@pytest.fixture
def peer(monkeypatch):
    module = types.ModuleType("a_peer")
    module.double, module.Parent, module.Child = double, Parent, Child
    monkeypatch.setitem(sys.modules, "a_peer", module)
    return module


def plus_one(original):
    return lambda *args: ("new", original(*args))


def replacement(name="double", owner="a_peer", parameters="(x, factor=2)", make=plus_one):
    return Replacement(owner, name, make, parameters)


def test_replaced_and_given_back(peer):
    integration = Integration("peer", [replacement()])
    with integration.enable():
        assert integration.enabled
        assert peer.double(3) == ("new", 6)
        assert peer.double.__doc__ == "Doc."
        assert parameters_of(peer.double) == "(x, factor=2)"
    assert peer.double is double
    assert not integration.enabled


@pytest.mark.parametrize(
    ("name", "owner", "parameters"),
    [
        ("inherited", Child, "(self, x)"),
        ("static", Parent, "(x)"),
        ("static", Child, "(x)"),
        ("of_class", Parent, "(cls, x)"),
    ],
)
def test_the_owner_is_left_as_it_was(name, owner, parameters):
    before = dict(vars(owner)), dict(vars(Parent))
    expected = getattr(owner(), name)(3)
    with Integration("peer", [replacement(name, owner, parameters)]).enable():
        assert getattr(owner(), name)(3) == ("new", expected)
    assert (dict(vars(owner)), dict(vars(Parent))) == before


def test_uses_nest_and_each_is_undone_once(peer):
    integration = Integration("peer", [replacement()])
    first, second = integration.enable(), integration.enable()
    new = peer.double
    assert new(3) == ("new", 6)  # once, not twice
    first.disable()
    first.disable()
    assert peer.double is new
    second.disable()
    assert peer.double is double
    with pytest.raises(RuntimeError, match="disabled"), first:
        pass


def test_an_error_in_the_block_gives_back(peer):
    with pytest.raises(ZeroDivisionError), Integration("peer", [replacement()]).enable():
        raise ZeroDivisionError
    assert peer.double is double


def test_threads(peer):
    made = []

    def make(original):
        made.append(original)
        return plus_one(original)

    integration = Integration("peer", [replacement(make=make)])
    ready, wrong = threading.Barrier(8), []

    def use():
        ready.wait()
        for _ in range(200):
            with integration.enable(), integration.enable():
                if peer.double(3) != ("new", 6):
                    wrong.append(1)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(made) == {double}  # never made from a replacement
    assert peer.double is double


def test_all_or_nothing(peer):
    def fail(original):
        raise ZeroDivisionError

    with pytest.raises(UnsupportedPeer, match=r"no a_peer\.gone"):
        Integration("peer", [replacement(), replacement("gone")]).enable()
    assert peer.double is double
    with pytest.raises(ZeroDivisionError):
        Integration("peer", [replacement(), replacement("static", Parent, "(x)", fail)]).enable()
    assert peer.double is double


def test_another_signature_is_refused(peer):
    with pytest.raises(UnsupportedPeer, match=r"must take \(x, factor=3\), it takes \(x, factor=2"):
        Integration("peer", [replacement(parameters="(x, factor=3)")]).enable()
    with pytest.raises(UnsupportedPeer, match="there is no no_peer"):
        Integration("peer", [replacement(owner="no_peer")]).enable()


def test_a_replacement_on_top_is_not_lost(peer):
    integration = Integration("peer", [replacement()])
    ours = integration.enable()
    between, peer.double = peer.double, len
    with pytest.raises(RuntimeError, match="undo that first"):
        ours.disable()
    assert peer.double is len
    peer.double = between
    ours.disable()
    assert peer.double is double


@pytest.mark.parametrize(
    ("versions", "found", "accepted"),
    [
        (("4.1.0",), "4.1.0", True),
        (("4.1.0",), "4.1.0+cpu", True),
        (("4.1",), "4.1.7", True),
        (("4.0", "4.1"), "4.1.7", True),
        (("4.1",), "4.10.0", False),
        (("4.1.0",), "4.1.1", False),
    ],
)
def test_versions(peer, monkeypatch, versions, found, accepted):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    integration = Integration("peer", [replacement()], distribution="a-peer", versions=versions)
    if accepted:
        integration.enable().disable()
        return
    with pytest.raises(UnsupportedPeer, match=f"tested with a-peer {versions[0]}, got {found}"):
        integration.enable()
    assert peer.double is double
    with integration.enable(any_version=True):
        assert peer.double(3) == ("new", 6)


def test_a_missing_peer_is_said(peer):
    name = "surely-no-such-distribution"
    with pytest.raises(UnsupportedPeer, match=f"{name} 1.0 is needed, and none is installed"):
        Integration("peer", [replacement()], distribution=name, versions=("1.0",)).enable()


def test_a_peer_for_another_python_is_said(tmp_path, monkeypatch):
    (tmp_path / "peer_of_the_future.py").write_text("def f[T:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnsupportedPeer, match=r"there is no peer_of_the_future\.double"):
        Integration("peer", [replacement(owner="peer_of_the_future")]).enable()


def test_importing_imports_no_peer():
    code = """
import pkgutil, sys
import shampoo_kernels
from shampoo_kernels import integrations
assert not any(m.startswith("shampoo_kernels.integrations.") for m in sys.modules)
for module in pkgutil.iter_modules(integrations.__path__, integrations.__name__ + "."):
    __import__(module.name)
peers = {"pytorch_optimizer", "heavyball", "torch_optimizer", "distributed_shampoo", "soap"}
assert not peers & set(sys.modules), peers & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
