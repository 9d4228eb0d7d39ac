"""Errors of huggingface_hub as one line that names the option, the repository and a cure."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from dora_fx.app.errors import UserError
from dora_fx.app.options import HubName
from dora_fx.files import reason_of, shortened

Kind = Literal["model", "dataset"]
_LOG_IN = "hf auth login, or HF_TOKEN in the environment"


@contextmanager
def explaining(option: str, kind: Kind, name: HubName) -> Iterator[None]:
    """Convert errors of huggingface_hub in the block to UserError."""
    from huggingface_hub import errors

    where, called = f"{option} {name}", {"model": "model", "dataset": "data set"}[kind]
    prefix = "datasets/" if kind == "dataset" else ""
    page = f"{_endpoint()}/{prefix}{name.repository}"
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(
            f"{where}: the repository is gated, and this user has no access to it; ask for it on {page}, then log in "
            f"({_LOG_IN})"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"{where}: found no file or folder of that name here, and no {called} of that name on "
            f"{_endpoint()}; correct the name, or log in if the repository is private ({_LOG_IN})"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{where}: found no revision {name.revision or 'main'} of {name.repository}, expected a branch, a tag or a "
            f"whole commit hash; they are listed on {page}/tree/main"
        ) from error
    except Exception as error:
        raise UserError(_of_the_way(where, kind, name, error)) from error


def _of_the_way(where: str, kind: Kind, name: HubName, error: Exception) -> str:
    """Format an error of the disk, of the server or of the network."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500:
        said = shortened(error.server_message) if error.server_message else reason_of(error)
        answer = f"{error.response.status_code}, {said}"
        return f"{where}: {_endpoint()} refuses the request ({answer}); check the token ({_LOG_IN})"
    if isinstance(error, OSError) and error.errno is not None:
        return (
            f"{where}: the cache in {constants.HF_HUB_CACHE} cannot be written ({reason_of(error)}); name another "
            "folder in HF_HOME"
        )
    target = name.without_part
    return (
        f"{where}: found no file or folder of that name here, and not all of its files in the cache "
        f"{constants.HF_HUB_CACHE}; the hub cannot be reached ({_reason(error)}). Where there is a network, run: "
        f"{_command(kind, name)}; then copy that folder to {Path(target).absolute()} and start again"
    )


def _endpoint() -> str:
    """Return the address of the hub, without a password that a mirror's may have."""
    from huggingface_hub import constants

    return re.sub(r"//[^/@]*@", "//", constants.ENDPOINT)


def _reason(error: BaseException) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        variable = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
        return f"{variable} is set"
    return f"{_endpoint()}: {reason_of(error.__cause__ or error)}"


def _command(kind: Kind, name: HubName) -> str:
    parts = ["hf", "download", name.repository]
    parts += ["--repo-type", kind] if kind != "model" else []
    parts += ["--revision", name.revision] if name.revision is not None else []
    return shlex.join([*parts, "--local-dir", name.without_part])
