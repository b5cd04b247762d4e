"""The promises of `kdkit.testing` for options with which a loss cannot keep all of them."""

from kdkit.testing import LOSS_CHECKS


def check_but(cls, *but, **options):
    """Every check but those of these names and those that the class excepts."""
    names = [check.__name__ for check in LOSS_CHECKS]
    assert set(but) <= set(names)
    for check in LOSS_CHECKS:
        if check.__name__ not in (*but, *cls.exceptions):
            check(cls, **options)
