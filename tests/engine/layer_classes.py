"""The decoder layer classes of every model that vLLM knows, read from source text.

Nothing is imported or built, so models that this machine cannot run are among them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from steering.vllm.flows import Attribute, Function, Known, Unknown, Value
from steering.vllm.layer_source import ADDING_NORMS, norm_kind_of
from steering.vllm.source import Source

_REGISTRY: Final = "model_executor.models.registry"
_MODELS: Final = "model_executor.models"
_TABLES: Final = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS")
_BACKEND_TABLE: Final = "_TRANSFORMERS_SUPPORTED_MODELS"
_LAYER_NAME: Final = re.compile(r"(Layer|Block|Hybrid)$")
_NO_LAYER_NAME: Final = re.compile(
    r"Vi[ts]|Vision|Encoder|Audio|Whisper|Siglip|CLIP|Conformer|MTP|MultiToken|Predictor|Eagle|"
    r"MoELayer|MLPBlock|MoEMoEBlock|HC(Pre|Post|Head)Layer|PLE|Sparse(Moe|MoE)|MLPLayer|SelfAttn|PPMissing|"
    r"Conv2d|LayerBase|Laurel|BaseLayer|Embedding|Q[Ff]ormer|Pixtral|Resampler|SharedExpert|Mono|"
    r"Evidence|Dasheng|SSMDecoder|FalconH1Attention|Zamba2Attention|FusedMoE|ShortConvLayer"
)
_NO_LAYER_MODULE: Final = re.compile(
    r"vision|audio|siglip|clip|whisper|vit|radio|parakeet|deepencoder|mtp|eagle|moonvit|aimv2|"
    r"^(?!models\.|model_executor\.models\.)"
)
#: Attributes that are what they are without tensor or sequence parallelism.
_SERIAL: Final = {"tp_size": 1}
_SERIAL_FLAGS: Final = re.compile(
    r"sequence_parallel|reduce_scatter|use_sp$|fuse_input_allreduce|is_mtp_layer|use_hc_|^mono$"
)


@dataclass(frozen=True)
class LayerClass:
    """A class of decoder layers, by where it is defined."""

    module: str
    name: str


class ClassSource:
    """A layer class's source text, as `forward_trace` wants to see a layer.

    Args:
        source: what the class is defined in.
        layer: the class.
        flags: attributes that are taken to be true or false.
    """

    def __init__(
        self, source: Source, layer: LayerClass, flags: Mapping[str, bool] | None = None
    ) -> None:
        self._source = source
        self._layer = layer
        self._flags = flags or {}
        self._line = source.line(layer.module, layer.name)
        self._norms: dict[str, str | None] = {}

    def taking(self, flags: Mapping[str, bool]) -> ClassSource:
        """The same class with these flags."""
        other = ClassSource(self._source, self._layer, flags)
        other._norms = self._norms
        return other

    def method(self, name: str) -> ast.FunctionDef | None:
        """A method, its own or inherited."""
        for _, cls in self._line:
            for node in cls.body:
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    return node
        return None

    def attribute(self, path: str) -> Value:
        """``self.path``: whatever it is, it may be a module."""
        head, _, rest = path.partition(".")
        if path in self._flags:
            return Attribute(path, module=True) if self._flags[path] else Known(None)
        if path in _SERIAL:
            return Known(_SERIAL[path])
        if _SERIAL_FLAGS.search(path):
            return Known(None if path == "mono" else False)
        if self.method(path) is not None or rest.startswith("forward"):
            return Unknown(f"self.{path}")
        return Attribute(path, self._norm(head) if not rest or rest.isdigit() else None)

    def outside(self, name: str) -> Value:
        """A global name; of other packages torch alone is at hand."""
        return Function(name, torch if name == "torch" else None)

    def is_instance(self, attribute: Attribute, cls: Value) -> bool | None:
        """Not told by the source."""
        return None

    def _norm(self, name: str) -> str | None:
        # Asked again for every hook point and way through the forward, and long to find.
        if name not in self._norms:
            self._norms[name] = self._find_norm(name)
        return self._norms[name]

    def _find_norm(self, name: str) -> str | None:
        for module, cls in self._line:
            for node in ast.walk(cls):
                if isinstance(node, ast.Assign) and any(
                    isinstance(target, ast.Attribute) and target.attr == name
                    for target in node.targets
                ):
                    found = self._norm_made(module, node.value)
                    if found is not None:
                        return found
        return None

    def _norm_made(self, module: str, value: ast.expr) -> str | None:
        for node in ast.walk(value):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).split(".")[-1].split("[")[0]
            if "Dropout" in name:
                return "identity"
            if not re.search(r"norm", name, re.IGNORECASE) or "Att" in name:
                continue
            line = self._source.line(module, name)
            if not line:
                return "one" if name == "LayerNorm" else self._norms_of(module)
            if any(f"vllm.{where}" == ADDING_NORMS for where, _ in line):
                return "adds"
            return _forward_kind([cls for _, cls in line])
        return None

    def _norms_of(self, module: str) -> str:
        """What the norms do that a module defines, where a variable holds one of them."""
        tree = self._source.definition(module, "")
        assert tree is not None and isinstance(tree[1], ast.Module), module
        kinds = {
            _forward_kind([node])
            for node in tree[1].body
            if isinstance(node, ast.ClassDef) and "Norm" in node.name
        }
        return kinds.pop() if len(kinds) == 1 else "adds"


def _forward_kind(line: list[ast.ClassDef]) -> str:
    methods = {
        part.name: part
        for cls in reversed(line)
        for part in cls.body
        if isinstance(part, ast.FunctionDef)
    }
    forward = methods.get("forward_native", methods.get("forward"))
    return "one" if forward is None else norm_kind_of(forward)


def architectures(source: Source) -> dict[str, tuple[str, str]]:
    """Every generating architecture that vLLM has a class for: its module and class."""
    found = {}
    for table in _TABLES:
        for name, (module, cls) in _registered(source, table).items():
            where = module.removeprefix("vllm.")
            if where == module:
                where = f"{_MODELS}.{module}"
            elif source.definition(f"{where}.nvidia.model", cls) is not None:
                where = f"{where}.nvidia.model"  # the package chooses by the platform
            found[name] = (where, cls)
    return found


def backend_architectures(source: Source) -> list[str]:
    """Those that run on vLLM's backend for transformers, text models only."""
    return [
        name
        for name, (_, cls) in _registered(source, _BACKEND_TABLE).items()
        if "CausalLM" in name and "MultiModal" not in cls
    ]


def _registered(source: Source, table: str) -> dict[str, tuple[str, str]]:
    found = source.definition(_REGISTRY, table)
    assert found is not None, table
    node = found[1]
    assert isinstance(node, ast.Assign), table
    entries: dict[str, tuple[str, str]] = ast.literal_eval(node.value)
    return entries


def layer_classes(source: Source, module: str, name: str) -> list[LayerClass]:
    """The decoder layer classes that a model's class mentions, itself or in its parts."""
    layers: dict[LayerClass, None] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(module, name, 0)]
    while waiting:
        where, wanted, depth = waiting.pop(0)
        found = source.definition(where, wanted)
        if found is None:
            continue
        where, node = found
        key = (where, getattr(node, "name", wanted))
        if key in seen or depth > 6:
            continue
        seen.add(key)
        if isinstance(node, ast.ClassDef):
            if _is_layer(source, where, node):
                layers[LayerClass(where, node.name)] = None
                continue
        elif not isinstance(node, ast.Assign | ast.AnnAssign | ast.FunctionDef):
            continue
        if _NO_LAYER_MODULE.search(where) and depth:
            continue
        waiting.extend((where, part, depth + 1) for part in _mentioned(node))
    home = source.definition(module, name)
    own = [layer for layer in layers if home is not None and layer.module == home[0]]
    return own or list(layers)  # what a class of its own is made from is not its own


def _mentioned(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if (
            isinstance(part, ast.Name)
            and (part.id[0].isupper() or part.id.startswith(("make_", "_create", "ALL_", "_")))
            and not _NO_LAYER_NAME.search(part.id)
        ):
            yield part.id


def _is_layer(source: Source, module: str, node: ast.ClassDef) -> bool:
    if not _LAYER_NAME.search(node.name) or _NO_LAYER_NAME.search(node.name):
        return False
    return any(
        isinstance(part, ast.FunctionDef) and part.name == "forward"
        for _, cls in source.line(module, node.name)
        for part in cls.body
    )


def backend_layers(source: Source, architecture: str) -> list[LayerClass]:
    """The layer classes of a model of transformers, whose source text ``source`` is."""
    import transformers

    cls: Any = getattr(transformers, architecture, None)
    if cls is None:
        return []
    module = cls.__module__.removeprefix("transformers.")
    names = cls._no_split_modules or getattr(cls.base_model, "_no_split_modules", None) or []
    return [LayerClass(module, name) for name in sorted(names)]


def package(name: str) -> Path:
    """The folder of an installed package."""
    import importlib.util

    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None, name
    return Path(found.origin).parent
