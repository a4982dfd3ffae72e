"""Loading a model that the selectors understand, or saying in one line why not."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from prhs_calibration import devices, fingerprint, memory
from prhs_calibration.files import one_line
from prhs_calibration.hub import ALIASES, EMBEDDED, Source, is_on_disk, locate, reference_folder
from prhs_kernels.errors import InputError, PrhsError, ResourceError, UsageError
from prhs_kernels.runtime import distributed
from prhs_kernels.runtime.attach import dense_params

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_HEADROOM = 1.1  # of the weights, for the tensor being copied and the first activations


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model in eval mode with its tokenizer, and what identifies both."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase  # pads on the left
    model_id: str  # hub id, name of the local folder, or of an embedded model
    revision: str  # commit hash, "local" or "embedded"
    fingerprint: dict[str, Any]  # see fingerprint.fingerprint_of
    weights_hash: str
    tokenizer_hash: str
    context_length: int  # tokens
    device: torch.device
    dtype: torch.dtype

    def prompt_length(self, asked: int | None) -> int:
        """Tokens of the longest prompt: what was asked for, else the context; see `check_length`."""
        return check_length(asked or self.context_length, self.context_length, self.model_id)


def check_length(asked: int, context_length: int, model_id: str) -> int:
    """`asked` tokens; UsageError beyond the context, of which no prompt says anything."""
    if asked > context_length:
        raise UsageError(
            f"context length {asked} is beyond the context of {model_id}, {context_length} tokens; "
            "give at most that"
        )
    return asked


@dataclasses.dataclass(frozen=True)
class KnownModel:
    """One line of `prhs models`."""

    alias: str
    model_id: str
    on_disk: bool


def load(
    name: str,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    ranks: int = 1,
) -> LoadedModel:
    """Load a model by alias, hub id, local folder or embedded name; under torchrun split over its `ranks`.

    `device`: None or "auto" takes CUDA when there is one; a CUDA device becomes the current one. `dtype`:
    None or "auto" is bf16 on CUDA, fp32 on the CPU. Safetensors only, no code of the repository is run,
    weights that do not cover the model are refused. Raises UsageError for a device or dtype that cannot be
    meant and for ranks that cannot share the KV heads, ResourceError when the device is absent or its memory
    too small (asked before anything large is downloaded or read), UnsupportedModelError for attention that is
    not ours, InputError for everything wrong with name, files or network.
    """
    target = devices.resolve_device(device) if ranks == 1 else devices.rank_device(device)
    if target.type == "cuda":
        torch.cuda.set_device(target)  # kernels and graphs go to the current device, not to their arguments'
    precision = devices.resolve_dtype(dtype, target)
    source = locate(name, revision)
    with _quiet():
        config = load_config(source)
        _check_ranks(config, source.model_id, ranks)
        _check_memory(config, source.model_id, target, precision, ranks)
    source.fetch_weights()  # shows the bars of the hub library
    with _quiet():
        # before the weights are read: these take milliseconds and find truncated files
        tokenizer_hash = fingerprint.hash_files(source.tokenizer_files())
        weights_hash = fingerprint.hash_weights(source.weight_files())
        tokenizer = _load_tokenizer(source)
        model = _load_weights(source, config, target, precision, ranks)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        model_id=source.model_id,
        revision=source.revision,
        fingerprint=fingerprint.fingerprint_of(config),
        weights_hash=weights_hash,
        tokenizer_hash=tokenizer_hash,
        context_length=int(config.max_position_embeddings),
        device=target,
        dtype=precision,
    )


def list_models() -> list[KnownModel]:
    """The embedded models and every alias, with whether it can be loaded without a network."""
    known = [KnownModel(name, name, (reference_folder(name) / "config.json").is_file()) for name in EMBEDDED]
    return known + [KnownModel(alias, model_id, is_on_disk(model_id)) for alias, model_id in ALIASES.items()]


def model_card(name: str) -> str:
    """Markdown text of an embedded model's card; InputError for any other name."""
    if name not in EMBEDDED:
        raise InputError(f"no card of {name!r}: only the embedded models have one ({', '.join(EMBEDDED)})")
    return (reference_folder(name) / "MODEL_CARD.md").read_text(encoding="utf-8")


def load_config(source: Source) -> PreTrainedConfig:
    """The model's config, its attention checked: UnsupportedModelError, or InputError when it is unusable."""
    import transformers

    # the type first: for unknown architectures transformers' message speaks of running the repository's code
    fingerprint.check_type(source.config().get("model_type"), source.model_id)
    try:
        config = transformers.AutoConfig.from_pretrained(
            source.folder, trust_remote_code=False, local_files_only=True
        )
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers)
        if min(*sizes, config.max_position_embeddings) < 1:
            raise ValueError(f"sizes must be positive, not {sizes}")
    except Exception as error:  # the validation errors of configs have no common base
        raise InputError(
            f"{source.folder / 'config.json'} is unusable: {one_line(error)}; download the model again"
        ) from error
    fingerprint.check_supported(config, source.model_id)
    return config


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of a model's parameters in `dtype`, tied ones counted once; allocates nothing."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _check_ranks(config: PreTrainedConfig, model_id: str, ranks: int) -> None:
    distributed.check_heads(dense_params(config).num_kv_heads, ranks, model_id)
    if ranks > 1 and importlib.util.find_spec("accelerate") is None:
        raise UsageError("splitting a model over ranks needs accelerate: pip install 'prhs[distributed]'")


def _check_memory(
    config: PreTrainedConfig, model_id: str, device: torch.device, dtype: torch.dtype, ranks: int
) -> None:
    needed = int(weight_bytes(config, dtype) * _HEADROOM)
    what = f"the weights of {model_id} in {str(dtype).removeprefix('torch.')}"
    if ranks > 1 and device.type == "cuda":
        memory.check_memory(needed // ranks, device, f"a rank's part of {what}")
        return
    # the weights pass through the host on their way to a GPU
    for place in dict.fromkeys((torch.device("cpu"), device)):
        memory.check_memory(needed, place, what)


def _load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    import transformers

    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(
            f"{source.model_id}: the tokenizer in {source.folder} cannot be loaded: {one_line(error)}; "
            "download or copy it again"
        ) from error
    # decoder-only models continue at the right end of a batch; Llama and Mistral come without a padding token
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_weights(
    source: Source, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, ranks: int
) -> PreTrainedModel:
    import transformers

    split: dict[str, Any] = {}
    if ranks > 1:
        from transformers.distributed.configuration_utils import DistributedConfig

        split = {"distributed_config": DistributedConfig(tp_size=ranks)}
    try:
        result: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **split,
        )
        model, info = result
        _check_complete(source, info)
        loaded: PreTrainedModel = model if split else model.to(device)
    except PrhsError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(
            f"out of memory while loading {source.model_id} on {device}; free some, or choose a smaller model"
        ) from error
    except Exception as error:  # safetensors, transformers and torch raise types of their own
        raise InputError(
            f"{source.model_id}: the weights in {source.folder} cannot be loaded: {one_line(error)}; "
            "download or copy them again"
        ) from error
    loaded.eval()
    return loaded


def _check_complete(source: Source, info: dict[str, Any]) -> None:
    """Refuse what transformers only warns of: missing weights, which it fills at random, and foreign ones."""
    # old Llama checkpoints carry a table of rotary frequencies that nothing reads any more
    unexpected = [key for key in info["unexpected_keys"] if ".layers." in key and "rotary_emb" not in key]
    for kind, keys in (
        ("missing", info["missing_keys"]),
        ("of another shape", info["mismatched_keys"]),
        ("unknown to this architecture", unexpected),
    ):
        if keys:
            first = sorted(str(key) for key in keys)[0]
            raise InputError(
                f"{source.model_id}: {len(keys)} weights in {source.folder} are {kind}, first {first}; "
                "the files do not belong to this config.json; download or copy the model again"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' own bars and advice while loading: progress is the caller's to show."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars_off = are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # those of the hub library as well
        if hub_bars_off:
            disable_progress_bars()
