"""`eval.*` and `hub.*`: benchmarks and publishing after training."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from dtfcli.settings.group import Count, Group, require


def _check_repo(repo: str) -> str:
    part = r"(?!.*(--|\.\.))[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?"
    is_id = not repo or (re.fullmatch(rf"{part}(/{part})?", repo, re.ASCII) and not repo.endswith(".git"))
    require(bool(is_id) and len(repo) <= 96, "repo", repo, "a Hub id is owner/name or a name, such as me/my-model")
    return repo


class EvalSettings(Group):
    """`eval.*`: benchmarks at the end of a run."""

    after: str = Field(
        "", description="Suites or lm-eval tasks to run on the final model, with commas, such as general; empty: none."
    )
    tasks: list[str] = Field(default_factory=list, description="More tasks to run with them.", examples=['["sciq"]'])
    limit: Count | None = Field(None, description="Score only the first N items of each task; unset: all.")
    data_dir: str = Field(
        "", description="Folder of datasets as OWNER/NAME/…, used instead of the Hub; empty: the Hub."
    )


class HubSettings(Group):
    """`hub.*`: where the finished model goes."""

    repo: Annotated[str, AfterValidator(_check_repo)] = Field(
        "", description="Push the final model to this repository, owner/name or a bare name; empty: nowhere."
    )
    private: bool = Field(False, description="Make that repository private when it is new.")
