"""The package: every public name is there, and no other."""

import pytest

import onestill


def test_the_package_says_what_it_has() -> None:
    for name in onestill.__all__:
        assert getattr(onestill, name) is not None
    for name in ("load_teacher", "distill", "sample", "evaluate"):
        assert callable(getattr(onestill, name))
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = onestill.train  # type: ignore[attr-defined]
