"""Live training objects: taking their state, and putting it back bit for bit.

Whatever has ``state_dict`` and ``load_state_dict`` takes part (models, optimizers, schedulers, scalers, averaged
models, stateful loaders); everything else must be a plain state tree. Parameters and buffers that share storage with
the live module are filled in place; what a ``state_dict`` merely copied goes through ``load_state_dict``, as its owner
expects.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from ciuic_async.errors import CiuicError, TargetMismatchError, UsageError

WRAPPER_SEGMENTS = ("_orig_mod", "module")
"""What torch.compile and DDP or AveragedModel put into parameter names."""


def is_stateful(value: object) -> bool:
    """Whether a value takes part through ``state_dict`` and ``load_state_dict``."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def capture_objects(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state tree of every object by name. Plain trees pass as they are: the caller flattens them at once."""
    result = {}
    for name, value in state.items():
        try:
            result[name] = value.state_dict() if is_stateful(value) else value
        except CiuicError:
            raise
        except Exception as error:
            raise UsageError(
                f"{name}: state_dict() of {type(value).__qualname__} failed: {error}", where=name
            ) from error
    return result


def trainable_storages(state: Mapping[str, Any]) -> frozenset[int]:
    """Addresses of the storages of parameters that require gradients: a state_dict no longer tells.

    Written for 20,000 parameters: ``module.parameters()`` would take longer than all else here.
    """
    modules = (module for value in state.values() if isinstance(value, torch.nn.Module) for module in value.modules())
    parameters = chain.from_iterable(module._parameters.values() for module in modules)
    trained = [parameter for parameter in parameters if parameter is not None and parameter.requires_grad]
    usable = [
        parameter
        for parameter in trained
        if (parameter.layout is torch.strided if type(parameter) in _ORDINARY else not unmaterialized(parameter))
    ]
    return frozenset(map(torch.UntypedStorage.data_ptr, map(torch.Tensor.untyped_storage, usable)))


_ORDINARY = frozenset({torch.Tensor, torch.nn.Parameter})


def storages_of_others(state: Mapping[str, Any], tensors: Collection[int]) -> frozenset[int]:
    """Addresses of storages that hold parameters or buffers of modules other than ``tensors`` (by ``id``).

    Forward may change a buffer without any trace: what shares memory with one must not be copied later.
    """
    return frozenset(
        tensor.untyped_storage().data_ptr()
        for value in state.values()
        if isinstance(value, torch.nn.Module)
        for tensor in (*value.parameters(), *value.buffers())
        if id(tensor) not in tensors and not unmaterialized(tensor)
    )


def unmaterialized(parameter: torch.Tensor) -> bool:
    """Whether a parameter has no memory of the ordinary kind: a lazy module's before its first use, or a sparse one."""
    return (
        isinstance(parameter, torch.nn.UninitializedParameter | torch.nn.UninitializedBuffer)
        or parameter.layout != torch.strided
    )


# --- random numbers -------------------------------------------------------------------------------------------------


def cuda_in_use() -> bool:
    """Whether this process has begun to use CUDA; asking must not make it begin."""
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def capture_rng() -> dict[str, Any]:
    """States of the generators of python, numpy (its global one) and torch (CPU and every CUDA device in use)."""
    rng: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if cuda_in_use():
        rng["cuda"] = torch.cuda.get_rng_state_all()
    return rng


def restore_rng(rng: Mapping[str, Any]) -> list[str]:
    """Put generator states back; what could not be put back is returned as text."""
    problems = []
    random.setstate(rng["python"])
    np.random.set_state(rng["numpy"])
    torch.set_rng_state(rng["torch"])
    saved = rng.get("cuda", [])
    here = torch.cuda.device_count() if saved and torch.cuda.is_available() else 0
    for number, value in enumerate(saved[:here]):
        torch.cuda.set_rng_state(value, number)
    if len(saved) > here:
        problems.append(f"random number states of {len(saved)} CUDA devices were saved, {here} could be restored")
    return problems


# --- models: in place -----------------------------------------------------------------------------------------------


def live_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """Tensors of a module's state_dict that *are* its parameters and buffers, by name.

    None when the module makes its state_dict in its own way: then nothing is known of the names.
    """
    if type(module).state_dict is not torch.nn.Module.state_dict:
        return None
    owned = {
        tensor.untyped_storage().data_ptr()
        for tensor in [*module.parameters(), *module.buffers()]
        if not unmaterialized(tensor) and tensor.numel()
    }
    return {
        name: tensor.detach()
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, torch.Tensor)
        and not unmaterialized(tensor)
        and tensor.untyped_storage().data_ptr() in owned
    }


def match_names(saved: list[str], live: list[str]) -> dict[str, str]:
    """Pair saved names with live ones, across ``_orig_mod.`` and ``module.`` wrappers. Unpaired names are left out."""
    here = set(live)
    exact = {name: name for name in saved if name in here}
    by_plain: dict[str, list[str]] = {}
    for name in live:
        if name not in exact:
            by_plain.setdefault(plain_name(name), []).append(name)
    for name in saved:
        if name not in exact:
            candidates = by_plain.get(plain_name(name), [])
            if len(candidates) == 1:
                exact[name] = candidates.pop()
    return exact


def plain_name(name: str) -> str:
    """A name without the segments that wrappers add."""
    parts = name.split(".")
    return ".".join(part for part in parts if part not in WRAPPER_SEGMENTS) or name


def renamed(saved: Any, names: Mapping[str, str]) -> Any:
    """A saved state_dict under the live names; ``_metadata`` (module versions) follows."""
    if all(old == new for old, new in names.items()):
        return saved
    result = type(saved)((names.get(key, key), value) for key, value in saved.items())
    metadata = getattr(saved, "_metadata", None)
    if metadata is not None:
        prefixes = {plain_name(new): new for new in _module_names(names.values())}
        result._metadata = type(metadata)(
            (prefixes.get(plain_name(key), key), value) for key, value in metadata.items()
        )
    return result


def _module_names(names: Any) -> list[str]:
    modules = {""}
    for name in names:
        parts = name.split(".")
        modules.update(".".join(parts[:count]) for count in range(1, len(parts)))
    return sorted(modules, key=len)


# --- everything: through load_state_dict, or in place for plain trees -----------------------------------------------


def load_object(target: Any, saved: Any, name: str, *, strict: bool) -> None:
    """Hand a saved state to ``target.load_state_dict``.

    Raises:
        TargetMismatchError: the object refused it.
    """
    try:
        if isinstance(target, torch.nn.Module):
            target.load_state_dict(saved, strict=strict)
        else:
            target.load_state_dict(saved)
    except CiuicError:
        raise
    except Exception as error:
        raise TargetMismatchError(
            f"{name}: load_state_dict() of {type(target).__qualname__} refused the saved state: {error}", where=name
        ) from error
    if isinstance(target, torch.optim.Optimizer):
        _undo_casts(target, saved)


def _undo_casts(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Restore the dtype of optimizer state that ``Optimizer.load_state_dict`` casts to its parameter's.

    It turns float32 moments of bfloat16 parameters into bfloat16, which loses bits.
    """
    if type(optimizer).state_dict is not torch.optim.Optimizer.state_dict:
        return  # it has a layout of its own, and casts (or does not) as it likes
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in saved["state"]:
            optimizer.state[parameter] = _uncast(optimizer.state[parameter], saved["state"][number])


def _uncast(current: Any, saved: Any) -> Any:
    """``current`` with the tensors of ``saved`` wherever their dtype was changed."""
    if isinstance(saved, torch.Tensor) and isinstance(current, torch.Tensor):
        return current if current.dtype == saved.dtype else saved.to(current.device)
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in current.keys() & saved.keys():
            current[key] = _uncast(current[key], saved[key])
    elif type(current) is type(saved) and type(saved) in (list, tuple) and len(current) == len(saved):
        return type(saved)(map(_uncast, current, saved))
    return current


def merge_plain(live: Any, saved: Any, twice: dict[int, bool]) -> Any:
    """Put a saved plain tree into a live one: tensors, arrays, dicts and lists in place, the rest by value.

    The tensors, arrays, dicts and lists inside tuples and named tuples are filled in place too.

    Args:
        twice: by ``id`` what is also elsewhere, where something else is to be as far as manifests tell; True once it
            is filled, and then it is not filled again.

    Returns:
        ``live`` where it could be changed in place, else ``saved``; for tuples a new one if any of its items is another
        object now.
    """
    if id(live) in twice:
        if twice[id(live)]:
            return live if not isinstance(live, torch.Tensor) and _same(live, saved, twice) else saved
        twice[id(live)] = True
    if isinstance(live, torch.Tensor) and isinstance(saved, torch.Tensor):
        if live.shape != saved.shape or live.dtype != saved.dtype or _overlaps_itself(live):
            return saved
        with torch.no_grad():
            live.copy_(saved)
        return live
    if isinstance(live, np.ndarray) and isinstance(saved, np.ndarray):
        if live.shape != saved.shape or live.dtype != saved.dtype or not live.flags.writeable:
            return saved
        live[...] = saved
        return live
    if isinstance(live, dict) and type(live) is type(saved):
        merged = {key: merge_plain(live[key], value, twice) if key in live else value for key, value in saved.items()}
        live.clear()
        live.update(merged)
        return live
    if type(live) is list and type(saved) is list:
        live[:] = _merge_items(live, saved, twice)
        return live
    if isinstance(live, tuple) and isinstance(saved, tuple) and _same_kind_of_tuple(live, saved):
        items = _merge_items(live, saved, twice)
        if len(items) == len(live) and all(item is old for item, old in zip(items, live, strict=True)):
            return live
        return tuple.__new__(type(live), items)
    return saved


def _same(live: Any, saved: Any, twice: Mapping[int, bool]) -> bool:
    """Whether what is filled already is to the bit what is to be here, too.

    Manifests tell which tensors were shared when they were saved, and of dicts, lists and arrays they do not.
    """
    if type(live) is not type(saved):
        return False
    if isinstance(live, torch.Tensor):
        if id(live) in twice or (live.dtype, live.shape) != (saved.dtype, saved.shape):
            return False
        one, other = (tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in (live, saved))
        return torch.equal(one, other)
    if isinstance(live, np.ndarray):
        return bool(live.dtype == saved.dtype and live.shape == saved.shape and live.tobytes() == saved.tobytes())
    if isinstance(live, dict):
        return list(live) == list(saved) and all(_same(live[key], saved[key], twice) for key in saved)
    if isinstance(live, list | tuple):
        return len(live) == len(saved) and all(_same(one, other, twice) for one, other in zip(live, saved, strict=True))
    if isinstance(live, float):
        return bool(live.hex() == saved.hex())
    return isinstance(live, str | bytes | int | None) and bool(live == saved)


def _merge_items(live: Sequence[Any], saved: Sequence[Any], twice: dict[int, bool]) -> list[Any]:
    return [
        merge_plain(live[number], value, twice) if number < len(live) else value for number, value in enumerate(saved)
    ]


def _same_kind_of_tuple(live: tuple[Any, ...], saved: tuple[Any, ...]) -> bool:
    """Whether both are plain tuples, or named tuples of the same fields: a local class comes back as a new type."""
    if type(live) is type(saved):
        return type(live) is tuple or hasattr(live, "_fields")
    fields = getattr(live, "_fields", None)
    return fields is not None and fields == getattr(saved, "_fields", None)


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether elements of an expanded tensor share memory: nothing can be copied into it."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


# --- environment ----------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """What a run's numbers depend on beside its state."""
    record = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda or "none",
        "devices": _device_names(),
        "threads": str(torch.get_num_threads()),
    }
    revision = _git_revision()
    if revision:
        record["git"] = revision
    return record


def environment_differences(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """What differs, as text: ``torch 2.12.0 -> 2.13.0``."""
    return [
        f"{name} {saved.get(name, 'unknown')} -> {current.get(name, 'unknown')}"
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]


def _device_names() -> str:
    if not cuda_in_use():
        return "cpu"
    return ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))


def _git_revision() -> str | None:
    """The commit checked out around the main script, read from ``.git`` without running git."""
    from pathlib import Path

    script = getattr(sys.modules.get("__main__"), "__file__", None)
    start = Path(script).resolve().parent if script else Path.cwd()
    try:
        git = next((folder / ".git" for folder in (start, *start.parents) if (folder / ".git").exists()), None)
        if git is None:
            return None
        if git.is_file():  # a worktree: "gitdir: <path>"
            git = Path(git.read_text().partition(":")[2].strip())
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:64]
        name = head[5:]
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
        for folder in (git, common):
            if (folder / name).exists():
                return (folder / name).read_text().strip()[:64]
        packed = (common / "packed-refs").read_text().splitlines()
        return next((line.split()[0][:64] for line in packed if line.endswith(" " + name)), None)
    except (OSError, IndexError):
        return None
