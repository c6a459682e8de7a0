"""A detector as one module from images to boxes, scores and labels; no shape in it depends on values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmdet.models.dense_heads import AnchorHead, RTMDetHead
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from castling_det.export.dense import DenseDecoder, PostProcessing
from castling_det.export.inputs import normalization
from castling_det.export.two_stage import TwoStageDecoder
from castling_det.models import fuse_detector
from castling_det.runtime.metadata import OUTPUT_NAMES

__all__ = ["DeployedDetector", "hold_norms_in_float32", "keep_sizes_simple"]


class DeployedDetector(nn.Module):
    """MMDetection's detector, from images as they were read to a fixed number of rows an image.

    Args:
        detector: in eval mode, of a family that has an exported form; it is copied.
        preprocessing: take BGR images of 0 to 255; otherwise what the detector's data preprocessor returns.
        half: weights and features in float16; norms, the attention's sums and the head's outputs stay in float32.

    Attributes:
        notes: sentences on the branches that are left out.
        min_units: least height and width, in `pad_size_divisor`, that the detector is traced and compared with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, detector: nn.Module, *, preprocessing: bool = True, half: bool = False) -> None:
        super().__init__()
        if detector.training:
            raise ValueError("detector: is in training mode; call eval() before it is exported")
        detector = copy.deepcopy(detector).requires_grad_(False)
        # Before the precision changes: the folded weights are rounded once.
        fuse_detector(detector)
        keep_sizes_simple(detector)
        self.normalization = normalization(detector)
        self.preprocessing = preprocessing
        self.half_precision = half
        # A map with a single row or column would be traced as one that has no other size.
        self.min_units = max(2, 2 * _coarsest_stride(detector) // self.normalization.pad_size_divisor)
        if half:
            hold_norms_in_float32(detector.half())
        self.decoder, self.notes = _decoder(detector)
        self.settings: PostProcessing = self.decoder.settings
        self.detector: Any = detector
        self.register_buffer("mean", torch.tensor(self.normalization.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.normalization.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """Detections, and the head's maps by their names with `raw_` in front.

        Args:
            images: (B, 3, H, W), float32.
            sizes: height and width of each image without its padding, (B, 2), float32; None: there is no padding.
                Boxes are clipped to them before suppression, as MMDetection does.
        """
        height, width = images.shape[-2:]
        if sizes is None:
            sizes = images.new_tensor([[height, width]]).expand(images.shape[0], -1)
        hw = torch.stack([sizes[:, 0].clamp(max=height), sizes[:, 1].clamp(max=width)], dim=1)
        found, maps = self.decoder(self._features(images), hw)
        rows = dict(zip(OUTPUT_NAMES, (found.boxes, found.scores, found.labels), strict=True))
        return {**rows, **{f"raw_{name}": value for name, value in maps.items()}}

    def _features(self, images: Tensor) -> tuple[Tensor, ...]:
        x = images
        if self.preprocessing:
            x = x.flip(1) if self.normalization.bgr_to_rgb else x
            x = (x - self.mean) / self.std
        features = self.detector.backbone(x.half() if self.half_precision else x)
        return tuple(self.detector.neck(features) if self.detector.with_neck else features)


def _decoder(detector: Any) -> tuple[Any, tuple[str, ...]]:
    """The module from features to detections, and notes on the branches that it leaves out."""
    if isinstance(detector, TwoStageDetector):
        notes = ("boxes only: the mask branch is left out",) if detector.roi_head.with_mask else ()
        return TwoStageDecoder(detector), notes
    if isinstance(detector, SingleStageDetector) and isinstance(detector.bbox_head, (AnchorHead, RTMDetHead)):
        return DenseDecoder(detector.bbox_head, PostProcessing.of(detector.test_cfg, "test_cfg")), ()
    expected = "a single-stage detector with an anchor, GFL, PicoDet or RTMDet head, or Faster or Mask R-CNN"
    raise ValueError(f"{type(detector).__name__}: expected {expected}; no other family is exported")


def _coarsest_stride(detector: nn.Module) -> int:
    """In pixels, of the maps that the head or the RPN predicts on; 0 where none says so."""
    heads = (getattr(detector, name, None) for name in ("bbox_head", "rpn_head"))
    generators = [getattr(head, "prior_generator", None) for head in heads]
    strides = [stride for generator in generators if generator is not None for stride in generator.strides]
    return int(max((max(stride) if isinstance(stride, tuple) else stride for stride in strides), default=0))


class _DividingConv(nn.Module):
    """A strided convolution of kernel k, stride s and padding p on a side n that s divides: n / s places.

    The usual size, floor((n + 2 p - k) / s) + 1, is the same number, but a tracer keeps the floors of all layers, and
    comparing two sizes takes minutes. Padding the far side by k - s - p, which may be a crop, gives n / s at once.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv, sizes = self.conv, x.shape[-2:]
        strides, paddings, kernels = conv.stride, conv.padding, conv.kernel_size
        unknown = any(isinstance(n, torch.SymInt) for n in sizes)
        if not unknown or not all(statically_known_true(n % s == 0) for n, s in zip(sizes, strides, strict=True)):
            out: Tensor = conv(x)
            return out
        assert not isinstance(paddings, str)
        pads: list[int] = []
        for s, p, k in zip(reversed(strides), reversed(paddings), reversed(kernels), strict=True):
            pads += [p, k - s - p]
        return F.conv2d(F.pad(x, pads), conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


def keep_sizes_simple(module: nn.Module) -> None:
    """Puts a `_DividingConv` in the place of every plain strided convolution inside `module`; it computes the same."""
    for parent in list(module.modules()):
        for name, conv in list(parent.named_children()):
            if type(conv) is not nn.Conv2d or isinstance(parent, _DividingConv) or max(conv.stride) == 1:
                continue
            if conv.padding_mode == "zeros" and isinstance(conv.padding, tuple) and tuple(conv.dilation) == (1, 1):
                setattr(parent, name, _DividingConv(conv))


class _Float32Norm(nn.Module):
    """A norm that computes in float32 between features of another type."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.float())
        return out.to(x.dtype)


def hold_norms_in_float32(module: nn.Module) -> None:
    """Wraps every LayerNorm and GroupNorm inside `module`, in place: float16 has too few digits for their sums."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.LayerNorm, nn.GroupNorm)):
                setattr(parent, name, _Float32Norm(child))
