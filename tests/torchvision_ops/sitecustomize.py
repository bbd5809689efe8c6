"""Lets torchvision be imported beside another build of PyTorch than its own (CPU wheels beside CUDA wheels).

Its compiled operators cannot be loaded there, and its Python code fails where it registers shapes for them. They are
declared, without being there: timm and transformers import torchvision, and call none of them. Python imports a module
of this name when it starts, where the folder is on PYTHONPATH, so that it reaches what tests start too.
"""

import importlib.abc
import importlib.util
import re
import sys
from pathlib import Path

FIRST = "torchvision._autograd_registrations"  # the first of its modules that speaks of the operators
_kept = []  # PyTorch forgets the operators of a library that is thrown away


class _Declaring(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == FIRST and not sys.modules["torchvision.extension"]._has_ops():
            sys.meta_path.remove(self)
            import torch

            text = (Path(path[0]) / "_meta_registrations.py").read_text()
            library = torch.library.Library("torchvision", "DEF")
            for operator in re.findall(r'@register_meta\("(\w+)"\)|register_fake\("torchvision::(\w+)"\)', text):
                library.define(f"{''.join(operator)}(Tensor x) -> Tensor")
            _kept.append(library)
        return None


if not any(type(finder).__name__ == _Declaring.__name__ for finder in sys.meta_path):  # Python's start came first
    sys.meta_path.insert(0, _Declaring())
