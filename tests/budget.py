"""How many random examples a property is tried on.

`make test` takes the profile `dev`, a fifth of them; `make test-all` and CI take `ci`, all.
"""

import os

from hypothesis import settings

settings.register_profile("ci", deadline=None)
settings.register_profile("dev", deadline=None)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
settings.load_profile(PROFILE)


def examples(all_of_them: int) -> int:
    """The number of examples for this run, at least three."""
    return all_of_them if PROFILE == "ci" else max(3, all_of_them // 5)
