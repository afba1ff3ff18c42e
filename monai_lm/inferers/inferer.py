"""MONAI inferer: network, field, refinement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor

from monai_lm.fields.algebra import integrate, resample
from monai_lm.guidance import Guidance
from monai_lm.solver.checks import check_finite
from monai_lm.solver.refinement import check_keywords, refine
from monai_lm.solver.result import RefinementResult

__all__ = ["RegistrationInferer"]


class RegistrationInferer(Inferer):
    """Predict a field with a network and refine it for the pair at hand.

    Args:
        prediction: what the network returns: ``"velocity"`` (stationary, integrated here) or ``"displacement"``, in
            voxels of the grid it is returned on, or ``"features"`` ``(B, 2 · C, *P)``, the moving image's and then the
            fixed one's, which are registered here (what ``features`` makes is another thing: it is for the refinement).
            A velocity is integrated, and features are registered, on their own grid; a field on a coarser grid than
            the images is resampled, units included: the corner voxels of the two grids coincide, except for features,
            whose voxels are blocks of the images' (the corners of those coincide).
        integration_steps: squarings of the integration.
        divisible_pad: what the network and ``features`` see is padded with zeros at its end to multiples of this;
            ``None`` does not pad.
        refine: keyword arguments of :func:`monai_lm.refine`; ``None`` returns the network's own field.
        features: maps an image ``(B, 1, *S)`` to ``(B, C, *S)`` channels that the refinement matches beside the image:
            the soft labels of a segmenter, for one. ``None`` refines on the images alone.
        match: keyword arguments of :func:`monai_lm.refine` for registering predicted features from the identity, on
            their grid; mean squared differences unless they name a similarity.
        takes: the images that the network is called with one by one, in its order: ``("moving", "fixed")``, as MONAI's
            ``VoxelMorph``, or ``("fixed", "moving")``; ``None``: with both as the channels of one tensor.
        output: which entry of a tuple, list or dictionary that the network returns is the prediction, by its number or
            key; ``None``: the only one that has the shape of a field, or, with ``convert``, all of it.
        convert: makes the ``prediction`` of what the network returns, where its convention is another one: a function
            of :mod:`monai_lm.convert`, for one.
        network_size: voxel counts of the one grid that the network was made for: it sees the images resampled to that,
            linearly, and its field is brought back, units included; the corners of the grids coincide, as
            :func:`torch.nn.functional.interpolate` has it. ``None``: it sees them as they are.

    Raises:
        TypeError: an argument of the wrong type, or one that :func:`monai_lm.refine` does not know.
        ValueError: unknown ``prediction`` or ``takes``, ``integration_steps`` or ``divisible_pad`` below 1, a
            ``network_size`` that is none or comes with ``divisible_pad``, settings that :func:`monai_lm.refine` refuses
            together; when called, inputs, predictions or features of the wrong shape, predictions that are not finite,
            or several outputs of which one must be named.
    """

    def __init__(
        self,
        prediction: str = "velocity",
        integration_steps: int = 7,
        divisible_pad: int | None = None,
        refine: Mapping[str, Any] | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        match: Mapping[str, Any] | None = None,
        takes: Sequence[str] | None = None,
        output: int | str | None = None,
        convert: Callable[[Any], Tensor] | None = None,
        network_size: Sequence[int] | None = None,
    ) -> None:
        if prediction not in ("velocity", "displacement", "features"):
            raise ValueError(f"prediction must be 'velocity', 'displacement' or 'features', got {prediction!r}")
        if integration_steps < 1:
            raise ValueError(f"integration_steps must be at least 1, got {integration_steps}")
        if divisible_pad is not None and (not isinstance(divisible_pad, int) or divisible_pad < 1):
            raise ValueError(f"divisible_pad must be None or a whole number of at least 1, got {divisible_pad!r}")
        if takes is not None and (isinstance(takes, str) or sorted(takes) != ["fixed", "moving"]):
            raise ValueError(f"takes must be ('moving', 'fixed'), ('fixed', 'moving') or None, got {takes!r}")
        self.takes = None if takes is None else tuple(takes)
        self.output = output
        self.prediction = prediction
        if match is not None and prediction != "features":
            raise ValueError(f"match is for prediction='features', got it with prediction={prediction!r}")
        self.integration_steps = integration_steps
        self.divisible_pad = divisible_pad
        for name, settings in (("refine", refine), ("match", match)):
            if settings is None:
                continue
            if not isinstance(settings, Mapping):
                raise TypeError(f"{name} must be None or keyword arguments of monai_lm.refine, got {settings!r}")
            check_keywords(name, settings)
        for name, function, of in (("features", features, "an image"), ("convert", convert, "what a network returns")):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be None or a function of {of}, got {type(function).__name__}")
        self.refine = refine
        self.features = features
        self.convert = convert
        self.network_size = _checked_size(network_size, divisible_pad)
        self.match = {"similarity": "mse", **(match or {})}

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Any],
        *args: Any,
        guidance: Guidance | Sequence[Guidance] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Refined field that warps channel 0 of ``inputs`` onto channel 1.

        Args:
            inputs: ``(B, 2, *S)``, channel 0 moving, channel 1 fixed.
            network: called as ``network(inputs, *args, **kwargs)``, or with the two images that it ``takes`` in place
                of ``inputs``.
            args: positional arguments of ``network``.
            guidance: what guides the refinement of these pairs, see :func:`monai_lm.refine`; ``None``: what ``refine``
                of the inferer names.
            kwargs: keyword arguments of ``network``.

        Returns:
            ``(B, n, *S)`` displacement in voxels.

        Raises:
            ValueError: as for the class; or there is a ``guidance``, and the inferer does not refine.
        """
        inputs = _images(inputs)
        ddf = self.predict(inputs, network, *args, **kwargs)
        if self.refine is None and guidance is None:
            return ddf
        return self.refined(inputs, ddf, **({} if guidance is None else {"guidance": guidance})).ddf

    def refined(self, inputs: Tensor, ddf: Tensor, **kwargs: Any) -> RefinementResult:
        """Refine a field ``(B, n, *S)`` that :meth:`predict` returned for ``inputs`` ``(B, 2, *S)``.

        Args:
            inputs: as for a call.
            ddf: the field.
            kwargs: arguments of :func:`monai_lm.refine` that belong to the pairs, as ``guidance``, ``mask`` and
                ``moving_mask``; beside the inferer's own, or instead of them.

        Raises:
            ValueError: the inferer has no settings to refine with, or the field is not finite.
        """
        if self.refine is None:
            raise ValueError("refine must be keyword arguments of monai_lm.refine, if only {}, got None")
        inputs = _images(inputs)
        check_finite("ddf", ddf)
        moving, fixed = (self.channels(image) for image in inputs.split(1, dim=1))
        return refine(fixed, moving, ddf, **{**self.refine, **kwargs})

    def predict(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """The network's own field ``(B, n, *S)`` in voxels; the arguments are those of a call.

        Differentiable, unless the network predicts features.
        """
        inputs = _images(inputs)
        ddf = self.displacement(self.prediction_of(inputs, network, *args, **kwargs), inputs.shape[2:])
        if ddf.shape[0] != inputs.shape[0]:
            raise ValueError(
                f"network must return a {self.prediction} for each of {inputs.shape[0]} pairs, got {ddf.shape[0]}"
            )
        return ddf

    def prediction_of(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """What the network predicts for ``inputs`` ``(B, 2, *S)``, on its own grid, as ``prediction`` says."""
        images = self._seen(inputs)
        roles = {"moving": images[:, :1], "fixed": images[:, 1:]}
        given = [images] if self.takes is None else [roles[role] for role in self.takes]
        out = network(*given, *args, **kwargs)
        if self.convert is None:
            return self._meant(out, inputs.dim() - 2)
        return self.convert(out if self.output is None else self._meant(out, inputs.dim() - 2))

    def _meant(self, out: Any, n: int) -> Any:
        """The one of a network's outputs that is the prediction."""
        if not isinstance(out, tuple | list | Mapping):
            return out
        named = dict(out) if isinstance(out, Mapping) else dict(enumerate(out))
        chosen = self.output
        shapes = {key: tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for key, x in named.items()}
        if chosen is None:
            fields = [key for key, x in named.items() if isinstance(x, Tensor) and x.dim() == n + 2 and x.shape[1] == n]
            if len(fields) != 1:
                raise ValueError(
                    f"network must return a {self.prediction} (B, {n}, *P), one only unless output says which, got "
                    f"{len(fields)} among the outputs {shapes}"
                )
            chosen = fields[0]
        if chosen not in named:
            raise ValueError(f"output must be one of the network's {list(named)}, got {chosen!r}")
        return named[chosen]

    def channels(self, image: Tensor) -> Tensor:
        """What the refinement matches: an image ``(B, 1, *S)`` and its features, ``(B, 1 + C, *S)``."""
        if self.features is None:
            return image
        padded = self.padded(image.clone())  # a function that writes in place must not reach the caller's image
        with torch.no_grad():
            features = self.features(padded)
        shape = tuple(features.shape) if isinstance(features, Tensor) else ()
        if not isinstance(features, Tensor) or shape[:1] + shape[2:] != (padded.shape[0], *padded.shape[2:]):
            got = shape if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"features must return (B, C, *S) for images {tuple(padded.shape)}, got {got}")
        check_finite("features", features)
        return torch.cat([image, _cropped(features, image.shape[2:])], 1)

    def padded(self, images: Tensor) -> Tensor:
        """Images with zeros at their end, to what the network can divide."""
        size = self._padded_size(images.shape[2:])
        return F.pad(images, [p for s, t in zip(size[::-1], images.shape[:1:-1], strict=True) for p in (0, s - t)])

    def _seen(self, inputs: Tensor) -> Tensor:
        """Both images on the grid that the network wants."""
        if self.network_size is None:
            return self.padded(inputs)
        if len(self.network_size) != inputs.dim() - 2:
            raise ValueError(
                f"network_size must be {inputs.dim() - 2} voxel counts for images {tuple(inputs.shape)}, "
                f"got {self.network_size}"
            )
        return F.interpolate(inputs, size=self.network_size, mode=_linear(inputs.dim() - 2))

    def _matched(self, features: Tensor, size: Sequence[int]) -> Tensor:
        """Register features ``(B, 2 · C, *P)``; the field on the grid of images of ``size``."""
        n = len(size)
        if not isinstance(features, Tensor) or features.dim() != n + 2 or features.shape[1] % 2:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"network must return features (B, 2 · C, *P), moving and fixed, for {n}D images, got {got}"
            )
        check_finite("the network's features", features)
        moving, fixed = features.float().chunk(2, 1)
        return _cropped(_of_blocks(refine(fixed, moving, **self.match).ddf, self._padded_size(size)), size)

    def _padded_size(self, size: Sequence[int]) -> list[int]:
        return [s + -s % (self.divisible_pad or 1) for s in size]

    def displacement(self, prediction: Tensor, size: Sequence[int]) -> Tensor:
        """Turn a network's prediction ``(B, n, *P)`` for (padded) images of ``size`` into a displacement on their grid.

        Differentiable, unless the prediction is features.
        """
        n = len(size)
        if self.prediction == "features":
            return self._matched(prediction, size)
        if not isinstance(prediction, Tensor) or prediction.dim() != n + 2 or prediction.shape[1] != n:
            got = tuple(prediction.shape) if isinstance(prediction, Tensor) else type(prediction).__name__
            raise ValueError(f"network must return a {self.prediction} (B, {n}, *P), got {got}")
        check_finite(f"the network's {self.prediction}", prediction)
        with torch.autocast(prediction.device.type, enabled=False):
            field = prediction.float()
            if self.prediction == "velocity":
                field = integrate(field, self.integration_steps)
            if self.network_size is not None:
                return _of_blocks(resample(field, self.network_size), size)
            return _cropped(resample(field, self._padded_size(size)), size)


def _of_blocks(ddf: Tensor, size: Sequence[int]) -> Tensor:
    """A displacement ``(B, n, *P)`` on a grid of ``size`` whose corners, not corner voxels, are those of its own."""
    ratio = ddf.new_tensor([s / p for s, p in zip(size, ddf.shape[2:], strict=True)]).view(-1, *[1] * len(size))
    return F.interpolate(ddf, size=tuple(size), mode=_linear(len(size)), align_corners=False) * ratio


def _linear(n: int) -> str:
    return "trilinear" if n == 3 else "bilinear"


def _checked_size(size: Sequence[int] | None, divisible_pad: int | None) -> tuple[int, ...] | None:
    """Voxel counts of the one grid of a network; ValueError for others."""
    if size is None:
        return None
    whole = not isinstance(size, str) and len(size) in (2, 3) and all(isinstance(s, int) and s > 1 for s in size)
    if not whole:
        raise ValueError(f"network_size must be None or 2 or 3 voxel counts of at least 2, got {size!r}")
    if divisible_pad is not None:
        raise ValueError(f"divisible_pad must be None with network_size, got {divisible_pad}")
    return tuple(size)


def _cropped(tensor: Tensor, size: Sequence[int]) -> Tensor:
    for axis, length in enumerate(size):
        tensor = tensor.narrow(2 + axis, 0, length)
    return tensor


def _images(inputs: Tensor) -> Tensor:
    """Check the shape and drop the metadata: the affine is that of the moving image, the field's is the fixed one's."""
    if not isinstance(inputs, Tensor) or inputs.dim() not in (4, 5) or inputs.shape[1] != 2:
        got = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"inputs must be (B, 2, *S), channel 0 moving and channel 1 fixed, got {got}")
    return inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
