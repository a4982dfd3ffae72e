"""From a model's name to a folder with its files: aliases, hub ids, local folders, the embedded model."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import json
import pathlib
import re
from typing import Any

from prhs_calibration import files
from prhs_kernels.errors import InputError, PrhsError, ResourceError, UsageError

REFERENCE = "reference"  # small and quick on a CPU, context 2,048: the default everywhere
EMBEDDED = {REFERENCE: "weights", "reference-8k": "weights-8k"}  # name -> folder in the package
ALIASES = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
}
_TIMEOUT = 5.0  # seconds; a hub that does not answer must not hold up a model that is on disk
_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
]
# not *.safetensors: some repositories hold the same weights twice, the other copy under another name
_WEIGHT_FILES = ["model*.safetensors"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model's files are; those of a hub model may still lack the weights until `fetch_weights`."""

    folder: pathlib.Path
    model_id: str  # hub id, name of the local folder, or of an embedded model
    revision: str  # commit hash on the hub, "local" or "embedded"
    online: bool = False  # the hub answered: what is missing can be downloaded

    def config(self) -> dict[str, Any]:
        """The parsed `config.json`; InputError when it is missing or not a JSON object."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(
                f"{self.model_id}: no config.json in {self.folder}; give a transformers model"
            ) from error
        except OSError as error:
            raise InputError(f"cannot read {path}: {files.reason(error)}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON; download or copy the model again") from error
        if not isinstance(config, dict):
            raise InputError(f"{path} is not a transformers config; download or copy the model again")
        return config

    def weight_files(self) -> list[pathlib.Path]:
        """The safetensors files of the model; InputError naming what is missing."""
        index = self.folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                raise InputError(f"{index} is damaged; download or copy the model again") from error
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing and any(self.folder.glob("*.bin")):
            raise InputError(
                f"{self.model_id} has pickled weights only, which are not opened; convert them to safetensors"
            )
        if missing:
            raise InputError(
                f"{self.model_id}: weights {missing[0]} are missing in {self.folder}; complete the model"
            )
        return [self.folder / name for name in names]

    def tokenizer_files(self) -> list[pathlib.Path]:
        """The files that define the tokenizer; InputError when there are none."""
        paths = [self.folder / name for name in _TOKENIZER_FILES if (self.folder / name).is_file()]
        if not paths:
            raise InputError(
                f"{self.model_id}: no tokenizer in {self.folder}; add the model's own tokenizer.json"
            )
        return paths

    def fetch_weights(self) -> None:
        """Download the weights of a hub model unless they are on disk. Errors as `locate`."""
        # never asked again when it did not answer: the hub library would retry for half a minute
        if self.online:
            _download(self.model_id, self.revision, _WEIGHT_FILES, online=True)


def locate(name: str, revision: str | None = None) -> Source:
    """Find a model by alias, hub id, folder or embedded name; for hub models fetch all but the weights.

    An alias wins over a folder of the same name (write `./name` for the folder). The hub is asked once, with
    a timeout of 5 s, and what is on disk is used when it does not answer. Raises InputError of one line for
    unknown names, gated models, missing files, no network; UsageError for a revision of a folder.
    """
    if name in EMBEDDED or _is_folder(name):
        if revision is not None:
            raise UsageError(f"revision {revision!r} needs a hub model; {name} is a folder")
        return _local(name)
    model_id = ALIASES.get(name, name)
    if not _HUB_ID.fullmatch(model_id):
        raise InputError(f"unknown model {name!r}: {_suggestion(name)}")
    commit = None if _is_offline() else _resolve(model_id, revision)
    folder = _download(model_id, commit or revision, _SMALL_FILES, online=commit is not None)
    return Source(folder, model_id, commit or folder.name, online=commit is not None)


def is_on_disk(model_id: str) -> bool:
    """Whether a hub model's config and weights are in the local cache; asks nobody."""
    import huggingface_hub

    config = huggingface_hub.try_to_load_from_cache(model_id, "config.json")
    if not isinstance(config, str):
        return False
    try:
        Source(pathlib.Path(config).parent, model_id, "").weight_files()
    except InputError:
        return False
    return True


def reference_folder(name: str = REFERENCE) -> pathlib.Path:
    """Where an embedded model lies in this installation."""
    return pathlib.Path(__file__).parent / "reference_model" / EMBEDDED[name]


def _is_folder(name: str) -> bool:
    if name in ALIASES:
        return False
    return name.startswith((".", "/", "~")) or (name != "" and pathlib.Path(name).is_dir())


def _local(name: str) -> Source:
    if name in EMBEDDED:
        folder = reference_folder(name)
        if not (folder / "config.json").is_file():
            raise InputError(f"the embedded model is missing from {folder.parent}; install prhs again")
        return Source(folder, name, "embedded")
    folder = pathlib.Path(name).expanduser()
    if not folder.is_dir():
        raise InputError(f"no model folder {name}: give a folder with config.json and safetensors weights")
    return Source(folder, folder.resolve().name, "local")


def _suggestion(name: str) -> str:
    lowered = {known.lower(): known for known in (*EMBEDDED, *ALIASES, *ALIASES.values())}
    close = [lowered[key] for key in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)]
    known = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{known}Give an alias (`prhs models` lists them), a hub id such as org/name, or a folder"


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _resolve(model_id: str, revision: str | None) -> str | None:
    """Commit hash of a revision, or None when the hub cannot be reached."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().model_info(model_id, revision=revision, timeout=_TIMEOUT).sha
    except Exception as error:  # the HTTP library's own types differ between hub versions
        translated = _hub_error(error, model_id, revision)
        if translated is None:
            return None
        raise translated from error


def _download(model_id: str, revision: str | None, patterns: list[str], online: bool) -> pathlib.Path:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            model_id,
            revision=revision,
            allow_patterns=patterns,
            etag_timeout=_TIMEOUT,
            local_files_only=not online,
        )
    except Exception as error:
        translated = _hub_error(error, model_id, revision)
        if translated is None:
            why = "HF_HUB_OFFLINE is set" if _is_offline() else "the hub cannot be reached"
            at = f" at revision {revision}" if revision else ""
            translated = InputError(
                f"{model_id}{at} is no folder here and not completely on disk as a hub model, and {why}; "
                "check the path, connect, or choose a model that is on disk (`prhs models`)"
            )
        raise translated from error
    return pathlib.Path(folder)


def _hub_error(error: Exception, model_id: str, revision: str | None) -> PrhsError | None:
    """One line for what the hub answered; None when it did not answer; programming errors pass through."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{model_id} has no revision {revision!r}; see its page on the hub")
    # a gated repository is reported by a subclass of "not found", and an unknown one as 401 without a login
    if isinstance(error, errors.GatedRepoError) or (
        status in (401, 403) and not isinstance(error, errors.RepositoryNotFoundError)
    ):
        return InputError(
            f"{model_id} is gated: accept its licence at https://huggingface.co/{model_id} and log in with "
            "`hf auth login` or HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(f"{model_id} is not on the hub, or private: {_suggestion(model_id)}")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{model_id} is not a valid hub id: {_suggestion(model_id)}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"no space left on disk to download {model_id}; free some or move HF_HOME")
    if isinstance(error, PermissionError):
        return InputError(f"cannot write {error.filename}: {files.reason(error)}; set HF_HOME to your folder")
    silent = (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    if isinstance(error, silent) or type(error).__module__.partition(".")[0] in _HTTP_LIBRARIES:
        return None
    raise error
