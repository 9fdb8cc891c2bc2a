"""Long convolution by a chunked scan over real poles."""

from cistron_kernels.modal_scan.reference import modal_scan

__all__ = ["modal_scan"]
