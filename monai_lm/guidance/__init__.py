"""What guides a refinement beside the images: label maps, hard or soft, and corresponding keypoints."""

from monai_lm.guidance.base import Guidance
from monai_lm.guidance.keypoints import Keypoints
from monai_lm.guidance.labels import Labels, SoftLabels

__all__ = ["Guidance", "Keypoints", "Labels", "SoftLabels"]
