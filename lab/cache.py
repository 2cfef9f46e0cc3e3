"""The folder where the kit keeps what it can make or fetch again."""

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """The folder that holds converted models, fetched data and unfinished runs: `LAB_CACHE`, or the user's cache."""
    return Path(os.environ["LAB_CACHE"]) if os.environ.get("LAB_CACHE") else user_cache_path("depth-lab")
