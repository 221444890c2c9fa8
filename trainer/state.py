"""What a run needs to go on (optimiser, schedule, gradient scale, random numbers) as safetensors and JSON, not pickle.

Comes in: the nested dictionaries that torch calls state. Goes out: one file; the tensors are its tensors, the rest is JSON
in its header. A pickle can run code where it is opened, and a checkpoint may come from the Hub.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modeling_altmoe.sharing_altmoe import usual_mode


def save_tree(tree, path: Path) -> None:
    """Write nested dictionaries, lists and tuples of tensors, arrays, numbers, strings and None.

    Raises:
        TypeError: something else is in it.
    """
    tensors: dict[str, torch.Tensor] = {}

    def plain(node):
        if isinstance(node, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = node.detach().cpu().clone().contiguous()
            return {"tensor": name}
        if isinstance(node, np.ndarray):
            return {"array": node.tolist(), "dtype": str(node.dtype)}
        if isinstance(node, dict):  # keys may be numbers, which JSON would turn into strings
            return {"dict": [[plain(key), plain(value)] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            return {type(node).__name__: [plain(item) for item in node]}
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"A {type(node).__name__} cannot be written to '{path}'.")

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"tree": json.dumps(plain(tree))})
    usual_mode([path])


def load_tree(path: Path):
    """What `save_tree` wrote, tensors on the CPU.

    Raises:
        FileNotFoundError: the checkpoint has no such file, so it cannot be resumed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"'{path}' is missing: this checkpoint holds weights only (or is of an earlier version), so the run cannot go on "
            "from it. Start anew, or from another checkpoint."
        )

    def back(node):
        if not isinstance(node, dict):
            return node
        ((kind, value),) = ((k, v) for k, v in node.items() if k != "dtype")
        if kind == "tensor":
            return file.get_tensor(value)
        if kind == "array":
            return np.array(value, dtype=node["dtype"])
        if kind == "dict":
            return {back(key): back(item) for key, item in value}
        return (tuple if kind == "tuple" else list)(back(item) for item in value)

    with safe_open(path, framework="pt") as file:
        return back(json.loads(file.metadata()["tree"]))


def random_state(device: torch.device) -> dict:
    """The states of all generators a process uses."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    """Put all generators where they were."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"])
