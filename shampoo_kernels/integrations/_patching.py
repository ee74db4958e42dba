"""Put functions into another package in place of its own, checked first and undone exactly."""

import functools
import importlib.metadata
import inspect
import pkgutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

_LOCK = threading.RLock()  # one for all peers: two of them may share an owner
_ABSENT = object()


class UnsupportedPeer(ImportError):
    """The peer is missing, of another version, or not as the integration expects it."""


@dataclass(frozen=True)
class Replacement:
    """`name` of `owner` becomes make(original), which is given the peer's own function.

    owner: a module or class, or its name as `pkgutil.resolve_name` takes it ("a.b" or "a.b:Class").
    A function that other modules import by name is replaced in each of them, by one Replacement a
    module. parameters: what `parameters_of` says of the original, None not to check.
    """

    owner: Any
    name: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    parameters: str | None = None

    def __str__(self) -> str:
        owner = self.owner if isinstance(self.owner, str) else self.owner.__name__
        return f"{owner}.{self.name}"


def parameters_of(function: Callable[..., Any]) -> str:
    """A function's parameters and defaults without annotations: "(grad, p, eps=1e-06)"."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


class Integration:
    """The replacements for one peer, in force for the whole process while anyone has them enabled.

    Args:
        peer: the name in error messages.
        replacements: applied together or not at all.
        distribution: what pip calls it, whose version is checked; None for one without metadata.
        versions: tested ones; "4.1" stands for every 4.1.x.
    """

    def __init__(
        self,
        peer: str,
        replacements: Sequence[Replacement],
        *,
        distribution: str | None = None,
        versions: Sequence[str] = (),
    ) -> None:
        self.peer = peer
        self.distribution = distribution
        self.versions = tuple(versions)
        self._replacements = tuple(replacements)
        self._users = 0
        self._undo: list[tuple[Any, str, object, object]] = []  # owner, name, old, new

    @property
    def enabled(self) -> bool:
        return self._users > 0

    def enable(self, *, any_version: bool = False) -> "Enabled":
        """Switch on at once; `disable()` of what is returned, or the end of its `with` block, takes
        it back. Calls may nest and come from several threads: the last one out restores.

        any_version: try a version that was not tested; what is replaced is checked all the same.

        Raises UnsupportedPeer, an ImportError, with nothing changed.
        """
        with _LOCK:
            if self._users == 0:
                if not any_version:
                    self.check_version()
                self._install()
            self._users += 1
        return Enabled(self)

    def check_version(self) -> None:
        """Raise UnsupportedPeer unless a tested version is installed."""
        if self.distribution is None:
            return
        tested = " or ".join(self.versions)
        try:
            found = importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            raise UnsupportedPeer(
                f"{self.peer}: {self.distribution} {tested} is needed, and none is installed"
            ) from None
        public = found.partition("+")[0]
        if not any(f"{public}.".startswith(f"{v}.") for v in self.versions):
            raise UnsupportedPeer(
                f"{self.peer}: tested with {self.distribution} {tested}, got {found} "
                "(any_version=True tries it)"
            )

    def _install(self) -> None:
        found = [(r, *self._original(r)) for r in self._replacements]  # all, before any changes
        try:
            for replacement, owner, old, original in found:
                new: Any = replacement.make(original)
                new = functools.update_wrapper(new, original, updated=())
                raw = inspect.getattr_static(owner, replacement.name)
                if isinstance(raw, (staticmethod, classmethod)):
                    new = type(raw)(new)
                setattr(owner, replacement.name, new)
                self._undo.append((owner, replacement.name, old, new))
        except BaseException:
            self._restore()
            raise

    def _original(self, replacement: Replacement) -> tuple[Any, object, Callable[..., Any]]:
        """(owner, what its own namespace holds under the name, the function behind that)."""
        where = replacement.owner
        try:
            owner = pkgutil.resolve_name(where) if isinstance(where, str) else where
            original: Any = inspect.getattr_static(owner, replacement.name)
        except (ImportError, SyntaxError, AttributeError) as error:
            raise UnsupportedPeer(f"{self.peer}: there is no {replacement} ({error})") from error
        old = vars(owner).get(replacement.name, _ABSENT)
        if isinstance(original, (staticmethod, classmethod)):
            original = original.__func__
        found = parameters_of(original)
        if replacement.parameters not in (None, found):
            raise UnsupportedPeer(
                f"{self.peer}: {replacement} must take {replacement.parameters}, it takes {found}"
            )
        return owner, old, original

    def _restore(self) -> None:
        for owner, name, _, new in self._undo:
            if vars(owner).get(name) is not new:
                raise RuntimeError(
                    f"{self.peer}: {owner.__name__}.{name} has been replaced once more since; "
                    "undo that first"
                )
        for owner, name, old, _ in reversed(self._undo):
            if old is _ABSENT:  # inherited
                delattr(owner, name)
            else:
                setattr(owner, name, old)
        self._undo.clear()

    def _leave(self) -> None:
        if self._users == 1:
            self._restore()
        self._users -= 1


class Enabled:
    """One use of an integration, until `disable()` or the end of the `with` block."""

    def __init__(self, integration: Integration) -> None:
        self._integration: Integration | None = integration

    def disable(self) -> None:
        """Take this use back; a second call does nothing."""
        with _LOCK:
            if self._integration is not None:
                self._integration._leave()
                self._integration = None

    def __enter__(self) -> "Enabled":
        if self._integration is None:
            raise RuntimeError("this integration has been disabled: call enable() again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self.disable()
