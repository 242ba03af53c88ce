"""Empty modules for GPU packages that SGLang always imports.

Call `install` before the first import of sglang, in each of its processes. On a CPU the models do not need these
packages. Computing with a stand-in fails or gives wrong tokens.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAMES = ("triton", "sgl_kernel", "torchvision", "torchaudio", "IPython")
# These check whether triton and torchvision are installed, so they are imported before the stand-ins exist.
ASKERS = (
    "torch.utils.flop_counter",
    "torch._inductor.compile_fx",
    "torch._inductor.ir",
    "transformers.models.auto.processing_auto",
)


class Anything:
    """Any attribute of a stand-in. Called with a function it returns the function, like a decorator."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "driver":  # triton.runtime.driver is asked for the GPU
            raise AttributeError(name)
        return Anything()

    def __getitem__(self, _: Any) -> "Anything":
        return self

    def __or__(self, _: Any) -> "Anything":
        return self

    __ror__ = __or__

    def __mro_entries__(self, _: tuple[type, ...]) -> tuple[type, ...]:
        return (object,)


class StandIn(ModuleType):
    """A module or package that has every attribute that is imported from it."""

    __path__: list[str] = []
    __version__: str = "3.5.0"  # triton's version is compared

    def __getattr__(self, name: str) -> Any:
        return getattr(Anything(), name)


class StandIns(MetaPathFinder, Loader):
    """Finds the packages in `NAMES` that are not installed."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    for name in ASKERS:
        importlib.import_module(name)
    sys.meta_path.append(StandIns())
