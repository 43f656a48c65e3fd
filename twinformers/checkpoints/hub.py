"""Fetching a model from a hub: one set of weights and what travels with it, of one commit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from twinformers.checkpoints.base import ASSETS
from twinformers.checkpoints.folders import KINDS, MARKER, read_index
from twinformers.checkpoints.manifest import SUMS
from twinformers.errors import MissingDependency, SourceError, TwinformersError, first_line

log = logging.getLogger(__name__)

#: Seconds to wait for the hub's first answer.
TIMEOUT = 10
CONFIG = "config.json"
COMPANY = (CONFIG, MARKER, SUMS, *ASSETS)


def download(repo: str, revision: str | None) -> tuple[Path, str]:
    """The local folder of a repository's files, and the commit that they are of.

    The token is what the environment or `hf auth login` gives; huggingface_hub shows its progress where a
    terminal watches. Without a network, what was fetched before is used. Raises SourceError for whatever the
    hub does not deliver, MissingDependency without huggingface_hub.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise MissingDependency(
            "no such path, and hub ids need the package huggingface_hub",
            where=repo,
            hint="check the path, or: pip install 'twinformers[hub]'",
        ) from None
    try:
        try:
            info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)
        except HfHubHTTPError:
            raise
        except Exception as error:  # no network: its HTTP client's own types, and OSError
            log.info("%s: %s; using what was fetched before", repo, first_line(error))
            config = hf_hub_download(repo, CONFIG, revision=revision, local_files_only=True)
            return Path(config).parent, Path(config).parent.name

        def fetch(name: str) -> Path:
            return Path(hf_hub_download(repo, name, revision=info.sha))

        for name in wanted(repo, [file.rfilename for file in info.siblings or []], fetch):
            fetch(name)
        # Asked for by the revision's own name, it is found by that name without a network too.
        hf_hub_download(repo, CONFIG, revision=revision)
        return fetch(CONFIG).parent, str(info.sha)
    except TwinformersError:
        raise
    except Exception as error:
        raise SourceError(
            "no such path, and the hub could not deliver it",
            where=f"{repo}@{revision}" if revision else repo,
            found=first_line(error),
            hint="check the spelling, the network and the access token",
        ) from None


def wanted(repo: str, names: Iterable[str], fetch: Callable[[str], Path]) -> list[str]:
    """What to fetch of a repository: of its sets of weights, the one that would be read of a folder."""
    present = set(names)
    result = [name for name in COMPANY if name in present]
    for kind in KINDS if CONFIG in present else ():
        if kind.single in present:
            return [*result, kind.single]
        if kind.index in present:
            return [*result, kind.index, *dict.fromkeys(read_index(fetch(kind.index)).values())]
    raise SourceError(
        "the repository holds no weights that can be read",
        where=repo,
        expected=f"{CONFIG}, and {' or '.join(f'{k.single} or {k.index}' for k in KINDS)}",
        found=", ".join(sorted(present)[:10]) or "nothing",
    )
