"""Files of a model on Hugging Face's hub, or of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from features.weights import WeightsError, first_line
from utils.process import MissingFileError

HF = "hf/"
CONFIG = "config.json"


def transformers_package(name: str) -> Any:
    """The package, for the network hf/<name>. Raises: WeightsError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise WeightsError(
            f"{HF}{name} needs the package transformers; run pip install -r requirements-hf.txt"
        ) from error
    return transformers


def read_json(path: Path) -> dict[str, Any]:
    """What a file of settings holds. Raises: WeightsError if it is damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path}: damaged ({first_line(error)}); download it again") from error


def hub_file(name: str, *files: str) -> Path | None:
    """The first of these files that a folder or a model of the hub has.

    Raises: WeightsError if the hub cannot be reached and the file is not on this machine.
    """
    if Path(name).is_dir():
        return next((path for file in files if (path := Path(name, file)).is_file()), None)
    if name.startswith(("/", ".")):
        raise MissingFileError(f"{name}: no such folder; name the one that holds a model's {CONFIG}")
    transformers_package(name)
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        # Once downloaded, it works without a network, and without waiting for one.
        for file in files:
            if isinstance(cached := try_to_load_from_cache(name, file), str):
                return Path(cached)
        for file in files:
            try:
                return Path(hf_hub_download(name, file))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
    # No network, no such model, one that asks for a licence, a full disk: the way out is the same.
    except Exception as error:
        raise WeightsError(
            f"{HF}{name} cannot be had ({first_line(error)}); download its folder elsewhere and name it as "
            "hf/<folder>, or use --encoder i3d, which works offline"
        ) from error
    return None
