"""What counts as a result, and what as a failure that the table says."""

import math
from collections.abc import Callable, Mapping

# A result that is further than this from float64 counts as failing (Anil et al. 2020 reject a root
# at the same error).
ACCEPTED = 0.1


def judged(
    errors: Mapping[str, object], accepted: float = ACCEPTED
) -> tuple[dict[str, float], dict[str, str]]:
    """The finite errors, and why each of the others, or one that is too large, is a failure."""
    found, failed = {}, {}
    for name, error in errors.items():
        if isinstance(error, str):
            failed[name] = error
            continue
        value = float(error)  # type: ignore[arg-type]
        if math.isfinite(value):
            found[name] = value
        if not value <= accepted:
            failed[name] = f"error {value:.2g}" if math.isfinite(value) else "NaN or Inf"
    return found, failed


def words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"


def errors_of(functions: dict[str, Callable], measure: Callable) -> dict[str, object]:
    """measure(function()) of each, or the words of what was raised."""
    found: dict[str, object] = {}
    for name, function in functions.items():
        try:
            found[name] = float(measure(function()))
        except Exception as error:
            found[name] = words(error)
    return found
