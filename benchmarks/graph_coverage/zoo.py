"""The models: which ones, and how each is built with random weights and example inputs at batch 1.

Names are ``library:architecture``. No library of models is a dependency of edgeprune; see `benchmarks/graph.py` for how to
install them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graph_coverage import transformers_models

SUITES = ("torchvision", "timm", "transformers", "segmentation", "detection", "video", "attention")

SEGMENTATION = (
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "deeplabv3_resnet50+aux",
    "deeplabv3_resnet101",
    "fcn_resnet50",
    "fcn_resnet50+aux",
    "fcn_resnet101",
    "lraspp_mobilenet_v3_large",
)
"""All six of torchvision, two of them again with the second head that its pretrained weights have."""

DETECTION = (
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
"""One of each kind that torchvision has, and Faster R-CNN with both of its backbones; second versions are left out."""

ATTENTION = (
    "torchvision:vit_b_16",
    "torchvision:swin_t",
    "torchvision:swin_v2_t",
    "torchvision:maxvit_t",
    "timm:vit_small_patch16_224",
    "timm:mobilevit_s",
    "timm:swin_tiny_patch4_window7_224",
    "timm:edgenext_small",
    "timm:levit_128",
    "timm:efficientformerv2_s0",
)

_TIMM_COUNT = 100
_TIMM_PARAMETERS = 100_000_000
_VIDEO_SHAPES = {"mc3_18": (3, 16, 112, 112), "r2plus1d_18": (3, 16, 112, 112), "r3d_18": (3, 16, 112, 112)}
_SCHEMAS: list[torch.library.Library] = []


def prepare(folder: str | None) -> None:
    """Make the libraries of models importable: ``folder`` is searched last, so that it shadows nothing."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if folder and folder not in sys.path:
        sys.path.append(folder)
    _define_schemas()


def _define_schemas() -> None:
    """Stand in for the compiled part of torchvision where it does not load (there is none for CPU builds of torch).

    Its import asks for the schemas of two operations; its detectors also run one of them, which is defined in Python here.
    """
    spec = importlib.util.find_spec("torchvision")
    if _SCHEMAS or spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl("nms", _nms, "CPU")
        _SCHEMAS.append(library)
        import torchvision.extension

        # Only after the import: what was decided by then (pooling in Python) stays.
        torchvision.extension._has_ops = lambda: True
        torch.compiler.set_stance("force_eager")


def _nms(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Non-maximum suppression: boxes of shape [n, 4] in order of their scores, without those that overlap a better one."""
    from torchvision.ops import box_iou

    pending = scores.argsort(descending=True, stable=True)
    kept = []
    while len(pending):
        best, pending = pending[0], pending[1:]
        kept.append(best)
        pending = pending[box_iou(dets[best][None], dets[pending])[0] <= iou_threshold]
    return torch.stack(kept) if kept else pending


def names(suite: str, cache: Path) -> list[str]:
    """The models of a suite, in a fixed order.

    Args:
        suite: One of `SUITES`.
        cache: Folder for the list of timm architectures, which takes a minute to make.
    """
    if suite == "attention":
        return list(ATTENTION)
    if suite == "timm":
        return [f"timm:{name}" for name in _timm_names(cache / "timm.json")]
    if suite == "transformers":
        return [f"transformers:{name}" for name in transformers_models.MODELS]
    if suite == "segmentation":
        return [f"segmentation:{name}" for name in SEGMENTATION]
    if suite == "detection":
        return [f"detection:{name}" for name in DETECTION]
    import torchvision.models as models

    package = {"torchvision": models, "video": models.video}[suite]
    return [f"{suite}:{name}" for name in models.list_models(package)]


def _timm_names(path: Path) -> list[str]:
    import timm

    if path.exists():
        stored = json.loads(path.read_text())
        if stored["timm"] == timm.__version__:
            return list(stored["names"])
    found = _timm_list()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"timm": timm.__version__, "names": found}, indent=1) + "\n")
    return found


def _timm_list() -> list[str]:
    """Per module of ``timm.models`` the first architecture that is small enough, then the second of each, to the count."""
    import timm

    fitting: dict[str, list[str]] = {}
    listed = {module: timm.list_models(module=module) for module in sorted(timm.list_modules())}
    found: list[str] = []
    for turn in range(max(map(len, listed.values()))):
        for module, architectures in listed.items():
            own = fitting.setdefault(module, [])
            while len(own) <= turn and architectures:
                name = architectures.pop(0)
                if _timm_parameters(name) <= _TIMM_PARAMETERS:
                    own.append(name)
            found += own[turn : turn + 1]
            if len(found) == _TIMM_COUNT:
                return found
    return found


def _timm_parameters(name: str) -> int:
    import timm

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def build(name: str) -> tuple[nn.Module, Any]:
    """A model with random weights in eval form, and its example inputs.

    Sizes are those that an architecture is used at, 224 pixels for all of torchvision's classifiers but inception_v3.
    """
    library, _, architecture = name.partition(":")
    builders = {
        "torchvision": _classifier,
        "timm": _timm,
        "transformers": transformers_models.build,
        "segmentation": _segmenter,
        "detection": _detector,
        "video": _video,
    }
    torch.manual_seed(0)
    model, inputs = builders[library](architecture)
    return model.eval(), inputs


def _classifier(name: str) -> tuple[nn.Module, Any]:
    from torchvision.models import get_model

    # The heads that only training uses are left out, as in the form that torchvision's pretrained weights have.
    options = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    size = 299 if name == "inception_v3" else 224
    return get_model(name, weights=None, **options), torch.randn(1, 3, size, size)


def _timm(name: str) -> tuple[nn.Module, Any]:
    import timm

    model = timm.create_model(name, pretrained=False)
    return model, torch.randn(1, *model.pretrained_cfg["input_size"])


def _segmenter(name: str) -> tuple[nn.Module, Any]:
    from torchvision.models import get_model

    architecture, _, aux = name.partition("+")
    options = {"aux_loss": True} if aux else {}
    return get_model(architecture, weights=None, weights_backbone=None, **options), torch.randn(1, 3, 224, 224)


def _detector(name: str) -> tuple[nn.Module, Any]:
    from torchvision.models import get_model

    options = {} if name.startswith("ssd") else {"min_size": 320, "max_size": 320}
    return get_model(name, weights=None, weights_backbone=None, **options), ([torch.rand(3, 320, 320)],)


def _video(name: str) -> tuple[nn.Module, Any]:
    from torchvision.models import get_model

    return get_model(name, weights=None), torch.randn(1, *_VIDEO_SHAPES.get(name, (3, 16, 224, 224)))
